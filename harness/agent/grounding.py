"""Where in a video something is: the model asked about ever shorter parts, and what memory has.

The model says of each part, shown alone, how likely the thing is seen there; the likeliest parts
are cut and asked about again. Remembered speech, text and scenes that are near to the query in
meaning raise the parts that they lie in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from internvideo3.harness.agent.context import Context, Span
from internvideo3.harness.agent.memory import Memory, overlap_s
from internvideo3.harness.agent.perception import Eye
from internvideo3.harness.agent.verification import weigh_alone

PARTS = 8
"""Parts of the first round; later rounds cut a part in two."""
KEPT = 2
"""Parts that a round hands on."""
ROUNDS = 3
SHORTEST_S = 2.0
"""Parts are not cut below this."""
QUESTION = "Is this seen here: {query}?\nA. yes\nB. no\nAnswer with the text of one option."
OPTIONS = ("yes", "no")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A part of the video that may show what was asked for."""

    span: Span
    score: float
    """The model's probability, raised by what memory has there; 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Grounded:
    """What a search came to."""

    parts: tuple[Found, ...]
    """Likeliest first; at most `KEPT`."""
    tokens: int
    """How many it took."""


def ground(
    query: str, within: Span, eye: Eye, context: Context, memory: Memory, most_tokens: int
) -> Grounded:
    """Search a part of the video, coarse to fine.

    Args:
        query: what is looked for.
        within: the part.
        eye: looks at the video.
        context: the rollout's; it is not touched.
        memory: what is remembered of the video.
        most_tokens: where the search ends.

    Raises:
        VideoError: the video cannot be read.
    """
    near, question = _remembered(query, within, memory), QUESTION.format(query=query)
    parts, tokens, best = _cut([within], PARTS), 0, list[Found]()
    for number in range(ROUNDS):
        asked: list[Found] = []
        for span in parts:
            if tokens >= most_tokens:
                break
            try:
                look = eye.again(span, max(0.5, 8 / (span[1] - span[0])))
            except ValueError:
                continue  # too short to be seen
            weighed, spent = weigh_alone(context, [look], question, OPTIONS)
            tokens += spent
            share = weighed.shares[0] + _raised(span, near)
            asked.append(Found(span=span, score=round(min(1.0, share), 4)))
        best = sorted(asked, key=lambda one: (-one.score, one.span))[:KEPT] or best
        spans = [one.span for one in best if one.span[1] - one.span[0] >= 2 * SHORTEST_S]
        if not spans or number == ROUNDS - 1:
            break
        parts = _cut(spans, 2)
    return Grounded(parts=tuple(best), tokens=tokens)


def _cut(spans: Sequence[Span], count: int) -> list[Span]:
    cut: list[Span] = []
    for start_s, end_s in spans:
        fit = max(1, min(count, int((end_s - start_s) / SHORTEST_S)))
        step_s = (end_s - start_s) / fit
        edges = [round(start_s + i * step_s, 3) for i in range(fit)] + [round(end_s, 3)]
        cut += list(zip(edges, edges[1:], strict=False))
    return cut


def _remembered(query: str, within: Span, memory: Memory) -> list[tuple[Span, float]]:
    near = memory.read(query, within, 5)
    return [(item.span, likeness) for item, likeness in near if item.level != "story"]


def _raised(span: Span, near: Sequence[tuple[Span, float]]) -> float:
    """Likeness of the nearest remembered thing in a part, 0 without any."""
    return max((max(0.0, x) for where, x in near if overlap_s(where, span) >= 0), default=0.0)
