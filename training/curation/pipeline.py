"""Curation of videos, a step at a time, each kept on disk: a killed command goes on where it was.

    OUT/curation.json           the options that decide all this (`origin.py`)
    OUT/narratives/KEY.json     clips, scene summaries and narrative of a video
    OUT/asked/KEY.json          its questions, and those that were dropped, with their reasons
    OUT/questions.jsonl         when all is done: a line a question, in the chat form
    OUT/dropped.jsonl           a line a drop: id and reason

A video that cannot be read and a narrative or question that a check refuses are dropped with their
reason, and counted against a budget.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internvideo3.tasks.video import Frames, VideoError
from internvideo3.training.curation.narrative import (
    Pictures,
    Writer,
    caption_clips,
    summarise_scenes,
    tell,
)
from internvideo3.training.curation.records import (
    Asked,
    Clip,
    DataError,
    Narrative,
    Row,
    chat_row,
    write_rows,
)
from internvideo3.training.curation.splitting import clips_of
from internvideo3.training.curation.synthesis import (
    RejectedError,
    blind_prompt,
    category_at,
    guessed,
    synthesise,
)

log = logging.getLogger("internvideo3.curation")
Changes = Callable[[Path], Sequence[float]]
"""Path of a video → times of its scene changes."""
Guesser = Callable[[str, int], str]
"""(prompt, number of the guess) → text; each number is another sample."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Curation:
    """How videos become questions."""

    out: Path
    changes: Changes
    read: Callable[..., Frames]
    """`read_frames`, or that of an isolated reader."""
    write: Writer
    """Captions and writes."""
    guess: Guesser | None = None
    """Guesses answers without the video; None: not checked."""
    guesses: int = 3
    """Guesses that all have to be right before a question counts as answerable blind."""
    per_video: int = 3
    """Questions of a video."""
    frames: int = 8
    """Frames of a clip that the captioning model sees."""
    most_failures: float = 0.1
    """Share of videos that may fail before the command stops."""

    def run(self, videos: Sequence[Path], progress: Progress) -> list[Row]:
        """Curate what is missing; the rows of all videos.

        Raises:
            DataError: More videos fail than the budget allows.
            EndpointError: The writing model does not answer; what is finished is kept.
        """
        for name in ("narratives", "asked"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        rows: list[Row] = []
        drops: dict[str, str] = {}
        failed = 0
        for place, video in enumerate(videos):
            progress("videos", place, len(videos))
            try:
                asked = self._asked(video, place)
            except (VideoError, DataError) as error:
                failed += 1
                drops[key_of(video)] = str(error)
                log.warning("%s dropped: %s", video, error)
                self._check_budget(failed, len(videos), error)
                continue
            rows += asked["rows"]
            drops |= asked["dropped"]
        progress("videos", len(videos), len(videos))
        write_rows(self.out / "questions.jsonl", rows)
        write_rows(
            self.out / "dropped.jsonl", [{"id": key, "reason": why} for key, why in drops.items()]
        )
        return rows

    def _check_budget(self, failed: int, videos: int, error: Exception) -> None:
        if failed > self.most_failures * videos:
            raise DataError(
                f"{failed} of {videos} videos failed, more than {self.most_failures:.0%}; the "
                f"last one: {error}. Remove or repair them, or raise the budget; what is finished "
                "is kept."
            ) from error

    def narrative(self, video: Path) -> Narrative:
        """The narrative of a video, from disk if it is there.

        Raises:
            VideoError: The video cannot be read.
            DataError: The model's texts fail the checks.
        """
        path = self.out / "narratives" / f"{key_of(video)}.json"
        if path.is_file():
            return _narrative(json.loads(path.read_text()))
        whole = self.read(video, fps=1.0, max_frames=2)
        clips = clips_of(self.changes(video), whole.duration_s)
        told = caption_clips(clips, lambda clip: self._pictures(video, clip), self.write)
        scenes = summarise_scenes(told, self.write)
        made = Narrative(
            video=str(video.resolve()), duration_s=whole.duration_s, clips=told, scenes=scenes,
            text=tell(scenes, self.write),
        )  # fmt: skip
        _keep(path, asdict(made))
        return made

    def _pictures(self, video: Path, clip: Clip) -> Pictures:
        fps = self.frames / max(clip.end_s - clip.start_s, 0.1)
        read = self.read(
            video, fps=fps, max_frames=self.frames, start_s=clip.start_s, end_s=clip.end_s
        )
        return [np.asarray(one) for one in read.pixels_THWC]

    def _asked(self, video: Path, place: int) -> dict[str, Any]:
        """The questions of a video and what was dropped, from disk if they are there."""
        path = self.out / "asked" / f"{key_of(video)}.json"
        if path.is_file():
            kept: dict[str, Any] = json.loads(path.read_text())
            return kept
        narrative = self.narrative(video)
        rows: list[Row] = []
        dropped: dict[str, str] = {}
        for number in range(self.per_video):
            name = f"{key_of(video)}/{number}"
            category = category_at(place * self.per_video + number)
            try:
                asked = synthesise(narrative, category, self.write, name)
                if self.guess and guessed(asked, self._guesses(asked)):
                    raise RejectedError("can be answered without the video")
                rows.append(chat_row(name, narrative, asked))
            except RejectedError as error:
                dropped[name] = f"{category}: {error}"
                log.info("%s dropped: %s", name, dropped[name])
        made = {"rows": rows, "dropped": dropped}
        _keep(path, made)
        return made

    def _guesses(self, asked: Asked) -> list[str]:
        assert self.guess is not None
        return [self.guess(blind_prompt(asked), number) for number in range(self.guesses)]


def key_of(video: Path) -> str:
    """A name of a file that is safe on disk and differs between folders."""
    digest = hashlib.sha256(str(video.resolve()).encode()).hexdigest()[:8]
    return f"{video.stem}-{digest}"


def _keep(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    part.replace(path)


def _narrative(read: dict[str, Any]) -> Narrative:
    clips = tuple(Clip(**clip) for clip in read["clips"])
    return Narrative(**(read | {"clips": clips, "scenes": tuple(read["scenes"])}))
