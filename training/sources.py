"""Which documents a stage's data stand for."""

from __future__ import annotations

from typing import Any

from internvideo3.training.chat import NO_LIMITS, ChatDocuments, RowLimits
from internvideo3.training.documents import Source, WorldDocuments
from internvideo3.training.recipe import ChatData, WorldData


def documents_of(
    data: WorldData | ChatData, processor: Any, seed: int, row: RowLimits = NO_LIMITS
) -> Source:
    """The documents of a stage, by index.

    Args:
        data: What the recipe says of them.
        processor: The policy's.
        seed: Of the recipe.
        row: What a document of a file has to fit and to hold.

    Raises:
        RecipeError: Shares do not sum to 1.
        DataError: A file cannot be read.
    """
    if isinstance(data, ChatData):
        return ChatDocuments(data, processor, seed, row)
    return WorldDocuments(data, processor, seed)
