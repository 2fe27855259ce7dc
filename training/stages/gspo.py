"""Rule-based reinforcement learning (section 3.3.3): groups of responses, scored by rule.

One step: for each of its prompts the policy samples a group of responses; a rule scores them; the
rewards are normalised within the group; a few updates of the clipped sequence objective follow,
with a KL term towards the model that the stage began from. The ratios that are clipped are between
passes of training, which differ by what was learnt alone; how far the sampler's numbers are from
training's is a weight of its own.

Letters: R responses of a row, T tokens of the longest one, N response tokens of a row, W text
width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import pstdev
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from internvideo3.tasks.scoring.entry import score
from internvideo3.training.documents import SCORED_AS, Document, Prompt, Source
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
from internvideo3.training.objectives.gspo import (
    GspoOptions,
    group_advantages,
    gspo_loss,
    sampler_weights,
)
from internvideo3.training.objectives.linear_cross_entropy import IGNORE
from internvideo3.training.packing import pack, packs
from internvideo3.training.policy import Policy, token_logps
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Gspo
from internvideo3.training.rollouts import Response, Samples, answered

SamplerOf = Callable[[Policy], Samples]
"""Makes a sampler of the policy's present weights."""
WATCHED = ("kl", "clipped_share", "ratio")
"""Of `GspoLoss`, means over responses, beside the loss in the metrics."""


@dataclass(frozen=True)
class Group:
    """A prompt's responses, laid out for training, and what they earned."""

    document: Document
    responses: tuple[Response, ...]
    rewards: tuple[float, ...]


class GspoStage(Stage):
    """Group sequence policy optimisation."""

    def __init__(
        self,
        options: Gspo,
        documents: Source,
        reference: Policy,
        sampler_of: SamplerOf,
        seed: int,
        group: Processes,
    ) -> None:
        self.options = options
        self.documents = documents
        self.reference = reference.requires_grad_(False)
        self.sampler_of = sampler_of
        self.seed = seed
        self.group = group
        self.updates = options.updates
        self.bfloat16 = options.bfloat16
        self._watched: dict[int, tuple[int, dict[str, Tensor]]] = {}
        """Row of the step → its responses, and what became of them when it was last passed."""

    def works(self, step: int, policy: Policy) -> tuple[list[Work], Totals]:
        """Sample, score, normalise; then rows of whole groups."""
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
        self._watched = {}
        for number, (row, counts) in enumerate(in_step(self.group, rows)):
            made = self._work(number, row, policy, sampler.barred)
            works += [made] if counts else []
        return works, _noted([one for row in rows for one in row])

    def _rows(
        self, prompts: Sequence[Prompt], said: Sequence[Sequence[Response]]
    ) -> list[list[Group]]:
        """Groups of responses, as many to a row of training as fit."""
        groups = [self._scored(*one) for one in zip(prompts, said, strict=True)]
        left = iter(groups)
        rows = packs(
            [one.document for one in groups],
            self.options.pack_tokens,
            self.options.micro_documents,
        )
        return [list(islice(left, len(row))) for row in rows]

    def noted(self) -> Totals:
        """How far the step's last update found the policy from where it sampled and began."""
        rows = self._watched.values()
        responses = sum(count for count, _ in rows)
        return {
            name: (sum(count * float(seen[name]) for count, seen in rows), responses)
            for name in (*WATCHED, "sampler_gap")
        }

    def _scored(self, prompt: Prompt, responses: Sequence[Response]) -> Group:
        rewards = tuple(reward(prompt, one) for one in responses)
        document = answered(prompt, responses, self.documents.prompter)
        return Group(document, tuple(responses), rewards)

    def _work(self, row: int, groups: list[Group], policy: Policy, barred: tuple[int, ...]) -> Work:
        laid = pack([g.document for g in groups], policy.model)
        laid = laid.to(self.group.device)
        labels_N = laid.labels_T[laid.labels_T != IGNORE]
        lengths_R = laid.said_lengths()

        def logps(hidden_NW: Tensor, head_VW: Tensor) -> Tensor:
            return token_logps(hidden_NW, head_VW, labels_N, barred)

        with torch.no_grad(), self.products(self.group.device):
            reference_RT = _by_response(self.reference(laid, logps), lengths_R)
        rollout_RT = pad_sequence(
            [torch.tensor(one.logps) for g in groups for one in g.responses], batch_first=True
        ).to(reference_RT)
        reward_R = torch.tensor([r for g in groups for r in g.rewards]).to(reference_RT)
        group_R = torch.arange(len(groups), device=reward_R.device)
        group_R = group_R.repeat_interleave(self.options.group)
        advantage_R = group_advantages(reward_R, group_R)
        said_RT = torch.arange(rollout_RT.shape[1], device=reward_R.device) < lengths_R[:, None]
        # The objective is a mean over the row's responses; the step's is one over all of them.
        share = len(reward_R) / (self.options.documents * self.options.group)
        objective = self._objective()
        before: list[Tensor] = []

        def loss(hidden_NW: Tensor, head_VW: Tensor) -> Tensor:
            logp_RT = _by_response(logps(hidden_NW, head_VW), lengths_R)
            if not before:  # the step's first update is under way: no weight has moved yet
                before.append(logp_RT.detach())
            (old_RT,) = before
            weight_R, gap_R = sampler_weights(old_RT, rollout_RT, said_RT, self.options.gap_cap)
            made = gspo_loss(
                logp_RT, old_RT, reference_RT, said_RT, weight_R * advantage_R, objective
            )
            seen = {name: getattr(made, name) for name in WATCHED} | {"sampler_gap": gap_R.mean()}
            # By row, so that one that is passed again for other processes' sake counts once.
            self._watched[row] = len(reward_R), seen
            return made.loss * share

        return Work(laid, loss)

    def _objective(self) -> GspoOptions:
        options = self.options
        return GspoOptions(
            clip_low=options.clip_low, clip_high=options.clip_high, kl_weight=options.kl_weight
        )


def sampled(
    sampler: Samples, prompts: Sequence[Prompt], indices: Iterable[int], count: int, seed: int
) -> list[list[Response]]:
    """So many responses to each prompt; the seed and a prompt's index decide them."""
    return [
        sampler.sample(prompt, count, seed * 1_000_003 + index)
        for prompt, index in zip(prompts, indices, strict=True)
    ]


def reward(prompt: Prompt, response: Response) -> float:
    """What a response earns: right or wrong, or the IoU of its span, by the rule `plain`.

    An answer that a benchmark's rule would drop earns nothing.
    """
    made = score(prompt.benchmark or SCORED_AS, prompt.doc, response.text, rule="plain")
    return made.value or 0.0


def _by_response(value_N: Tensor, lengths_R: Tensor) -> Tensor:
    """Values of all response tokens as rows `[R,T]`, 0 behind a response's end."""
    rows: Any = value_N.split(lengths_R.tolist())
    return pad_sequence(list(rows), batch_first=True)


def _noted(groups: list[Group]) -> Totals:
    rewards = [r for one in groups for r in one.rewards]
    mixed = [len(set(one.rewards)) > 1 for one in groups]
    spreads = [pstdev(one.rewards) for one in groups]
    lengths = [len(one.ids) for g in groups for one in g.responses]
    return {
        "reward": (sum(rewards), len(rewards)),
        "reward_spread": (sum(spreads), len(spreads)),
        "mixed_groups": (sum(mixed), len(mixed)),
        "response_tokens": (sum(lengths), len(lengths)),
    }
