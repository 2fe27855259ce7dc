"""Curation of videos, a step at a time, each kept on disk: a killed command goes on where it was.

    OUT/curation.json           the options that decide all this (`origin.py`)
    OUT/narratives/KEY.json     clips, scene summaries and narrative of a video, and of which file
    OUT/asked/KEY.json          its questions, and those that were dropped, with their reasons; its
                                place, by which categories were dealt
    OUT/questions.jsonl         when all is done: a line a question, in the chat form
    OUT/dropped.jsonl           a line a drop: id and reason

A video that cannot be read and a narrative or question that a check refuses are dropped with their
reason, and counted against a budget. A file that another one has replaced is curated anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""Path of a video → times of its scene changes; raises VideoError or DataError."""
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
        kept = self._kept(videos)
        places = _free_places(kept)
        rows: list[Row] = []
        drops: dict[str, str] = {}
        failed = 0
        for number, video in enumerate(videos):
            progress("videos", number, len(videos))
            key = key_of(video)
            try:
                asked = kept[key] if key in kept else self._asked(video, places)
            except (VideoError, DataError) as error:
                failed += 1
                drops[key] = str(error)
                log.warning("%s dropped: %s", _shown(video), error)
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
        path = self._path("narratives", video)
        if path.is_file():
            return _narrative(_read(path))
        if not _is_text(str(video.resolve())):
            raise DataError(f"no row can name the file {str(video)!a}: that is no UTF-8; rename it")
        content = _content(video)
        whole = self.read(video, fps=1.0, max_frames=2)
        clips = clips_of(self.changes(video), whole.duration_s)
        told = caption_clips(clips, lambda clip: self._pictures(video, clip), self.write)
        scenes = summarise_scenes(told, self.write)
        made = Narrative(
            video=str(video.resolve()), duration_s=whole.duration_s, clips=told, scenes=scenes,
            text=tell(scenes, self.write),
        )  # fmt: skip
        _keep(path, asdict(made) | {"file": content})
        return made

    def _path(self, step: str, video: Path) -> Path:
        return self.out / step / f"{key_of(video)}.json"

    def _kept(self, videos: Sequence[Path]) -> dict[str, dict[str, Any]]:
        """What an earlier command asked of these videos, by their keys."""
        kept: dict[str, dict[str, Any]] = {}
        for video in videos:
            path = self._path("asked", video)
            self._forget_replaced(video)
            if path.is_file():
                kept[key_of(video)] = _read(path)
        return kept

    def _forget_replaced(self, video: Path) -> None:
        path = self._path("narratives", video)
        # Earlier versions did not say of which file a narrative is.
        told = _read(path).get("file") if path.is_file() else None
        if told is None or not _is_replaced(video, told):
            return
        log.warning("%s is another file than before, and curated anew", _shown(video))
        # The narrative goes last: without it nobody would know that the questions are old.
        self._path("asked", video).unlink(missing_ok=True)
        path.unlink()

    def _pictures(self, video: Path, clip: Clip) -> Pictures:
        fps = self.frames / max(clip.end_s - clip.start_s, 0.1)
        read = self.read(
            video, fps=fps, max_frames=self.frames, start_s=clip.start_s, end_s=clip.end_s
        )
        return [np.asarray(one) for one in read.pixels_THWC]

    def _asked(self, video: Path, places: Iterator[int]) -> dict[str, Any]:
        """The questions of a video and what was dropped; it takes the next place."""
        narrative = self.narrative(video)
        place = next(places)
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
        made = {"place": place, "rows": rows, "dropped": dropped}
        _keep(self._path("asked", video), made)
        return made

    def _guesses(self, asked: Asked) -> list[str]:
        assert self.guess is not None
        return [self.guess(blind_prompt(asked), number) for number in range(self.guesses)]


LONGEST = 241
"""Bytes of a name with which `KEY.json` is still a file's name."""


def key_of(video: Path) -> str:
    """A name of a file that is safe on disk and differs between folders."""
    digest = hashlib.sha256(os.fsencode(video.resolve())).hexdigest()[:8]
    stem = os.fsencode(video.stem)[:LONGEST].decode("utf-8", "ignore")
    return f"{stem}-{digest}"


def _free_places(kept: Mapping[str, Mapping[str, Any]]) -> Iterator[int]:
    """Places by which categories are dealt, without those of the videos that have theirs.

    By place in the list, a video that is added before others would shift all that come after it.
    """
    used = {one["place"] for one in kept.values() if "place" in one}
    free = (place for place in itertools.count() if place not in used)
    # Earlier versions wrote down no places; these were the first ones of the list.
    return itertools.islice(free, sum("place" not in one for one in kept.values()), None)


def _content(video: Path) -> dict[str, Any]:
    """What tells a file from one that replaces it."""
    try:
        state = video.stat()
        digest = _digest(video)
    except OSError as error:
        raise DataError(f"{video} cannot be read: {error.strerror}") from error
    return {"size": state.st_size, "modified_ns": state.st_mtime_ns, "sha256": digest}


def _is_replaced(video: Path, told: Mapping[str, Any]) -> bool:
    """Whether a file is another one than was told; its bytes are read only if its time differs."""
    try:
        state = video.stat()
        if (state.st_size, state.st_mtime_ns) == (told["size"], told["modified_ns"]):
            return False
        return bool(state.st_size != told["size"] or _digest(video) != told["sha256"])
    except OSError:  # what is there of it stays
        return False


def _digest(video: Path) -> str:
    with video.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_text(text: str) -> bool:
    """Whether a text can be written down: names of files may hold bytes that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read


def _keep(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _narrative(read: dict[str, Any]) -> Narrative:
    told = {key: value for key, value in read.items() if key != "file"}
    clips = tuple(Clip(**clip) for clip in read["clips"])
    return Narrative(**(told | {"clips": clips, "scenes": tuple(read["scenes"])}))


def _shown(video: Path) -> str:
    """A path for a log, which takes valid text only."""
    return os.fsencode(video).decode(errors="replace")
