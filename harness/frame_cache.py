"""Decoded frames kept on disk: a second run over the same videos decodes nothing.

A file is named by the SHA-256 of the video's content and of what was asked of it, so a renamed
video hits, and an edited one misses. Files are written whole or not at all, are shared by any
number of processes, and the least recently used go first when the room is spent.
"""

import contextlib
import hashlib
import os
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from internvideo3.tasks.video import Frames, VideoError

_VERSION = 2
"""2: what decord decoded is not used again; of some files it was not what was asked for."""
_ENDING = ".frames.npz"


class FrameCache:
    """Frames by content, in a folder of limited size.

    Args:
        folder: where they are kept; made if missing.
        limit_bytes: most bytes that its files take together.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.hits = 0
        self.misses = 0
        self._digests: dict[tuple[str, int, int], str] = {}
        self._writing = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self._bytes = sum(size for _, size, _ in self._files())

    def get(self, video: str, recipe: tuple[object, ...], make: Callable[[], Frames]) -> Frames:
        """The frames of a video by a recipe; made and kept if they are not there.

        Args:
            video: path of the file.
            recipe: everything besides the file that decides the frames.
            make: decodes them.

        Raises:
            VideoError: the video cannot be read.
        """
        path = self.folder / f"{self._key(video, recipe)}{_ENDING}"
        found = _load(path)
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        frames = make()
        # A full or read-only disk costs the cache, not the run.
        with contextlib.suppress(OSError), self._writing:
            self._keep(path, frames)
        return frames

    def _key(self, video: str, recipe: tuple[object, ...]) -> str:
        return hashlib.sha256(repr((_VERSION, self._digest(video), recipe)).encode()).hexdigest()

    def _digest(self, video: str) -> str:
        try:
            stat = Path(video).stat()
            known = (video, stat.st_size, stat.st_mtime_ns)
            if known not in self._digests:
                with Path(video).open("rb") as file:
                    self._digests[known] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise VideoError(f"cannot read the video {video}: {error.strerror}") from error
        return self._digests[known]

    def _keep(self, path: Path, frames: Frames) -> None:
        descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(
                    file,
                    pixels_THWC=frames.pixels_THWC,
                    indices=np.asarray(frames.indices, np.int64),
                    numbers=np.asarray(
                        [frames.source_fps, frames.total_frames, frames.duration_s, frames.off_s],
                        np.float64,
                    ),
                    digest=np.asarray(frames.digest),
                )
            size = Path(name).stat().st_size
            self._make_room(size)
            Path(name).replace(path)
            self._bytes += size
        finally:
            Path(name).unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        if self._bytes + size <= self.limit_bytes:
            return
        files = sorted(self._files())
        self._bytes = sum(one for _, one, _ in files)
        for _, one, path in files:
            if self._bytes + size <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            self._bytes -= one

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Last use, size and path of every kept file."""
        for path in self.folder.glob(f"*{_ENDING}"):
            with contextlib.suppress(FileNotFoundError):  # another process made room
                stat = path.stat()
                yield stat.st_mtime, stat.st_size, path


def _load(path: Path) -> Frames | None:
    """The frames of a file, marked as used; None if it is not there or damaged."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            source_fps, total, duration_s, off_s = kept["numbers"].tolist()
            frames = Frames(
                pixels_THWC=kept["pixels_THWC"],
                indices=tuple(kept["indices"].tolist()),
                source_fps=source_fps,
                total_frames=int(total),
                duration_s=duration_s,
                digest=str(kept["digest"]),
                off_s=off_s,
            )
        os.utime(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return frames
