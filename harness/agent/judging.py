"""How strongly the model holds an answer: likelihoods, taken on forks, so that nothing is said.

Axes: Y vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from internvideo3.harness.agent.context import END, Context, Span
from internvideo3.model.session import Session

_OPTION = re.compile(r"^\s*([A-Z])[.):]\s+(\S.*?)\s*$", re.MULTILINE)


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
    span: Span
    """The part of the video that was looked at last."""
    evidence: str
    """The entry of that look."""


def options_of(question: str) -> tuple[str, ...]:
    """The texts of lettered options in a question, if at least two stand in order."""
    found = _OPTION.findall(question)
    in_order = [letter for letter, _ in found] == list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(found)])
    return tuple(text for _, text in found) if in_order and len(found) > 1 else ()


def shares(context: Context, ahead: Session, options: Sequence[str]) -> tuple[list[float], int]:
    """Probability of each option as the reply, and how many tokens were weighed.

    An option may be given by its letter or by its text; both count for it.
    """
    end = context.quoter.control(END)
    forms = [
        [letter, text] for letter, text in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options, strict=False)
    ]
    logs, weighed = [], 0
    for both in forms:
        each = [context.quoter.quote(form) + end for form in dict.fromkeys(both)]
        logs.append(_log_sum([weigh(ahead, ids) for ids in each]))
        weighed += sum(len(ids) for ids in each)
    total = _log_sum(logs)
    return [round(math.exp(one - total), 4) for one in logs], weighed


def weigh(ahead: Session, ids: Sequence[int]) -> float:
    """Log-probability of ids as what follows."""
    fork, log = ahead.fork(), 0.0
    for number, token in enumerate(ids, 1):
        log += float(torch.log_softmax(fork.logits_last.float(), -1)[token])
        if number < len(ids):
            fork.append_ids([token])
    return log


def _log_sum(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + math.log(sum(math.exp(one - top) for one in logs))
