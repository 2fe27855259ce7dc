"""How strongly the model holds an answer: likelihoods, taken on forks, so that nothing is said.

Axes: Y vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from internvideo3.harness.agent.context import END, Context, Span
from internvideo3.harness.agent.question import LETTERS
from internvideo3.model.session import Session

NEGLIGIBLE = 7.0
"""Difference of log-probabilities from which a way to say it counts for nothing: e^-7 is 0.001."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the model holds at one turn."""

    turn: int
    said: str
    """Its words."""
    answer: str
    """The likeliest option, or its words where there are no options."""
    support: float
    """Probability of the answer among the options; without options, the geometric mean of its
    tokens' probabilities."""
    shares: tuple[float, ...]
    """Probability of each option, empty without options."""
    options: tuple[str, ...]
    """Their texts."""
    wordings: tuple[str, ...]
    """How the model would give each option, e.g. by its letter; without options, its words."""
    span: Span
    """The part of the video that was looked at last."""
    evidence: str
    """The entry of that look."""
    alone: bool = False
    """Whether the model saw the evidence only, not the context."""

    def share(self, answer: str) -> float:
        """Support of an answer, which need not be the likeliest."""
        if answer == self.answer:
            return self.support
        return dict(zip(self.options, self.shares, strict=True)).get(answer, 0.0)


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """How likely each option is as the reply."""

    shares: tuple[float, ...]
    """Probability of each; they sum to 1."""
    wordings: tuple[str, ...]
    """The likeliest way to give each."""
    tokens: int
    """How many tokens were weighed."""

    @property
    def best(self) -> int:
        """Place of the likeliest option."""
        return max(range(len(self.shares)), key=lambda i: self.shares[i])


def shares(context: Context, ahead: Session, options: Sequence[str]) -> Weighed:
    """Probability of each option as the reply.

    An option may be given by its letter or by its text, with a space before it or without; all
    count for it. Where the likely ways to give different options begin with different tokens, the
    first token decides, which costs nothing: what follows it is settled. Else whole ways are
    weighed; one whose first token is far less likely than the best's is left out.

    Args:
        context: whose tokenizer and quotation rules hold.
        ahead: a session in which the model is about to speak.
        options: the texts of the answers, at least two.
    """
    first_Y = torch.log_softmax(ahead.logits_last.float(), -1)
    ways = [
        {form: context.quoter.quote(form) for form in _forms(letter, text)}
        for letter, text in zip(LETTERS, options, strict=False)
    ]
    top = max(float(first_Y[ids[0]]) for each in ways for ids in each.values())
    likely = [_likely(each, first_Y, top - NEGLIGIBLE) for each in ways]
    begins = [{ids[0] for ids in each.values()} for each in likely]
    tokens = 0
    if sum(map(len, begins)) == len(set().union(*begins)):
        weighed = [{f: float(first_Y[ids[0]]) for f, ids in each.items()} for each in likely]
        logs = [_log_sum([float(first_Y[token]) for token in sorted(each)]) for each in begins]
    else:
        end = context.quoter.control(END)
        weighed = [
            {form: ahead.log_likelihood(ids + end) for form, ids in each.items()} for each in likely
        ]
        logs = [_log_sum(list(each.values())) for each in weighed]
        tokens = sum(len(ids) + 1 for each in likely for ids in each.values())
    total = _log_sum(logs)
    return Weighed(
        shares=tuple(round(math.exp(one - total), 4) for one in logs),
        wordings=tuple(max(each, key=lambda f: each[f]).strip() for each in weighed),
        tokens=tokens,
    )


def _likely(
    ways: dict[str, list[int]], first_Y: torch.Tensor, least: float
) -> dict[str, list[int]]:
    """The ways whose first token is likely enough, or else the likeliest one."""
    found = {form: ids for form, ids in ways.items() if float(first_Y[ids[0]]) > least}
    if found:
        return found
    form = max(ways, key=lambda f: float(first_Y[ways[f][0]]))
    return {form: ways[form]}


def _forms(letter: str, text: str) -> list[str]:
    """The ways in which models give an option as their whole reply."""
    return list(dict.fromkeys([letter, f"{letter}.", f" {letter}", text, f" {text}"]))


def _log_sum(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + math.log(sum(math.exp(one - top) for one in logs))
