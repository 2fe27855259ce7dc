"""Small pictures of the moments that a question is about, as the model's sampler saw them."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvideo3.tasks.video import Frames, VideoError, read_frames

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


class Thumbnailer:
    """Makes thumbnails until a budget of bytes is spent; decodes a video once per request."""

    def __init__(self, budget_bytes: int):
        self.left = budget_bytes
        self.failed: dict[str, str] = {}
        """Videos that could not be read, with the reason."""
        self._known: dict[tuple[str, float], Thumbnail] = {}

    def take(
        self, video: Path, times_s: Sequence[float], *, fps: float, length_s: float | None
    ) -> list[Thumbnail]:
        """Return pictures of the sampled frames nearest to the given times, without repeats.

        Fewer or none if the budget is spent or the video cannot be read (see `failed`).
        """
        if self.left <= 0 or not times_s or str(video) in self.failed:
            return []
        try:
            frames = [
                self._frame(clip, at)
                for clip, moments in _clips(video, times_s, fps, length_s)
                for at in moments
            ]
        except (VideoError, OSError) as error:
            self.failed[str(video)] = str(error)
            return []
        found = {}
        for time_s, pixels_HWC in frames:
            found[time_s] = self._picture(str(video), time_s, pixels_HWC)
        return [found[time_s] for time_s in sorted(found)]

    def _frame(self, clip: Frames, at_s: float) -> tuple[float, NDArray[np.uint8]]:
        times_T = np.asarray(clip.indices) / clip.source_fps
        index = int(np.abs(times_T - at_s).argmin())
        return round(float(times_T[index]), 3), clip.pixels_THWC[index]

    def _picture(self, video: str, time_s: float, pixels_HWC: NDArray[np.uint8]) -> Thumbnail:
        known = self._known.get((video, time_s))
        if known is None:
            known = Thumbnail(time_s, encode(pixels_HWC))
            self._known[video, time_s] = known
            self.left -= len(known.uri)
        return known


def encode(pixels_HWC: NDArray[np.uint8]) -> str:
    """Return RGB pixels as a JPEG data URI, no side longer than `MAX_SIDE_PX`."""
    image = Image.fromarray(pixels_HWC)
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def moments(
    evidence: Sequence[tuple[float, float]], length_s: float | None, count: int
) -> list[float]:
    """Return up to `count` times to show: inside the evidence first, then spread over the video."""
    inside = [low + (high - low) * share for share in (0.5, 0.1, 0.9) for low, high in evidence]
    times = inside[: max(count - 1, 1)] if length_s else inside[:count]
    if length_s:
        missing = count - len(times)
        times += [length_s * (i + 0.5) / missing for i in range(missing)]
    return sorted(times)


def _clips(
    video: Path, times_s: Sequence[float], fps: float, length_s: float | None
) -> list[tuple[Frames, Sequence[float]]]:
    if length_s is not None and length_s <= WHOLE_VIDEO_S:
        return [(read_frames(video, fps=fps), times_s)]
    around = 2.0
    return [
        (read_frames(video, fps=fps, start_s=max(0.0, t - around), end_s=t + around), [t])
        for t in times_s
    ]
