"""Supervised fine-tuning (section 3.3.2): short videos first, then long ones.

The curriculum is a recipe with two stages of this kind: `sft_short`, then `sft_long`. Each answer
weighs 1/sqrt of its tokens, over all documents of a step, however they are divided among passes and
processes. The released SFT (OpenGVLab/InternVideo@3965eef) has this weight by sample: there the
replies of a conversation are one answer and together weigh the square root of all their tokens.
Here each reply is one, so that a question weighs the same alone and as one of several about a
video; of rows with one reply both are the same.

Letters: N supervised tokens, W text width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from internvideo3.training.documents import Document, Source
from internvideo3.training.loop import Stage, Totals, Work, check_shared, own_indices, together
from internvideo3.training.objectives.linear_cross_entropy import IGNORE, linear_cross_entropy
from internvideo3.training.packing import Pack, pack, packs
from internvideo3.training.policy import Policy
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Sft, StageOptions


class SftStage(Stage):
    """Cross-entropy on right answers."""

    def __init__(self, options: Sft, documents: Source, group: Processes) -> None:
        self.options = options
        self.documents = documents
        self.group = group
        self.bfloat16 = options.bfloat16

    def works(self, step: int, policy: Policy) -> tuple[list[Work], Totals]:
        """The documents of the step in rows, each answer token with its weight."""
        indices = own_indices(self.options, step, self.group)
        taught = together(self.group, lambda: [self.documents.taught(i) for i in indices])
        works = supervised_works(taught, self.options, policy, self.group)
        answers = sum(len(one.branches) + len(one.said) for one in taught)
        return works, {"answers": (answers, 0.0), "documents": (len(taught), 0.0)}


def supervised_works(
    taught: Sequence[Document], options: StageOptions, policy: Policy, group: Processes
) -> list[Work]:
    """Passes whose losses sum to the weighted mean over the answer tokens of all processes."""
    # Before the processes add up: one whose document is too long would leave the others waiting.
    rows = together(
        group, lambda: list(packs(taught, options.pack_tokens, options.micro_documents))
    )
    check_shared(group, taught)
    laid = [pack(row, policy.model) for row in rows]
    weights = [_answer_weights(one) for one in laid]
    mine = torch.tensor([sum(float(w.double().sum()) for w in weights)], dtype=torch.float64)
    total = float(group.total(mine.to(group.device)))
    return [Work(p, _loss(p, w / total)) for p, w in zip(laid, weights, strict=True)]


def _answer_weights(laid: Pack) -> Tensor:
    """1/sqrt(tokens of the answer) at each supervised token, `[N]`.

    The weight of the released SFT's `loss_reduction="square"`, by answer where that has it by
    sample. It is between a mean over tokens, where long answers drown short ones, and one over
    answers.
    """
    told = laid.labels_T != IGNORE
    return laid.said_lengths()[laid.response_T[told]].float().rsqrt()


def _loss(laid: Pack, weight_N: Tensor) -> Any:
    labels_N = laid.labels_T[laid.labels_T != IGNORE]

    def loss(hidden_NW: Tensor, head_VW: Tensor) -> Tensor:
        device = hidden_NW.device
        return linear_cross_entropy(hidden_NW, head_VW, labels_N.to(device), weight_N.to(device))

    return loss
