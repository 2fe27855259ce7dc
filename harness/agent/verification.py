"""Recursive verification: a claim must point to evidence that exists and is of its time (3.4).

Code checks what code can: that the cited entries are there, can show something, and overlap the
claim in time. Whether they support it, the model says: by the probability that it gives the answer
when it is shown the closer looks and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from internvideo3.harness.agent.actions import Claim
from internvideo3.harness.agent.context import Context, Control, Entry, Kind, Quoted
from internvideo3.harness.agent.judging import Weighed, shares
from internvideo3.harness.agent.memory import overlap_s
from internvideo3.harness.agent.question import gist
from internvideo3.harness.settings import SYSTEM_PROMPT
from internvideo3.model.session import Session
from internvideo3.tasks.video import Frames, joined

SHOWING = (Kind.OBSERVATION, Kind.FEEDBACK, Kind.MEMORY)
"""Entries that can be evidence: what the world said, never what the model said."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one claim."""

    claim: str
    ok: bool
    evidence: tuple[str, ...]
    """The cited entries that hold."""
    problems: tuple[str, ...]
    """What is wrong with the others, or with the claim."""
    support: float | None = None
    """Probability that the model gives the claim from the evidence alone; None: not asked."""


def check(claims: Sequence[Claim], context: Context) -> list[Check]:
    """Checks that each claim's evidence exists and overlaps it in time."""
    return [_check(claim, context) for claim in claims]


def _check(claim: Claim, context: Context) -> Check:
    judged = {cited: _problem(claim, cited, context.find(cited)) for cited in claim.evidence}
    holding = tuple(cited for cited, problem in judged.items() if not problem)
    problems = tuple(problem for problem in judged.values() if problem)
    if not claim.evidence:
        problems = ("it cites no evidence; name entries such as e2",)
    if not any(map(str.isalnum, claim.text)):
        # A model that has nothing to say must not have said it with evidence.
        problems = ("it says nothing; give an answer",)
    return Check(
        claim=claim.text, ok=bool(holding) and not problems, evidence=holding, problems=problems
    )


def _problem(claim: Claim, cited: str, entry: Entry | None) -> str:
    if entry is None:
        return f"there is no entry {cited}"
    if entry.kind not in SHOWING or entry.data.get("ok") is False:
        return f"{cited} is no evidence: it is {entry.kind} and shows nothing of the video"
    if claim.start_s is None and claim.end_s is None:
        return ""
    if entry.span is None:
        return f"{cited} has no time, and the claim has"
    start_s, end_s = claim.start_s or 0.0, claim.end_s
    span = (start_s, end_s if end_s is not None else entry.span[1])
    if overlap_s(span, entry.span) <= 0:
        return f"{cited} shows {entry.span[0]:g}-{entry.span[1]:g} s, the claim is of another time"
    return ""


def weigh_alone(
    context: Context,
    looks: Sequence[Frames],
    question: str,
    options: Sequence[str],
) -> tuple[Weighed, int]:
    """How likely each option is for a model that sees these looks only, and the tokens it took.

    It is not told of tools, which would cost more than the looks.

    Args:
        context: the rollout's, which is not touched.
        looks: frames of the cited evidence.
        question: with its options.
        options: their texts.
    """
    alone = evidence_alone(context, looks, question)
    weighed = shares(alone, alone.ahead(), options)
    return weighed, len(alone) + weighed.tokens


def evidence_alone(context: Context, looks: Sequence[Frames], question: str) -> Context:
    """A context of these looks and the question, and of nothing else."""
    of = context.session
    session = Session(
        of.model, of.processor, features=of.features, media_options={"do_resize": False}
    )
    alone = Context(session)
    alone.add(Kind.INSTRUCTION, "system", [Control(SYSTEM_PROMPT)], role="system")
    for look in joined(looks):
        alone.add(Kind.OBSERVATION, "frames", [look])
    alone.add(Kind.INSTRUCTION, "user", [Quoted(gist(question), whole=True)])
    return alone


def told(checks: Sequence[Check]) -> str:
    """The outcome in words, for the policy to read."""
    lines = [
        f"{'supported' if one.ok else 'not supported'}: {one.claim}"
        + "".join(f"; {problem}" for problem in one.problems)
        for one in checks
    ]
    return "\n".join(lines)
