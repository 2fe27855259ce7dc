"""The perception update δ: which frames are seen next, equation (4).

Frames are decoded in a process that can be killed, and fitted as for direct answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from internvideo3.harness.agent.context import Span
from internvideo3.model.fitting import fitter
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import Frames


@dataclass(frozen=True, kw_only=True)
class Sight:
    """How frames are taken."""

    factor: int
    """Pixels of a merged patch's side: frames are multiples of it."""
    min_pixels: int
    """Fewest pixels of a frame."""
    max_pixels: int
    """Most pixels of a frame."""
    fps: float = 2.0
    """Frames a second of the first look."""
    max_frames: int = 64
    """Most frames of the first look."""
    zoom_frames: int = 32
    """Most frames of one further look."""
    video_pixels: tuple[int, int] | None = None
    """Fewest and most pixels of all frames of a look together; None for the bounds of a frame."""

    def bounds(self, frames: int) -> tuple[int, int]:
        """Fewest and most pixels of each of so many frames."""
        if self.video_pixels is None:
            return self.min_pixels, self.max_pixels
        low, high = self.video_pixels
        return low // frames, high // frames


@dataclass(frozen=True)
class Eye:
    """Looks at one video, or at the part of it that a question is about."""

    video: Path
    sight: Sight
    reader: IsolatedReader
    start_s: float | None = None
    """Where the part begins; None for the video's beginning."""
    end_s: float | None = None
    """Where it ends; None for the video's end."""

    def first(self) -> Frames:
        """V_init: all of it, coarsely.

        Raises:
            VideoError: the video cannot be read.
        """
        return self._take(self.sight.fps, self.sight.max_frames, self.start_s, self.end_s)

    def again(self, part: Span, fps: float) -> Frames:
        """V_{i+1}: a part of it, with more frames a second.

        Raises:
            ValueError: nothing can be seen there; the message says why.
        """
        return self._take(fps, self.sight.zoom_frames, *part)

    def tokens(self, frames: Frames) -> int:
        """About how many tokens frames cost: two frames a step, and the step's time in words."""
        count, height, width = map(int, frames.pixels_THWC.shape[:3])
        a_step = (height // self.sight.factor) * (width // self.sight.factor) + 12
        return (count + 1) // 2 * a_step

    def _take(
        self, fps: float, max_frames: int, start_s: float | None, end_s: float | None
    ) -> Frames:
        return self.reader.read(
            self.video,
            fps=fps,
            max_frames=max_frames,
            start_s=start_s,
            end_s=end_s,
            fit=fitter(self.sight.factor, self.sight.bounds),
        )


def seen_span(frames: Frames) -> Span:
    """From the first frame to the end of the last, in seconds."""
    first, last = frames.indices[0], frames.indices[-1] + 1
    return round(first / frames.source_fps, 3), round(last / frames.source_fps, 3)


def interval_s(frames: Frames) -> float:
    """Seconds between two frames."""
    start_s, end_s = seen_span(frames)
    return (end_s - start_s) / len(frames.indices)
