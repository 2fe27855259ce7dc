"""On-policy distillation (section 3.3.4): a teacher judges every token that the student wrote.

The student samples responses; on them the full-vocabulary reverse KL towards the teacher is
minimised, a chunk of logits at a time, 1/T of each response's tokens as in eq. 8. (Eq. 8
differentiated as it stands has no useful gradient: see `objectives/distillation.py`.)

A teacher behind a server says only how likely it finds the sampled ids; then the sampled form is
minimised, with its advantage detached.

Letters: N response tokens of a row, C those of a chunk, W text width, X the teacher's,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from internvideo3.training.documents import Document, Prompt, Source
from internvideo3.training.loop import (
    Stage,
    Totals,
    Work,
    by_leaders,
    check_shared,
    in_step,
    own_indices,
    together,
)
from internvideo3.training.objectives.distillation import full_kl, sampled_kl, top_k_kl
from internvideo3.training.objectives.linear_cross_entropy import IGNORE, chunk_tokens
from internvideo3.training.packing import Pack, pack, packs
from internvideo3.training.policy import Policy, logits_of, token_logps
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Opd, RecipeError
from internvideo3.training.remote import RemoteTeacher
from internvideo3.training.rollouts import Response, answered
from internvideo3.training.stages.gspo import SamplerOf, sampled


@dataclass(frozen=True)
class Asked:
    """A prompt and the student's responses, laid out for training."""

    document: Document
    prompt: Prompt
    responses: tuple[Response, ...]


class OpdStage(Stage):
    """Reverse KL to a teacher on the student's own responses."""

    def __init__(
        self,
        options: Opd,
        documents: Source,
        teacher: Policy | RemoteTeacher,
        sampler_of: SamplerOf,
        seed: int,
        group: Processes,
    ) -> None:
        self.options = options
        self.documents = documents
        self.teacher = teacher
        if isinstance(teacher, Policy):
            teacher.requires_grad_(False)
        self.sampler_of = sampler_of
        self.bfloat16 = options.bfloat16
        self.seed = seed
        self.group = group

    def works(self, step: int, policy: Policy) -> tuple[list[Work], Totals]:
        """Sample; let the teacher read; rows of prompts with their responses."""
        sampler = self.sampler_of(policy)
        indices = own_indices(self.options, step, self.group)
        prompts = together(self.group, lambda: [self.documents.prompt(i) for i in indices])
        said = by_leaders(
            self.group,
            lambda: sampled(sampler, prompts, indices, self.options.group, self.seed),
        )
        rows = together(self.group, lambda: self._rows(prompts, said))
        check_shared(self.group, [one.document for row in rows for one in row])
        works: list[Work] = []
        if isinstance(self.teacher, RemoteTeacher):
            # A server is asked about what is there; only a model in the processes needs all.
            teacher = self.teacher
            taught = by_leaders(self.group, lambda: [_judged(teacher, row) for row in rows])
            works = [
                self._remote_work(*self._laid(row, policy), judged_N, sampler.barred)
                for row, judged_N in zip(rows, taught, strict=True)
            ]
        else:
            for row, counts in in_step(self.group, rows):
                made = self._own_work(self.teacher, *self._laid(row, policy), sampler.barred)
                works += [made] if counts else []
        lengths = [len(one.ids) for row in rows for group in row for one in group.responses]
        return works, {"response_tokens": (sum(lengths), len(lengths))}

    def _rows(
        self, prompts: Sequence[Prompt], said: Sequence[Sequence[Response]]
    ) -> list[list[Asked]]:
        """Prompts with their responses, as many to a row of training as fit."""
        asked = [
            Asked(answered(prompt, responses, self.documents.prompter), prompt, tuple(responses))
            for prompt, responses in zip(prompts, said, strict=True)
        ]
        left = iter(asked)
        rows = packs(
            [one.document for one in asked], self.options.pack_tokens, self.options.micro_documents
        )
        return [list(islice(left, len(row))) for row in rows]

    def _laid(self, row: list[Asked], policy: Policy) -> tuple[Pack, Tensor]:
        """A row, and the weight of each response token."""
        laid = pack([one.document for one in row], policy.model).to(self.group.device)
        told = laid.labels_T != IGNORE
        responses = self.options.documents * self.options.group
        return laid, 1.0 / (laid.said_lengths()[laid.response_T[told]] * responses)

    def _remote_work(
        self, laid: Pack, weight_N: Tensor, judged_N: Tensor, barred: tuple[int, ...]
    ) -> Work:
        """The sampled form, from the teacher's log-probabilities of the sampled ids."""
        labels_N = laid.labels_T[laid.labels_T != IGNORE]
        taught_N = judged_N.to(weight_N)

        def loss(hidden_NW: Tensor, head_VW: Tensor) -> Tensor:
            size = self._chunk(head_VW)
            logp_N = token_logps(hidden_NW, head_VW, labels_N, barred, size)
            return sampled_kl(logp_N, taught_N, weight_N)

        return Work(laid, loss)

    def _own_work(
        self, teacher: Policy, laid: Pack, weight_N: Tensor, barred: tuple[int, ...]
    ) -> Work:
        """The divergence over the vocabulary, from a teacher in this process."""
        taught: list[Tensor] = []

        def keep(hidden_NX: Tensor, head_VX: Tensor) -> Tensor:
            taught.extend((hidden_NX, head_VX))
            return hidden_NX.new_zeros(())

        with torch.no_grad(), self.products(self.group.device):
            teacher(laid, keep)
        hidden_NX, head_VX = taught

        def some(s_CW: Tensor, head_VW: Tensor, t_CX: Tensor, weight_C: Tensor) -> Tensor:
            student_CV = logits_of(s_CW, head_VW, barred)
            teacher_CV = logits_of(t_CX, head_VX, barred)
            if self.options.top_k is None:
                return full_kl(student_CV, teacher_CV, weight_C)
            return top_k_kl(student_CV, teacher_CV, weight_C, self.options.top_k)

        def loss(hidden_NW: Tensor, head_VW: Tensor) -> Tensor:
            size = self._chunk(head_VW)
            cut = zip(hidden_NW.split(size), hidden_NX.split(size), weight_N.split(size),
                      strict=True)  # fmt: skip
            parts = [
                checkpoint(some, s_CW, head_VW, t_CX, weight_C, use_reentrant=False)
                for s_CW, t_CX, weight_C in cut
            ]
            return torch.stack(parts).sum()

        return Work(laid, loss)

    def _chunk(self, head_VW: Tensor) -> int:
        """Response tokens whose logits exist at a time."""
        return min(self.options.chunk, chunk_tokens(len(head_VW)))


def _judged(teacher: RemoteTeacher, row: list[Asked]) -> Tensor:
    """The teacher's log-probabilities of a row's sampled ids, `[N]`."""
    return torch.cat(
        [
            teacher.logps(one.prompt, [*one.document.trunk_ids, branch.ids[0]], response)
            for one in row
            for branch, response in zip(one.document.branches, one.responses, strict=True)
        ]
    )


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
