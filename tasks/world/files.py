"""One video of the scale world on disk, and the journal of those that are finished.

A file appears under its name only when it is complete (written aside, then renamed), and its line
enters the journal after that, so a build that was killed loses at most the videos in the making.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvideo3.tasks.world import media, visits
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.render import frame_times
from internvideo3.tasks.world.scenes import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A video to make."""

    folder: str
    """`<root>/<split>`."""
    video_id: str
    key: str
    """Digest of everything that decides the file's bytes; see `build.suite_key`."""
    seed: int
    length_s: float
    profile: Profile
    sound: bool
    visit_s: float | None = None
    """See `visits.draw`."""
    subtitles: bool = True
    """Whether what is said is written beside the video."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A finished video, as the journal and the manifest hold it."""

    video_id: str
    key: str
    video_sha256: str
    subtitles_sha256: str | None
    """None for a video without subtitles."""
    size: int
    """Bytes of the mp4 file."""

    def files(self) -> dict[str, str]:
        """The video's files, relative to `<root>/<split>`, with their digests."""
        found = {video_name(self.video_id): self.video_sha256}
        if self.subtitles_sha256 is not None:
            found[subtitles_name(self.video_id)] = self.subtitles_sha256
        return found

    def is_intact(self, folder: Path) -> bool:
        """Whether all files are there with the recorded content."""
        return all(_digest_of(folder / name) == one for name, one in self.files().items())


def video_name(video_id: str) -> str:
    """Path of a video relative to `<root>/<split>`."""
    return f"videos/{video_id}.mp4"


def subtitles_name(video_id: str) -> str:
    """Path of a video's subtitles relative to `<root>/<split>`."""
    return f"videos/{video_id}.srt"


def make_video(job: Job) -> Record:
    """Draw, encode and write one video and, where it has some, its subtitles.

    Raises:
        OSError: If the disk is full or refuses.
    """
    spec = visits.draw(job.seed, job.length_s, job.profile, job.visit_s)
    tones = media.tones_of(spec) if job.sound else None
    video = media.encode_video(paint(spec, frame_times(spec)), tones=tones)
    folder = Path(job.folder)
    subtitles = None
    if job.subtitles:
        subtitles = media.encode_subtitles(media.cues_of(spec)).encode()
        write_whole(folder / subtitles_name(job.video_id), subtitles)
    write_whole(folder / video_name(job.video_id), video)
    return Record(
        video_id=job.video_id,
        key=job.key,
        video_sha256=digest(video),
        subtitles_sha256=None if subtitles is None else digest(subtitles),
        size=len(video),
    )


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its name never stands for a part of it.

    Raises:
        OSError: If the disk is full or refuses; nothing is left behind.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def _digest_of(path: Path) -> str | None:
    try:
        return digest(path.read_bytes())
    except OSError:
        return None


class Journal:
    """The finished videos of one suite, one JSON line each; only grows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, key: str) -> dict[str, Record]:
        """Finished videos made with this key: video id → record. A torn last line is no video."""
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return {}
        records = (_record(line) for line in lines)
        return {one.video_id: one for one in records if one is not None and one.key == key}

    def append(self, records: Iterable[Record]) -> Iterator[Record]:
        """Add records as they come, handing each on when it is in the file.

        Raises:
            OSError: If the disk is full or refuses.
        """
        with self.path.open("a+b") as file:
            # After a torn line a new one must not be glued to it.
            if file.tell() and not self._ends_with_newline():
                file.write(b"\n")
            for record in records:
                file.write(json.dumps(asdict(record)).encode() + b"\n")
                file.flush()
                yield record

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _record(line: str) -> Record | None:
    try:
        fields: dict[str, Any] = json.loads(line)
        return Record(**fields)
    except (ValueError, TypeError):
        return None
