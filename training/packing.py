"""Documents side by side in one row, each behind its own mask.

A token sees itself and what came before it in its own document: the trunk, and of the branches
only its own. Every branch continues the trunk's positions, as a fork of a session does.

Letters: T tokens of a row, N supervised tokens, R branches with supervised tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from internvideo3.model.prompt import Medium
from internvideo3.training.curation.records import DataError
from internvideo3.training.documents import Document
from internvideo3.training.objectives.linear_cross_entropy import IGNORE


@dataclass(frozen=True)
class Pack:
    """One row of documents."""

    ids_T: Tensor
    positions_3T: Tensor
    document_T: Tensor
    branch_T: Tensor
    """0 in the trunk, 1, 2, … in the branches of a document."""
    labels_T: Tensor
    """The id that follows, `IGNORE` where it is not the model's own."""
    response_T: Tensor
    """Number of the branch, or of the words within a trunk, in the row; -1 elsewhere."""
    pixels: Tensor
    grid_thw: Tensor

    def padded(self, multiple: int) -> Pack:
        """The same with a last document of nothing, so that the row can be divided."""
        more = -len(self.ids_T) % multiple
        if not more:
            return self
        last = {"document_T": int(self.document_T[-1]) + 1, "labels_T": IGNORE, "response_T": -1}
        grown = {
            name: functional.pad(getattr(self, name), (0, more), value=last.get(name, 0))
            for name in ("ids_T", "positions_3T", "document_T", "branch_T", "labels_T",
                         "response_T")
        }  # fmt: skip
        return replace(self, **grown)

    def said_lengths(self) -> Tensor:
        """Supervised tokens of each branch, `[R]`."""
        told = self.labels_T != IGNORE
        return torch.bincount(self.response_T[told], minlength=int(self.response_T.max()) + 1)

    def to(self, device: torch.device) -> Pack:
        """The same on a device; pixels stay, of which `Policy` moves what this process looks at."""
        moved = {k: v.to(device) for k, v in self.__dict__.items() if k != "pixels"}
        return replace(self, **moved)


def packs(
    documents: Sequence[Document], most_tokens: int, most_documents: int | None
) -> Iterator[list[Document]]:
    """Neighbouring documents, as many as fit.

    Raises:
        DataError: A document alone is longer than a row.
    """
    row: list[Document] = []
    for document in documents:
        if len(document) > most_tokens:
            raise DataError(
                f"a document has {len(document)} tokens and pack_tokens is {most_tokens}; raise "
                "pack_tokens, or take shorter videos or fewer questions"
            )
        full = sum(map(len, row)) + len(document) > most_tokens or len(row) == most_documents
        if row and full:
            yield row
            row = []
        row.append(document)
    if row:
        yield row


def pack(documents: Sequence[Document], model: Any) -> Pack:
    """Lay documents into one row.

    Args:
        documents: At least one.
        model: The Qwen3-VL whose positions and vision tokens they have.
    """
    parts: list[tuple[Tensor, ...]] = []
    responses = 0
    for number, document in enumerate(documents):
        positions_3P = _trunk_positions(document, model)
        trunk = _part(list(document.trunk_ids), positions_3P, number, 0, -1, 0)
        parts.append(_with_said(trunk, document.said, responses))
        responses += len(document.said)
        first = int(positions_3P.max()) + 1
        for branch_number, branch in enumerate(document.branches, start=1):
            positions_3L = (first + torch.arange(len(branch.ids))).expand(3, -1)
            where = (number, branch_number, responses)
            parts.append(_part(list(branch.ids), positions_3L, *where, branch.said))
            responses += 1
    ids, positions, document_T, branch_T, labels, response = zip(*parts, strict=True)
    pixels, grid_thw = _pixels([m for document in documents for m in document.media])
    return Pack(
        torch.cat(ids), torch.cat(positions, 1), torch.cat(document_T), torch.cat(branch_T),
        torch.cat(labels), torch.cat(response), pixels, grid_thw,
    )  # fmt: skip


def _trunk_positions(document: Document, model: Any) -> Tensor:
    config, ids_1P = model.config, torch.tensor([document.trunk_ids])
    kinds_1P = (ids_1P == config.image_token_id).int() + 2 * (ids_1P == config.video_token_id).int()
    grids = {kind: [m.grid_thw for m in document.media if m.kind == kind]
             for kind in ("image", "video")}  # fmt: skip
    told = {f"{kind}_grid_thw": torch.stack(found) for kind, found in grids.items() if found}
    positions_31P: Tensor
    positions_31P, _ = model.model.get_rope_index(ids_1P, mm_token_type_ids=kinds_1P, **told)
    return positions_31P[:, 0]


def _pixels(media: Sequence[Medium]) -> tuple[Tensor, Tensor]:
    """Patches of all media one after another, and their grids `[n,3]`; both empty without media."""
    if not media:
        return torch.zeros(0, 0), torch.zeros(0, 3, dtype=torch.long)
    return torch.cat([m.pixels for m in media]), torch.stack([m.grid_thw for m in media])


def _with_said(
    trunk: tuple[Tensor, ...], said: Sequence[tuple[int, int]], first: int
) -> tuple[Tensor, ...]:
    """A trunk whose words are learnt, each stretch of them under a number of its own."""
    ids_P, positions_3P, document_P, branch_P, labels_P, response_P = trunk
    for number, (start, stop) in enumerate(said, start=first):
        labels_P[start - 1 : stop - 1] = ids_P[start:stop]
        response_P[start - 1 : stop - 1] = number
    return ids_P, positions_3P, document_P, branch_P, labels_P, response_P


def _part(
    ids: list[int], positions_3L: Tensor, document: int, branch: int, response: int, said: int
) -> tuple[Tensor, ...]:
    ids_L = torch.tensor(ids)
    labels_L = torch.full_like(ids_L, IGNORE)
    if said:
        labels_L[-said - 1 : -1] = ids_L[-said:]
    same = (torch.full_like(ids_L, value) for value in (document, branch))
    return ids_L, positions_3L, *same, labels_L, torch.full_like(ids_L, response)
