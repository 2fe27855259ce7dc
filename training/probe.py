"""How well a model predicts text, pictures' and videos' captions: what conversion costs.

Mean cross-entropy, nats a token, of the same documents whoever is asked. Section 4.1 says that
continued pretraining recovers what conversion lost; these numbers, before conversion, after it and
after continued pretraining, are that claim.

Letters: N predicted tokens, W text width, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from internvideo3.training.captions import WorldCaptions
from internvideo3.training.chat import NO_LIMITS, ChatDocuments, RowLimits
from internvideo3.training.documents import Document
from internvideo3.training.objectives.linear_cross_entropy import IGNORE, linear_cross_entropy
from internvideo3.training.packing import pack
from internvideo3.training.policy import Policy
from internvideo3.training.recipe import (
    ChatData,
    Convert,
    Cpt,
    Modality,
    Shares,
    WorldData,
    file_digest,
)

log = logging.getLogger("internvideo3.training")
FIRST_SEED = 9 * 10**8
"""Videos of the training split that no recipe trains on."""
EVEN = Shares(text=0.4, image=0.3, video=0.3)
MEASURED_ON = "measured on"
"""Key of `losses.json` beside the moments: what their documents are."""


class Held(Protocol):
    """Documents that nothing is trained on."""

    def of_kind(self, kind: Modality, count: int) -> Iterator[Document]:
        """The first so many documents of a kind, or as many as there are."""


class HeldWorld:
    """Captions of the scale world's videos that no recipe trains on."""

    def __init__(self, lengths: Mapping[int, float], processor: Any, videos: int) -> None:
        data = WorldData(lengths=dict(lengths), videos=videos, first_seed=FIRST_SEED)
        self.captions = WorldCaptions(data, processor, 0, EVEN.by_kind())

    def of_kind(self, kind: Modality, count: int) -> Iterator[Document]:
        """The first so many documents of a kind."""
        return (self.captions.of_kind(kind, index) for index in range(count))


class HeldFiles:
    """Rows of files in the chat form."""

    def __init__(
        self, data: ChatData, files: Sequence[str], processor: Any, row: RowLimits = NO_LIMITS
    ) -> None:
        """Reads the rows; how videos are seen is that of the stage's own data.

        Raises:
            DataError: A file cannot be read, or is empty.
        """
        even = {name: 1 / len(files) for name in files}
        self.rows = ChatDocuments(replace(data, files=even), processor, 0, row)

    def of_kind(self, kind: Modality, count: int) -> Iterator[Document]:
        """The first so many documents of a kind, or as many as there are."""
        return self.rows.of_kind(kind, count)


def held_of(options: Convert | Cpt, processor: Any) -> Held | None:
    """What a stage's losses are measured on; None if its recipe names nothing."""
    if isinstance(options.data, WorldData):
        return HeldWorld(options.data.lengths, processor, options.probe)
    if options.held_out is None or options.data is None:
        return None
    row = RowLimits(options.pack_tokens) if isinstance(options, Cpt) else NO_LIMITS
    return HeldFiles(options.data, options.held_out, processor, row)


def measured_on(options: Convert | Cpt) -> dict[str, Any]:
    """What tells the documents of `held_of` from others, as plain JSON data.

    Raises:
        RecipeError: A file is not there.
    """
    if isinstance(options.data, WorldData):
        lengths = {str(length): share for length, share in options.data.lengths.items()}
        return {"documents": options.probe, "lengths": lengths}
    # In their order, by which the first documents of a kind are chosen.
    files = [[name, file_digest(Path(name))] for name in options.held_out or ()]
    return {"documents": options.probe, "held_out": files}


@torch.no_grad()
def modality_losses(policy: Policy, held: Held, documents: int) -> dict[str, float]:
    """Loss on so many documents of each kind; a kind that is not there has none.

    Args:
        policy: The model.
        held: What it is measured on.
        documents: Documents of each kind.
    """
    found = {kind: _loss(policy, held.of_kind(kind, documents)) for kind in get_args(Modality)}
    return {kind: loss for kind, loss in found.items() if loss is not None}


def _loss(policy: Policy, documents: Iterable[Document]) -> float | None:
    total = tokens = 0.0
    for document in documents:
        laid = pack([document], policy.model)
        labels_N = laid.labels_T[laid.labels_T != IGNORE]

        def loss(hidden_NW: Tensor, head_VW: Tensor, labels_N: Tensor = labels_N) -> Tensor:
            ones_N = torch.ones(len(labels_N), device=hidden_NW.device)
            return linear_cross_entropy(hidden_NW, head_VW, labels_N.to(hidden_NW.device), ones_N)

        total += float(policy(laid.to(policy.device), loss))
        tokens += len(labels_N)
    return total / tokens if tokens else None


def note_losses(
    folder: Path, moment: str, losses: dict[str, float], documents: Mapping[str, Any]
) -> None:
    """Add a moment's losses to a stage's `losses.json`, if it has none yet.

    Losses of other documents are left out from then on: beside these they would tell a change of
    the documents as one of the model.

    Args:
        folder: Of the stage.
        moment: When they were measured.
        losses: By kind.
        documents: What they were measured on (`measured_on`).
    """
    path = folder / "losses.json"
    held = json.loads(path.read_text()) if path.is_file() else {}
    if held.get(MEASURED_ON) != documents:
        others = ", ".join(sorted(held.keys() - {MEASURED_ON}))
        if others:
            log.warning("%s: %s left out, measured on other documents than now", path, others)
        held = {}
    told = {moment: losses, MEASURED_ON: documents} | held
    part = path.with_suffix(".part")
    part.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    part.replace(path)
