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
    """Probability of the hypothesis, 0 to 1, see `tally`."""
    rival: str
    """The answer next to it, empty if there is none."""
    rival_support: float
    conflicts: tuple[Span, ...]
    """Parts of the video whose look gave another answer."""
    candidates: tuple[Span, ...]
    """Parts to look at next, best first."""
    evidence: tuple[str, ...]
    """Entries of the looks that spoke for the hypothesis, strongest first."""

    def told(self) -> str:
        """The belief in words."""
        unsure = f" or {self.rival} ({self.rival_support:.2f})" if self.rival else ""
        ahead = ", ".join(f"{a:g}-{b:g} s" for a, b in self.candidates[:3])
        return f"Belief: {self.hypothesis} ({self.support:.2f}){unsure}." + (
            f" To see: {ahead}." if ahead else ""
        )


def tally(judgements: Sequence[Judgement], options: Sequence[str]) -> list[tuple[str, float]]:
    """Support of every answer, best first; the first option wins a tie.

    The context only grows: the last judgement within it has seen all that earlier ones had, and
    replaces them. Beside it counts, with equal weight, the last one from the evidence alone.
    """
    total: dict[str, float] = dict.fromkeys(options, 0.0)
    counted = [
        found[-1]
        for alone in (False, True)
        if (found := [one for one in judgements if one.alone == alone])
    ]
    for one in counted:
        shares = dict(zip(options, one.shares, strict=False)) or {one.answer: one.support}
        for answer, share in shares.items():
            total[answer] = total.get(answer, 0.0) + share
    mean = [(answer, round(x / max(1, len(counted)), 4)) for answer, x in total.items()]
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
    looks = [one for one in judgements if not one.alone]
    return Belief(
        turn=turn,
        hypothesis=hypothesis,
        support=support,
        rival=rival,
        rival_support=rival_support,
        conflicts=tuple(one.span for one in looks if one.answer != hypothesis),
        candidates=tuple(candidates),
        evidence=_evidence(looks, hypothesis),
    )


def _evidence(looks: Sequence[Judgement], hypothesis: str) -> tuple[str, ...]:
    """Entries of the looks after which the hypothesis was held more than before, most first."""
    gains: dict[str, float] = {}
    before = 0.0
    for one in looks:
        held = one.share(hypothesis)
        gains[one.evidence] = max(gains.get(one.evidence, 0.0), held - before)
        before = held
    ranked = sorted((e for e in gains if gains[e] > 0), key=lambda e: -gains[e])
    return tuple(ranked or [looks[-1].evidence])[:MOST_EVIDENCE]
