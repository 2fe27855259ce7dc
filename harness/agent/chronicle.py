"""A video in words, from the ground up: clips, scenes, the whole story (sections 3.4 and 4.2.1).

Clips never cross a cut. Each caption is a file that is there as soon as it is written, under the
content of the video and the name of who wrote it: a killed command goes on where it stopped, and
every later question about the video finds them. How scenes are summarised and the story is told
and checked is training's (`training/curation/narrative.py`), so that both speak of videos alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from internvideo3.harness.agent.captioning import Captioner, CaptionError
from internvideo3.harness.agent.context import Span
from internvideo3.harness.agent.environment import SUBTITLE_SUFFIXES
from internvideo3.harness.agent.memory import Item, Known
from internvideo3.harness.agent.perception import Eye
from internvideo3.harness.agent.tools.catalogue import SUBTITLES
from internvideo3.harness.agent.tools.desk import Desk, Result
from internvideo3.training.curation.narrative import SUMMARY, Pictures, summarise_scenes, tell
from internvideo3.training.curation.records import Clip, DataError
from internvideo3.training.curation.splitting import clips_of

VERSION = 2
"""Raised when what is kept changes, so that old files are not used."""
AT_ONCE_S = 1200.0
"""Seconds in which scenes are looked for at once."""
CAPTION_FPS = 2.0
"""Frames a second that a captioner sees, up to the frames of a further look."""
MOST_PARTS = 24
"""Parts that the story is told of; more scenes are summarised together first."""
TOGETHER = 12
"""Most scenes that are summarised together at once."""
PART_CHARS = 150
"""Of a part, where the parts stand in for the story; all of them fit one quotation."""

Advance = Callable[[int, int], None]
"""Told of clips that are done, and of all."""
Part = tuple[Span, str]
"""A stretch of the video in words."""


def _ignore(done: int, total: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Chronicle:
    """What is known of a video before any question."""

    clips: tuple[Clip, ...]
    scenes: tuple[Part, ...]
    """A summary of each scene."""
    story: str
    """The whole video."""
    faults: tuple[str, ...]
    """What could not be told as it should, and what stands in for it."""
    read: tuple[Item, ...] = ()
    """Subtitles, and text in the picture."""

    def known(self) -> Known:
        """All of it for memory, the story last."""
        found = [
            Item(text=clip.caption, span=(clip.start_s, clip.end_s), level="caption")
            for clip in self.clips
            if clip.caption
        ]
        captioned = {item.span for item in found}
        found += [
            Item(text=text, span=span, level="scene")
            for span, text in self.scenes
            if text and span not in captioned
        ]
        found += self.read
        if self.story:
            whole = (self.clips[0].start_s, self.clips[-1].end_s)
            found.append(Item(text=self.story, span=whole, level="story"))
        return Known(items=tuple(found), faults=self.faults)


@dataclass(frozen=True, kw_only=True)
class Chronicler:
    """Makes chronicles, or finds them."""

    captioner: Captioner
    desk: Desk
    cache: Path | None
    """Folder of what is kept; None to keep nothing."""
    tools: tuple[str, ...]
    """Which of `video_segmentation` and `ocr` may be used."""
    goes_without: bool = True
    """Whether a chronicle may lack what a silent captioner owes."""

    def of(self, eye: Eye, span: Span, advance: Advance = _ignore) -> Chronicle:
        """The chronicle of a video's part.

        Args:
            eye: looks at the video.
            span: the part, in seconds.
            advance: told of every clip.

        Raises:
            CaptionError: the captioner is silent, and the chronicle may not go without.
        """
        work = _Work(self, eye, _Shelf(self._folder(eye.video)))
        clips = work.captioned(span, advance)
        scenes, story = work.story(clips)
        read = work.read(clips)
        self.desk.timings.append(
            {"tool": "captions", "seconds": round(work.shelf.seconds, 3),
             "from_cache": not work.shelf.made}
        )  # fmt: skip
        return Chronicle(
            clips=clips, scenes=scenes, story=story, faults=tuple(work.faults), read=read
        )

    def _folder(self, video: Path) -> Path | None:
        if self.cache is None:
            return None
        who = hashlib.sha256(self.captioner.name.encode()).hexdigest()[:16]
        return self.cache / "chronicles" / self.desk.digest(video) / f"v{VERSION}-{who}"


@dataclass
class _Work:
    """The making of one chronicle."""

    by: Chronicler
    eye: Eye
    shelf: _Shelf
    faults: list[str] = field(default_factory=list)
    silent: bool = False
    """Whether the captioner has failed; it is not asked again."""

    def captioned(self, span: Span, advance: Advance) -> tuple[Clip, ...]:
        """The part's clips with what is told of them."""
        clips, told = self._split(span), list[Clip]()
        advance(0, len(clips))
        for clip in clips:
            told.append(replace(clip, caption=self._caption(clip)))
            advance(len(told), len(clips))
        bare = [f"{clip.start_s:g}-{clip.end_s:g} s" for clip in told if not clip.caption]
        if bare:
            more = f" and {len(bare) - 3} more" if len(bare) > 3 else ""
            named = ", ".join(bare[:3]) + more
            self.faults.append(f"no caption for {len(bare)} of {len(told)} clips: {named}")
        return tuple(told)

    def _split(self, span: Span) -> list[Clip]:
        """Clips of scenes, where scenes can be found; else of equal length."""
        start_s, end_s = span
        changes: list[float] = []
        at_s = start_s
        while self._may("video_segmentation") and at_s < end_s:
            stop_s = min(at_s + AT_ONCE_S, end_s)
            found = self._call("video_segmentation", start_s=at_s, end_s=stop_s)
            changes += found.data["changes"] if found.ok else []
            at_s = stop_s
        return [
            replace(
                clip, start_s=round(clip.start_s + start_s, 3), end_s=round(clip.end_s + start_s, 3)
            )
            for clip in clips_of([one - start_s for one in changes], end_s - start_s)
        ]

    def _caption(self, clip: Clip) -> str:
        span, limit = (clip.start_s, clip.end_s), self.by.captioner.max_pixels
        sight = self.eye.sight
        if limit is not None:
            sight = replace(sight, max_pixels=max(limit, sight.min_pixels), video_pixels=None)
        pixels = (sight.factor, sight.min_pixels, sight.max_pixels, sight.video_pixels)
        name = f"{span[0]:.3f}-{span[1]:.3f} {sight.zoom_frames} {pixels}"

        def make() -> dict[str, Any]:
            frames = replace(self.eye, sight=sight).again(span, CAPTION_FPS)
            return {"text": self.by.captioner.caption(frames, span)}

        try:
            kept = self._kept("caption", name, make)
        except CaptionError:
            raise
        except ValueError:
            return ""  # fewer than two frames, or damaged ones: nothing can be seen of it
        return str(kept["text"]) if kept else ""

    def story(self, clips: Sequence[Clip]) -> tuple[tuple[Part, ...], str]:
        """A summary of each scene, and the story."""
        listed = json.dumps([[c.scene, c.start_s, c.end_s, c.caption] for c in clips])
        kept = self._kept("story", listed, lambda: _tell(clips, self.by.captioner))
        if kept is None:
            return (), ""
        if kept["fault"]:
            self.faults.append(kept["fault"])
        return tuple(((a, b), text) for (a, b), text in kept["scenes"]), str(kept["story"])

    def read(self, clips: Sequence[Clip]) -> tuple[Item, ...]:
        """What is said by subtitles, and what a frame of each scene has written in it."""
        found: list[Item] = []
        # They say what hearing would, and stand in for it: without it, they are not read.
        suffixes = SUBTITLE_SUFFIXES if "asr" in self.by.tools else ()
        beside = (self.eye.video.with_suffix(suffix) for suffix in suffixes)
        file = next((one for one in beside if one.is_file()), None)
        if file is not None:
            said = self._call(SUBTITLES, path=str(file))
            found += [
                Item(text=one["text"], span=(one["start_s"], one["end_s"]), level="speech")
                for one in (said.data["segments"] if said.ok else ())
                if one["start_s"] <= clips[-1].end_s and one["end_s"] >= clips[0].start_s
            ]
        for (start_s, end_s), _ in _by_scene(clips) if self._may("ocr") else ():
            seen = self._call("ocr", start_s=start_s, end_s=end_s, frames=1)
            found += [
                Item(text=one["text"], span=(one["at_s"], one["at_s"]), level="text")
                for one in (seen.data["lines"] if seen.ok else ())
            ]
        return tuple(found)

    def _kept(
        self, kind: str, key: str, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """What is kept or can be made; None if the captioner is silent."""
        if self.silent:
            return self.shelf.find(kind, key)
        try:
            return self.shelf.get(kind, key, make)
        except CaptionError as error:
            if not self.by.goes_without:
                raise
            self.silent = True
            self.faults.append(str(error))
            return None

    def _may(self, tool: str) -> bool:
        return tool in self.by.tools and not self.by.desk.missing(tool)

    def _call(self, tool: str, **arguments: Any) -> Result:
        result = self.by.desk.call(tool, {"path": str(self.eye.video), **arguments})
        if not result.ok and result.message not in self.faults:
            self.faults.append(result.message)
        return result


def _tell(clips: Sequence[Clip], captioner: Captioner) -> dict[str, Any]:
    """Scenes and story of captions, with what is wrong with the story."""

    def write(prompt: str, pictures: Pictures) -> str:
        return captioner.write(prompt)

    summaries = summarise_scenes(clips, write)
    spans = [span for span, _ in _by_scene(clips)]
    scenes = list(zip(spans, summaries, strict=True))
    parts = scenes
    while len(parts) > MOST_PARTS:
        size = min(TOGETHER, -(-len(parts) // MOST_PARTS))
        parts = [_together(parts[at : at + size], write) for at in range(0, len(parts), size)]
    fault = ""
    try:
        story = tell([text for _, text in parts], write)
    except DataError as error:
        story = "\n".join(
            f"{a:g}-{b:g} s: {' '.join(text.split())[:PART_CHARS]}"
            for (a, b), text in parts
            if text
        )
        fault = f"{error}; summaries of its parts stand in for it"
    return {"scenes": scenes, "story": story, "fault": fault}


def _together(parts: Sequence[Part], write: Callable[[str, Pictures], str]) -> Part:
    listed = "\n".join(f"- {text}" for _, text in parts)
    return (parts[0][0][0], parts[-1][0][1]), write(SUMMARY.format(captions=listed), ())


def _by_scene(clips: Sequence[Clip]) -> list[tuple[Span, list[Clip]]]:
    scenes = [list(members) for _, members in groupby(clips, lambda one: one.scene)]
    return [((members[0].start_s, members[-1].end_s), members) for members in scenes]


@dataclass
class _Shelf:
    """Files of JSON by kind and content, each written whole."""

    folder: Path | None
    made: int = 0
    """How many were not there."""
    seconds: float = 0.0
    """What these took."""

    def find(self, kind: str, key: str) -> dict[str, Any] | None:
        """What is kept, None if it is not there or damaged."""
        if self.folder is None:
            return None
        try:
            kept = json.loads(self._path(self.folder, kind, key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return kept if isinstance(kept, dict) else None

    def get(self, kind: str, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept, else what is made, and kept."""
        kept = self.find(kind, key)
        if kept is not None:
            return kept
        started = time.perf_counter()
        made = make()
        self.made += 1
        self.seconds += time.perf_counter() - started
        if self.folder is not None:
            _write(self._path(self.folder, kind, key), made)
        # Through JSON, as what is kept: equal whether found or made.
        found: dict[str, Any] = json.loads(json.dumps(made))
        return found

    @staticmethod
    def _path(folder: Path, kind: str, key: str) -> Path:
        return folder / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _write(path: Path, made: dict[str, Any]) -> None:
    """Keeps what was made; without room on the disk it is made again the next time, no more."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(made), encoding="utf-8")
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
