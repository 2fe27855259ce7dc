"""What was found out about a video, read by time and by meaning (section 3.4 of the paper).

Axes: N items, X vector width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from internvideo3.harness.agent.context import Span
from internvideo3.harness.agent.tools.catalogue import EMBEDDING
from internvideo3.harness.agent.tools.desk import Desk


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing remembered."""

    text: str
    span: Span
    """The part of the video that it is about, in seconds."""
    level: str
    """caption, scene, speech, text, story, or note."""
    evidence: str = ""
    """The context entry that it comes from."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a video before a question about it."""

    items: tuple[Item, ...] = ()
    faults: tuple[str, ...] = ()
    """What could not be found out, and why."""


def overlap_s(one: Span, other: Span) -> float:
    """Seconds that two parts share, negative for those between them."""
    return min(one[1], other[1]) - max(one[0], other[0])


@dataclass
class Memory:
    """Items in order of writing.

    Meaning is compared by embedding, or by shared words where no embedding model is installed.
    """

    desk: Desk
    items: list[Item] = field(default_factory=list)
    by_words: str = ""
    """Why meaning is compared by words only, if so."""
    _vectors: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def write(self, items: Sequence[Item]) -> None:
        """Adds items; an equal one is not added twice."""
        self.items += [item for item in dict.fromkeys(items) if item not in self.items]

    def read(self, query: str, within: Span, limit: int) -> list[tuple[Item, float]]:
        """The items nearest to a query in a part of the video, with their likeness, best first.

        Args:
            query: what is looked for; empty for all, in order of time.
            within: the part.
            limit: most items.
        """
        there = [item for item in self.items if overlap_s(item.span, within) >= 0]
        if not query:
            there.sort(key=lambda item: item.span)
            return [(item, 0.0) for item in there[:limit]]
        likeness_N = self.likeness(query, [item.text for item in there])
        order = sorted(range(len(there)), key=lambda i: (-likeness_N[i], there[i].span))
        return [(there[i], likeness_N[i]) for i in order[:limit]]

    def likeness(self, query: str, texts: Sequence[str]) -> list[float]:
        """How near each text is to the query in meaning, -1 to 1."""
        if not texts:
            return []
        vectors_NX = self._embed([query, *texts])
        if vectors_NX is None:
            return [_shared_words(query, text) for text in texts]
        return [round(float(one), 4) for one in vectors_NX[1:] @ vectors_NX[0]]

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float64] | None:
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if new and not self.by_words:
            result = self.desk.call(EMBEDDING, {"texts": new})
            if result.ok:
                for text, vector in zip(new, result.data["vectors"], strict=True):
                    self._vectors[text] = np.asarray(vector)
            else:
                self.by_words = result.message
        if self.by_words:
            return None
        return np.stack([self._vectors[text] for text in texts])


def _shared_words(query: str, text: str) -> float:
    """Share of the query's words that the text has, a plain stand-in for meaning."""
    wanted, given = (set(re.findall(r"\w{3,}", one.lower())) for one in (query, text))
    return round(len(wanted & given) / len(wanted), 4) if wanted else 0.0
