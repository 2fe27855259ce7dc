"""On-policy distillation (section 3.3.4): a teacher judges every token that the student wrote.

The student samples responses; on them the full-vocabulary reverse KL towards the teacher is
minimised, a chunk of logits at a time, 1/T of each response's tokens as in eq. 8. (Eq. 8
differentiated as it stands has no useful gradient: see `objectives/distillation.py`.)

Letters: N response tokens of a row, C those of a chunk, W text width, X the teacher's,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from internvideo3.training.documents import Document, Source
from internvideo3.training.loop import Stage, Totals, Work, own_indices
from internvideo3.training.objectives.distillation import full_kl
from internvideo3.training.objectives.linear_cross_entropy import IGNORE
from internvideo3.training.packing import pack, packs
from internvideo3.training.policy import Policy, barred_logits
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Opd, RecipeError
from internvideo3.training.rollouts import answered
from internvideo3.training.stages.gspo import SamplerOf


class OpdStage(Stage):
    """Reverse KL to a teacher on the student's own responses."""

    def __init__(
        self,
        options: Opd,
        documents: Source,
        teacher: Policy,
        sampler_of: SamplerOf,
        seed: int,
        group: Processes,
    ) -> None:
        self.options = options
        self.documents = documents
        self.teacher = teacher.requires_grad_(False)
        self.sampler_of = sampler_of
        self.seed = seed
        self.group = group

    def works(self, step: int, policy: Policy) -> tuple[list[Work], Totals]:
        """Sample; let the teacher read; rows of prompts with their responses."""
        sampler = self.sampler_of(policy)
        documents: list[Document] = []
        lengths: list[int] = []
        for index in own_indices(self.options, step, self.group):
            prompt = self.documents.prompt(index)
            seed = self.seed * 1_000_003 + index
            responses = sampler.sample(prompt, self.options.group, seed)
            documents.append(answered(prompt, responses, self.documents.prompter))
            lengths += [len(one.ids) for one in responses]
        rows = packs(documents, self.options.pack_tokens, self.options.micro_documents)
        works = [self._work(row, policy, sampler.barred) for row in rows]
        return works, {"response_tokens": (sum(lengths), len(lengths))}

    def _work(self, row: list[Document], policy: Policy, barred: tuple[int, ...]) -> Work:
        laid = pack(row, policy.model)
        laid = laid.to(self.group.device)
        taught: list[Tensor] = []

        def keep(hidden_NX: Tensor, head_VX: Tensor) -> Tensor:
            taught.extend((hidden_NX, head_VX))
            return hidden_NX.new_zeros(())

        with torch.no_grad():
            self.teacher(laid, keep)
        hidden_NX, head_VX = taught
        told = laid.labels_T != IGNORE
        responses = self.options.documents * self.options.group
        weight_N = 1.0 / (laid.said_lengths()[laid.response_T[told]] * responses)

        def some(s_CW: Tensor, head_VW: Tensor, t_CX: Tensor, weight_C: Tensor) -> Tensor:
            return full_kl(
                barred_logits(functional.linear(s_CW, head_VW).float(), barred),
                barred_logits(functional.linear(t_CX, head_VX).float(), barred),
                weight_C,
            )

        def loss(hidden_NW: Tensor, head_VW: Tensor) -> Tensor:
            size = self.options.chunk
            cut = zip(hidden_NW.split(size), hidden_NX.split(size), weight_N.split(size),
                      strict=True)  # fmt: skip
            parts = [
                checkpoint(some, s_CW, head_VW, t_CX, weight_C, use_reentrant=False)
                for s_CW, t_CX, weight_C in cut
            ]
            return torch.stack(parts).sum()

        return Work(laid, loss)


def check_teacher(student_processor: Any, teacher_processor: Any) -> None:
    """Make sure that a token id means the same to both.

    Raises:
        RecipeError: It does not.
    """
    ours = student_processor.tokenizer.get_vocab()
    theirs = teacher_processor.tokenizer.get_vocab()
    if ours == theirs:
        return
    differing = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    shown = ", ".join(
        f"{token!r} is {ours.get(token)} here and {theirs.get(token)} there"
        for token in differing[:3]
    )
    raise RecipeError(
        f"the teacher has other token ids ({len(differing)} differ: {shown}). Distillation over "
        "the vocabulary needs a teacher with the student's tokenizer."
    )
