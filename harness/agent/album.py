"""Pictures of a whole video, very small and kept on disk: the lowest level of memory (3.4).

They cost no token. They tell where a video shows something that no look has shown yet, by colours
alone: nothing is known about what is asked or what the video holds.

Axes: T moments, X numbers of a picture, N seen moments.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from internvideo3.tasks.decoder import IsolatedReader

SIDE = 8
"""Rows and columns of a picture."""
FPS = 4.0
MOST = 4_096
"""Pictures of one video; a longer one has fewer a second."""
A_PAGE = 64
"""Pictures read and kept at once."""
VERSION = 2
"""Raised when pages change, so that old ones are not used."""


@dataclass(frozen=True, eq=False)
class Album:
    """Small pictures of a video in order of time."""

    times_T: NDArray[np.float64]
    """Seconds."""
    pictures_TX: NDArray[np.float32]
    """Colours, 0 to 1."""

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.times_T)

    def novelty(self, seen_s: Sequence[float]) -> NDArray[np.float32]:
        """How unlike each moment is the seen moments next to it, before and after: [T], 0 to 1.

        It is the mean difference of colour from the more alike of the two, so that a change
        between two seen moments is not new, and what appears and vanishes between them is.
        """
        at_N = np.unique(np.searchsorted(self.times_T, np.asarray(seen_s) - 1e-6))
        at_N = at_N[at_N < len(self.times_T)]
        if not len(at_N):
            return np.ones(len(self.times_T), np.float32)
        place_T = np.searchsorted(at_N, np.arange(len(self.times_T)), side="right") - 1
        before_T = at_N[np.clip(place_T, 0, None)]
        after_T = at_N[np.clip(place_T + 1, None, len(at_N) - 1)]
        new_T: NDArray[np.float32] = np.minimum(
            np.abs(self.pictures_TX - self.pictures_TX[before_T]).mean(1),
            np.abs(self.pictures_TX - self.pictures_TX[after_T]).mean(1),
        )
        return new_T


def open_album(
    video: Path, start_s: float, end_s: float, reader: IsolatedReader, cache: Path | None
) -> Album:
    """The album of a video's part; what is on disk is not read from the video again.

    Pages are kept by the video's content, each written whole: a killed process loses one.

    Args:
        video: the file.
        start_s: where the part begins.
        end_s: where it ends.
        reader: decodes, in a process of its own.
        cache: folder of what is kept, None to keep nothing.

    Raises:
        VideoError: the video cannot be read.
    """
    fps = min(FPS, MOST / max(end_s - start_s, 1.0))
    page_s = A_PAGE / fps
    folder = _folder(video, cache)
    times: list[NDArray[np.float64]] = []
    pictures: list[NDArray[np.float32]] = []
    pages = max(1, int((end_s - start_s) / page_s))
    for number in range(pages):
        first_s = start_s + number * page_s
        # The last page takes what is left behind it: too little may be no clip of its own.
        last_s = first_s + page_s if number < pages - 1 else end_s
        name = f"v{VERSION}-{fps:.4f}-{first_s:.3f}-{last_s:.3f}.npz"
        page = _read(folder / name) if folder else None
        if page is None:
            page = _make(video, first_s, last_s, fps, reader)
            if folder:
                _write(folder / name, page)
        times.append(page.times_T)
        pictures.append(page.pictures_TX)
    times_T, order = np.unique(np.concatenate(times), return_index=True)
    return Album(times_T, np.concatenate(pictures)[order])


def _folder(video: Path, cache: Path | None) -> Path | None:
    if cache is None:
        return None
    with video.open("rb") as file:
        return cache / "albums" / hashlib.file_digest(file, "sha256").hexdigest()


def _make(video: Path, start_s: float, end_s: float, fps: float, reader: IsolatedReader) -> Album:
    frames = reader.read(video, fps=fps, max_frames=2 * A_PAGE, start_s=start_s, end_s=end_s)
    times_T = np.asarray(frames.indices, np.float64) / frames.source_fps
    small = np.stack([_shrink(one) for one in frames.pixels_THWC])
    return Album(times_T, small)


def _shrink(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean colours of `SIDE` by `SIDE` fields, as one row of numbers."""
    height, width = pixels_HWC.shape[:2]
    rows = np.linspace(0, height, min(SIDE, height) + 1)[:-1].astype(int)
    columns = np.linspace(0, width, min(SIDE, width) + 1)[:-1].astype(int)
    sums = np.add.reduceat(pixels_HWC.astype(np.float32), rows, axis=0)
    sums = np.add.reduceat(sums, columns, axis=1)
    counts = np.diff([*rows, height])[:, None, None] * np.diff([*columns, width])[None, :, None]
    small: NDArray[np.float32] = (sums / counts / 255).astype(np.float32).reshape(-1)
    return small


def _read(path: Path) -> Album | None:
    """A page from disk, None if there is none or it is damaged."""
    try:
        with np.load(path) as page:
            return Album(page["times_T"], page["pictures_TX"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # made again, and written over


def _write(path: Path, page: Album) -> None:
    """Keeps a page; without room on the disk it is made again the next time, no more."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, times_T=page.times_T, pictures_TX=page.pictures_TX)
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
