"""Small pictures of the moments that a question is about, as the model's sampler saw them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import Frames, VideoError

MAX_SIDE_PX = 160
JPEG_QUALITY = 78
WHOLE_VIDEO_S = 180.0
"""Longer videos are decoded around the wanted moments only."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """One picture."""

    time_s: float
    """Time of the frame in the video."""
    uri: str
    """The JPEG as a data URI."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which pictures of a video to take."""

    times_s: tuple[float, ...]
    """Moments, the most wanted first."""
    count: int
    """Pictures to take; moments that fall on the same sampled frame give one."""
    fps: float
    """Frames per second that the model's sampler took."""
    length_s: float | None


class Thumbnailer:
    """Takes thumbnails until a budget of bytes is spent; keeps the last decoded video."""

    def __init__(self, budget_bytes: int):
        self.left = budget_bytes
        self.failed: dict[str, str] = {}
        """Videos that could not be read, with the reason."""
        self._known: dict[tuple[str, float], Thumbnail] = {}
        self._last: tuple[tuple[Path, float], Frames] | None = None
        self._lengths: dict[Path, float] = {}
        # A file that crashed the decoder in the run must not end the report.
        self._reader = IsolatedReader()

    def close(self) -> None:
        """End the decoding process."""
        self._reader.close()

    def length_s(self, video: Path) -> float | None:
        """Return a video's length, for annotations that do not tell it; `None` if unreadable."""
        if video not in self._lengths and str(video) not in self.failed:
            try:
                self._lengths[video] = self._reader.read(video, fps=1.0, max_frames=2).duration_s
            except (VideoError, OSError) as error:
                self.failed[str(video)] = str(error)
        return self._lengths.get(video)

    def take(self, video: Path, wanted: Wanted) -> list[Thumbnail]:
        """Return pictures of the sampled frames nearest to the wanted moments, in order of time.

        Fewer or none if the budget is spent or the video cannot be read (see `failed`).
        """
        if self.left <= 0 or str(video) in self.failed:
            return []
        found: dict[float, NDArray[np.uint8]] = {}
        try:
            for at_s in wanted.times_s:
                if len(found) < wanted.count:
                    time_s, pixels_HWC = _nearest(self._clip(video, wanted, at_s), at_s)
                    found.setdefault(time_s, pixels_HWC)
        except (VideoError, OSError) as error:
            self.failed[str(video)] = str(error)
            return []
        return [self._picture(str(video), time_s, found[time_s]) for time_s in sorted(found)]

    def _clip(self, video: Path, wanted: Wanted, at_s: float) -> Frames:
        if wanted.length_s is None or wanted.length_s > WHOLE_VIDEO_S:
            start_s = max(0.0, at_s - 2.0)
            return self._reader.read(video, fps=wanted.fps, start_s=start_s, end_s=at_s + 2.0)
        if self._last is None or self._last[0] != (video, wanted.fps):
            self._last = (video, wanted.fps), self._reader.read(video, fps=wanted.fps)
        return self._last[1]

    def _picture(self, video: str, time_s: float, pixels_HWC: NDArray[np.uint8]) -> Thumbnail:
        known = self._known.get((video, time_s))
        if known is None:
            known = Thumbnail(time_s, encode(pixels_HWC))
            self._known[video, time_s] = known
            self.left -= len(known.uri)
        return known


def _nearest(clip: Frames, at_s: float) -> tuple[float, NDArray[np.uint8]]:
    times_T = np.asarray(clip.indices) / clip.source_fps
    index = int(np.abs(times_T - at_s).argmin())
    return round(float(times_T[index]), 3), clip.pixels_THWC[index]


def encode(pixels_HWC: NDArray[np.uint8]) -> str:
    """Return RGB pixels as a JPEG data URI, no side longer than `MAX_SIDE_PX`."""
    image = Image.fromarray(pixels_HWC)
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def moments(evidence: Sequence[tuple[float, float]], length_s: float | None) -> list[float]:
    """Return times to show, the most wanted first: in the evidence, over the video, its ends."""
    middles = [(low + high) / 2 for low, high in evidence][:3]
    spread = [length_s * share for share in (0.5, 0.1, 0.9, 0.3, 0.7)] if length_s else []
    ends = [time_s for span in evidence for time_s in span]
    return [*middles, *spread, *ends]
