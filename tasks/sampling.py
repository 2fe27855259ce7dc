"""Which frames of a video are taken, as lmms-eval's stock `qwen3_vl` model takes them.

The choice repeats lmms-eval 0.7.3 (`models/chat/qwen3_vl.py`) with qwen-vl-utils 0.0.14
(`vision_process.py`: `smart_nframes`, `calculate_video_frame_range`, then `torch.linspace(...)`
rounded), so that a number measured here and one measured there saw the same pictures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from internvideo3.tasks.pictures import Reel

FRAME_FACTOR: Final = 2
"""Frame counts are multiples of this: Qwen3-VL merges two frames into one temporal patch."""
MIN_FRAMES: Final = 4


def frame_indices(
    total_frames: int,
    source_fps: float,
    *,
    fps: float = 2.0,
    max_frames: int = 768,
    start_s: float | None = None,
    end_s: float | None = None,
) -> tuple[int, ...]:
    """Frame numbers that stock `qwen3_vl` would take from such a video.

    Raises:
        ValueError: If the video or clip has fewer than two frames.
    """
    first, last = _clip_range(total_frames, source_fps, start_s, end_s)
    available = last - first + 1
    wanted = available / source_fps * fps
    top = math.floor(max_frames / FRAME_FACTOR) * FRAME_FACTOR
    count = math.floor(min(max(wanted, MIN_FRAMES), top, available) / FRAME_FACTOR) * FRAME_FACTOR
    if count < FRAME_FACTOR:
        raise ValueError(f"it has {available} frame(s), and at least {FRAME_FACTOR} are needed")
    return tuple(_rounded_linspace(first, last, count).tolist())


def step_indices(
    total_frames: int, source_fps: float, *, max_frames: int, length_s: float
) -> tuple[int, ...]:
    """Frame numbers at equal whole steps from the first frame, at most one a second.

    Source: longvideobench/LongVideoBench@2aa4f91:longvideobench/longvideobench_dataset.py
    (`load_video`). Numbers beyond the end of the file, where the annotated length is too long, are
    left out.

    Raises:
        ValueError: If the length is shorter than a second.
    """
    count = min(max_frames, int(length_s))
    if count < 1:
        raise ValueError(f"a length of {length_s} s leaves no whole second to take a picture of")
    step = int(int(length_s * source_fps) / count)
    return tuple(step * i for i in range(count) if step * i < total_frames)


def _rounded_linspace(first: int, last: int, count: int) -> NDArray[np.int64]:
    """`torch.linspace(first, last, count).round()` to the bit, without torch.

    torch computes in float32 from both ends towards the middle with fused multiply-add: one
    rounding per value, which float64 followed by one cast reproduces. From about 5,000 frames on,
    plain float64 would pick a neighbouring frame now and then.
    """
    step = float(np.float32(last - first) / np.float32(count - 1))
    i = np.arange(count, dtype=np.float64)
    values = np.where(i < count // 2, first + step * i, last - step * (count - 1 - i))
    return np.rint(values.astype(np.float32)).astype(np.int64)


def _clip_range(
    total_frames: int, source_fps: float, start_s: float | None, end_s: float | None
) -> tuple[int, int]:
    """First and last frame of the clip, both included."""
    duration_s = total_frames / source_fps
    first, last = 0, total_frames - 1
    if start_s is not None:
        first = math.ceil(min(max(start_s, 0.0), duration_s) * source_fps)
    if end_s is not None:
        last = min(math.floor(min(max(end_s, 0.0), duration_s) * source_fps), last)
    if (start_s is not None or end_s is not None) and first >= last:
        raise ValueError(
            f"the clip from {start_s} s to {end_s} s holds fewer than two frames; "
            f"the video lasts {duration_s:.2f} s"
        )
    return first, last


@dataclass(frozen=True, slots=True)
class Choice:
    """Which frames are asked for; the fields are those of `read_frames`."""

    fps: float
    max_frames: int
    start_s: float | None
    end_s: float | None
    steps_over_s: float | None

    def check(self) -> None:
        """Refuse what makes no sense for any video.

        Raises:
            ValueError: as it says.
        """
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be a positive number, got {self.fps}")
        if self.max_frames < FRAME_FACTOR:
            raise ValueError(f"max_frames must be at least {FRAME_FACTOR}, got {self.max_frames}")

    def plan(self, reel: Reel) -> Plan:
        """The frames to take of a file.

        Raises:
            ValueError: it has too few, or no frame rate.
        """
        indices = self.indices(reel.total, reel.fps)
        off_s = 0.0
        if reel.times_N is not None:
            times_T = reel.times_N[list(indices)]
            off_s = float(np.abs(times_T - np.asarray(indices) / reel.fps).max())
        return Plan(indices, reel.fps, reel.total, reel.total / reel.fps, off_s)

    def indices(self, total_frames: int, source_fps: float) -> tuple[int, ...]:
        """Their numbers."""
        if total_frames <= 0 or not source_fps > 0:
            raise ValueError(f"it claims {total_frames} frames at {source_fps} a second")
        if self.steps_over_s is not None:
            return step_indices(
                total_frames, source_fps, max_frames=self.max_frames, length_s=self.steps_over_s
            )
        return frame_indices(
            total_frames,
            source_fps,
            fps=self.fps,
            max_frames=self.max_frames,
            start_s=self.start_s,
            end_s=self.end_s,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What is decoded of a file; the fields are those of `Frames`."""

    indices: tuple[int, ...]
    source_fps: float
    total_frames: int
    duration_s: float
    off_s: float
