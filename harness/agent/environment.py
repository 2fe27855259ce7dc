"""The execution π of equation (3): what comes of an action, always as feedback."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internvideo3.harness.agent import actions
from internvideo3.harness.agent.actions import Action, Malformed
from internvideo3.harness.agent.context import Context, Kind, Span
from internvideo3.harness.agent.grounding import ground
from internvideo3.harness.agent.memory import Item, Memory, overlap_s
from internvideo3.harness.agent.perception import Eye
from internvideo3.harness.agent.tools.catalogue import SUBTITLES
from internvideo3.harness.agent.tools.desk import Desk
from internvideo3.harness.agent.verification import Check, check, told
from internvideo3.tasks.video import VideoError

NAMED_TOOLS = ("video_segmentation", "asr", "ocr", "temporal_grounding", "web_search")
"""Actions that a command can switch off."""
SUBTITLE_SUFFIXES = (".srt", ".vtt", ".ass", ".ssa")


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """F_{i+1}: what an action came to."""

    ok: bool
    text: str
    """What the policy reads; may hold anything that a tool gave, so it is quoted."""
    kind: Kind = Kind.FEEDBACK
    span: Span | None = None
    """The part of the video that it is about."""
    look: float | None = None
    """Frames a second with which `parts` are to be seen next, by δ."""
    parts: tuple[Span, ...] = ()
    """What is to be seen, in order of time."""
    items: tuple[Item, ...] = ()
    """What memory keeps of it."""
    checks: tuple[Check, ...] = ()
    """Outcomes of a verification."""
    data: Mapping[str, Any] = field(default_factory=dict)
    side_tokens: int = 0
    """Tokens that were weighed for it."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One video, the tools, and what is remembered."""

    video: Path
    duration_s: float
    desk: Desk
    memory: Memory
    context: Context
    start_s: float = 0.0
    """Where the part of the video begins that may be seen; it ends at `duration_s`."""
    tools: tuple[str, ...] | None = None
    """What may be called beside looking and memory; None for all."""
    eye: Eye | None = None
    """Looks at the video, for tools that the model itself is."""
    most_tokens: Callable[[], int] = lambda: 4_096
    """How many tokens such a tool may still take."""
    clips: Callable[[int, Sequence[float]], tuple[tuple[Span, ...], float]] = lambda *_: ((), 1.0)
    """Parts around moments, or else at most so many that no look has shown; and the frames a
    second of a closer look."""

    def available(self, name: str) -> bool:
        """Whether a tool can be called here."""
        if self.tools is not None and name not in self.tools:
            return False
        if name == "asr" and self.subtitles() is not None:
            return True
        return name not in self.desk.tools or not self.desk.missing(name)

    def subtitles(self) -> Path | None:
        """The subtitle file beside the video, if there is one."""
        files = [self.video.with_suffix(suffix) for suffix in SUBTITLE_SUFFIXES]
        return next((file for file in files if file.is_file()), None)

    def execute(self, action: Action | Malformed) -> Feedback:
        """F_{i+1} ~ π(A_{i+1} | R_i, Q). Never raises for what an action or a tool did."""
        if isinstance(action, Malformed):
            return Feedback(ok=False, text=action.problem)
        if action.name in NAMED_TOOLS and self.tools is not None and action.name not in self.tools:
            return Feedback(ok=False, text=f"{action.name} is switched off here; do without it")
        handlers: dict[type[Action], Callable[[Any], Feedback]] = {
            actions.Zoom: self._zoom,
            actions.Pick: self._pick,
            actions.Segment: self._segment,
            actions.Listen: self._listen,
            actions.ReadText: self._read_text,
            actions.Ground: self._ground,
            actions.Search: self._search,
            actions.Recall: self._recall,
            actions.Note: self._note,
            actions.Verify: self._verify,
        }
        return handlers[type(action)](action)

    def _part(self, action: Any) -> Span | Feedback:
        """The part that an action is about, within the video, or why there is none."""
        end_s = self.duration_s if action.end_s is None else min(action.end_s, self.duration_s)
        start_s = max(action.start_s, self.start_s)
        if start_s < end_s:
            return start_s, end_s
        return Feedback(
            ok=False,
            text=f"nothing lies between {start_s:g} and {end_s:g} s: the video lasts "
            f"{self.duration_s:.2f} s. Give start_s and end_s within it.",
        )

    def _zoom(self, action: actions.Zoom) -> Feedback:
        asked = [action, *(actions.Zoom(start_s=a, end_s=b) for a, b in action.also)]
        found = [self._part(one) for one in asked]
        for one in found:
            if isinstance(one, Feedback):
                return one
        return _look(tuple(one for one in found if not isinstance(one, Feedback)), action.fps)

    def _pick(self, action: actions.Pick) -> Feedback:
        outside = [t for t in action.around_s if not self.start_s <= t <= self.duration_s]
        if outside:
            return Feedback(
                ok=False,
                text=f"{outside[0]:g} s is outside of the video, which lasts "
                f"{self.duration_s:.2f} s. Give moments within it.",
            )
        if action.around_s:
            return _look(*self.clips(len(action.around_s), action.around_s))
        # One more than is looked at, to say whether anything is left.
        found, fps = self.clips(action.most + 1, ())
        if not found:
            return Feedback(ok=False, text="no part is left that shows anything new")
        left = "more is new" if len(found) > action.most else "nothing else is new"
        return _look(found[: action.most], fps, f"; {left}")

    def _call(self, tool: str, part: Span, **arguments: Any) -> dict[str, Any] | Feedback:
        result = self.desk.call(tool, {"path": str(self.video), **arguments})
        if result.ok:
            return dict(result.data)
        return Feedback(ok=False, text=result.message, span=part, data={"error": result.error})

    def _segment(self, action: actions.Segment) -> Feedback:
        part = self._part(action)
        if isinstance(part, Feedback):
            return part
        found = self._call("video_segmentation", part, start_s=part[0], end_s=part[1])
        if isinstance(found, Feedback):
            return found
        scenes = [(float(a), float(b)) for a, b in found["scenes"]]
        items = [Item(text=f"scene {n}", span=s, level="scene") for n, s in enumerate(scenes, 1)]
        lines = "\n".join(
            f"{item.text}: {a:g}-{b:g} s" for item, (a, b) in zip(items, scenes, strict=True)
        )
        return Feedback(ok=True, text=lines, span=part, items=tuple(items), data={"scenes": scenes})

    def _listen(self, action: actions.Listen) -> Feedback:
        part = self._part(action)
        if isinstance(part, Feedback):
            return part
        file = self.subtitles()
        if file is not None:
            result = self.desk.call(SUBTITLES, {"path": str(file)})
            found: dict[str, Any] | Feedback = (
                dict(result.data)
                if result.ok
                else Feedback(
                    ok=False, text=result.message, span=part, data={"error": result.error}
                )
            )
        else:
            found = self._call("asr", part, weights=os.environ.get("IV3_WHISPER"))
        if isinstance(found, Feedback):
            return found
        items = [
            Item(text=one["text"], span=(one["start_s"], one["end_s"]), level="speech")
            for one in found["segments"]
        ]
        return _lines(items, part, found.get("note", "nothing is said there"))

    def _read_text(self, action: actions.ReadText) -> Feedback:
        part = self._part(action)
        if isinstance(part, Feedback):
            return part
        found = self._call("ocr", part, start_s=part[0], end_s=part[1], frames=action.frames)
        if isinstance(found, Feedback):
            return found
        items = [
            Item(text=one["text"], span=(one["at_s"], one["at_s"]), level="text")
            for one in found["lines"]
        ]
        return _lines(items, part, "no text was read there")

    def _ground(self, action: actions.Ground) -> Feedback:
        part = self._part(action)
        if isinstance(part, Feedback):
            return part
        if self.eye is None:
            return Feedback(ok=False, text="temporal_grounding has no video to look at here")
        most = self.most_tokens()
        try:
            found = ground(action.query, part, self.eye, self.context, self.memory, most)
        except VideoError as error:
            return Feedback(ok=False, text=str(error), span=part)
        lines = [f"{one.span[0]:g}-{one.span[1]:g} s ({one.score:.2f})" for one in found.parts]
        hits = [
            {"span": one.span, "likeness": one.score, "level": "grounded"} for one in found.parts
        ]
        return Feedback(
            ok=bool(found.parts),
            text="\n".join(lines) or "it was found nowhere",
            span=part,
            data={"hits": hits},
            side_tokens=found.tokens,
        )

    def _search(self, action: actions.Search) -> Feedback:
        result = self.desk.call("web_search", {"query": action.query, "limit": action.limit})
        if not result.ok:
            return Feedback(ok=False, text=result.message, data={"error": "unavailable"})
        rows = result.data["rows"]
        lines = "\n".join(f"{row['title']} ({row['url']}): {row['text']}" for row in rows)
        return Feedback(ok=bool(rows), text=lines or "nothing was found")

    def _recall(self, action: actions.Recall) -> Feedback:
        part = self._part(action)
        if isinstance(part, Feedback):
            return part
        found = self.memory.read(action.query, part, action.limit)
        text = "\n".join(f"{_timed(item)} [{_origin(item)}]" for item, _ in found)
        hits = [{"span": item.span, "likeness": near, "level": item.level} for item, near in found]
        span = None
        if found:
            spans = [item.span for item, _ in found]
            span = (min(a for a, _ in spans), max(b for _, b in spans))
        return Feedback(
            # Reading back what the policy itself wrote shows nothing of the video.
            ok=any(item.level != "note" for item, _ in found),
            kind=Kind.MEMORY,
            text=text or "memory holds nothing there",
            span=span,
            data={"hits": hits},
        )

    def _note(self, action: actions.Note) -> Feedback:
        part = self._part(action)
        if isinstance(part, Feedback):
            return part
        item = Item(text=action.text, span=part, level="note")
        # A note is the policy's own word: it is remembered, and it is no evidence.
        return Feedback(ok=False, text="written to memory", span=part, items=(item,))

    def _verify(self, action: actions.Verify) -> Feedback:
        checks = check(action.claims, self.context)
        return Feedback(ok=False, text=told(checks), checks=tuple(checks))


def _look(parts: tuple[Span, ...], fps: float, note: str = "") -> Feedback:
    parts = tuple(sorted(set(parts)))
    said = ", ".join(f"{a:g}-{b:g} s" for a, b in parts)
    return Feedback(
        ok=True,
        text=f"{said} at {fps:g} frames a second{note}:",
        kind=Kind.OBSERVATION,
        span=(parts[0][0], max(end_s for _, end_s in parts)),
        look=fps,
        parts=parts,
    )


def _lines(items: list[Item], part: Span, otherwise: str) -> Feedback:
    inside = [item for item in items if overlap_s(item.span, part) >= 0]
    text = "\n".join(_timed(item) for item in inside)
    return Feedback(ok=True, text=text or otherwise, span=part, items=tuple(inside))


def _origin(item: Item) -> str:
    return ", ".join(filter(None, (item.level, item.evidence)))


def _timed(item: Item) -> str:
    start_s, end_s = item.span
    when = f"{start_s:g}-{end_s:g} s" if end_s > start_s else f"{start_s:g} s"
    return f"{when}: {item.text}"
