"""What kind of question it is, as a soft prior for which tool may help (section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from internvideo3.harness.agent.memory import Memory

ROUTES: Mapping[str, str] = {
    "global": "What is the video about as a whole? Summarise what happens.",
    "speech": "What does the person say? What is spoken or mentioned in the conversation?",
    "knowledge": "Who is this person, which title or name is written, what is known about it?",
    "temporal": "When does it happen, in which order, before or after, how many times?",
    "fine-grained": "What small detail, colour, object or written text is seen at one moment?",
}
"""A typical question of each kind."""
SHARPNESS = 8.0
"""Factor on the likeness before the softmax; likenesses of short texts differ by about 0.3."""


def route(question: str, memory: Memory, kind: str | None = None) -> dict[str, float]:
    """Probability of each kind by nearness in meaning; equal ones without an embedding model.

    Args:
        question: what is asked.
        memory: compares meanings.
        kind: a key of `ROUTES` that is certain, so that nothing is estimated.

    Raises:
        ValueError: there is no such kind.
    """
    if kind is not None:
        if kind not in ROUTES:
            raise ValueError(f"there is no kind of question {kind!r}. Kinds: {', '.join(ROUTES)}.")
        return {name: float(name == kind) for name in ROUTES}
    near = memory.likeness(question, list(ROUTES.values()))
    if memory.by_words:
        return {name: round(1 / len(ROUTES), 4) for name in ROUTES}
    weights = [math.exp(SHARPNESS * one) for one in near]
    return {
        name: round(weight / sum(weights), 4) for name, weight in zip(ROUTES, weights, strict=True)
    }
