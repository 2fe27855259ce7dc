"""Which documents a stage's data stand for."""

from __future__ import annotations

from typing import Any

from internvideo3.training.chat import ChatDocuments
from internvideo3.training.documents import Source, WorldDocuments
from internvideo3.training.recipe import ChatData, WorldData


def documents_of(data: WorldData | ChatData, processor: Any, seed: int) -> Source:
    """The documents of a stage, by index.

    Raises:
        RecipeError: Shares do not sum to 1.
        DataError: A file cannot be read.
    """
    if isinstance(data, ChatData):
        return ChatDocuments(data, processor, seed)
    return WorldDocuments(data, processor, seed)
