"""The belief state: a hypothesis, what is uncertain, where to look, and what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from internvideo3.harness.agent.context import Span
from internvideo3.harness.agent.judging import Judgement

MOST_EVIDENCE = 3


@dataclass(frozen=True, kw_only=True)
class Belief:
    """What is held after a turn."""

    turn: int
    hypothesis: str
    support: float
    """Mean probability of the hypothesis over all looks, 0 to 1."""
    rival: str
    """The answer next to it, empty if there is none."""
    rival_support: float
    conflicts: tuple[Span, ...]
    """Parts of the video whose look gave another answer."""
    candidates: tuple[Span, ...]
    """Parts to look at next, best first."""
    evidence: tuple[str, ...]
    """Entries of the looks that gave the hypothesis, strongest first."""

    def told(self) -> str:
        """The belief in words."""
        unsure = f" or {self.rival} ({self.rival_support:.2f})" if self.rival else ""
        ahead = ", ".join(f"{a:g}-{b:g} s" for a, b in self.candidates[:3])
        return f"Belief: {self.hypothesis} ({self.support:.2f}){unsure}." + (
            f" To see: {ahead}." if ahead else ""
        )


def tally(judgements: Sequence[Judgement], options: Sequence[str]) -> list[tuple[str, float]]:
    """Mean support of every answer over all looks, best first; the first option wins a tie."""
    total: dict[str, float] = dict.fromkeys(options, 0.0)
    for one in judgements:
        shares = dict(zip(options, one.shares, strict=False)) or {one.answer: one.support}
        for answer, share in shares.items():
            total[answer] = total.get(answer, 0.0) + share
    mean = [(answer, round(x / max(1, len(judgements)), 4)) for answer, x in total.items()]
    return sorted(mean, key=lambda pair: -pair[1])


def believe(
    turn: int,
    judgements: Sequence[Judgement],
    options: Sequence[str],
    candidates: Sequence[Span] = (),
) -> Belief:
    """The belief that follows from all looks so far.

    Args:
        turn: when it is held.
        judgements: what the model held after each look; at least one.
        options: the answers there are, none for a free one.
        candidates: parts of the video to look at next.
    """
    (hypothesis, support), *rest = tally(judgements, options)
    rival, rival_support = rest[0] if rest else ("", 0.0)
    agreeing = [one for one in judgements if one.answer == hypothesis]
    strongest = sorted(agreeing, key=lambda one: -one.support)
    return Belief(
        turn=turn,
        hypothesis=hypothesis,
        support=support,
        rival=rival,
        rival_support=rival_support,
        conflicts=tuple(one.span for one in judgements if one.answer != hypothesis),
        candidates=tuple(candidates),
        evidence=tuple(dict.fromkeys(one.evidence for one in strongest))[:MOST_EVIDENCE],
    )
