"""What training asks of an environment: a question is begun, and every step is the policy's words.

The form is that of Gymnasium's `reset` and `step`; the harness implements it with the agent's loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from internvideo3.model.session import Session


@dataclass(frozen=True, kw_only=True)
class Task:
    """A question about a video, and what is needed to score its answer."""

    video: Path
    question: str
    """With its options, as a user writes it."""
    benchmark: str
    """By whose rules the answer is scored."""
    doc: Mapping[str, Any]
    """The question's fields as the scorer reads them."""
    part: tuple[float, float] | None = None
    """The part of the video that it is about, in seconds; None for all of it."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the policy is given before it speaks."""

    ids: tuple[int, ...]
    """Tokens since its last words, vision tokens included; none of them is learnt."""
    text: str
    """What they say, without vision tokens."""
    anew: bool
    """Whether the context begins with these tokens: at a reset, or since a long one was shortened;
    what was said before is then not in it, and is learnt apart."""
    session: Session | None
    """The whole context, on a fork in which the policy is about to speak; None at the end."""


class Step(NamedTuple):
    """What came of the policy's words."""

    observation: Observation
    reward: float
    """Of the answer, 0 to 1, by the benchmark's rule; 0 before the end."""
    done: bool
    info: Mapping[str, Any]
    """`ids`: the words as they count, cut at the budget; at the end also `trace` and `score`."""


class Environment(Protocol):
    """A question at a time."""

    def reset(self, task: Task) -> Observation:
        """Begins a question."""
        ...

    def step(self, said: str | Sequence[int]) -> Step:
        """Takes the policy's words: their ids as it sampled them, or text."""
        ...
