"""Small pictures of the moments that a question is about, of frames that the model was given."""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.sampling import frame_indices, step_indices
from internvideo3.tasks.video import Frames

MAX_SIDE_PX = 160
JPEG_QUALITY = 78
WHOLE_VIDEO_S = 180.0
"""Of longer videos only the wanted frames are decoded."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """One picture."""

    time_s: float
    """Time of the frame in the video."""
    uri: str
    """The JPEG as a data URI."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames of a video a model was given, as `tasks.video.read_frames` takes them."""

    fps: float
    max_frames: int
    steps_over_s: float | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which pictures of a video to take."""

    times_s: tuple[float, ...]
    """Moments, the most wanted first."""
    count: int
    """Pictures to take; moments that fall on the same frame give one."""
    sampling: Sampling | None = None
    """The frames to choose from; None for all frames of the video."""


@dataclass(frozen=True, slots=True)
class _Size:
    """What of a video decides which frames are taken."""

    frames: int
    fps: float

    @property
    def length_s(self) -> float:
        return self.frames / self.fps

    def chosen(self, sampling: Sampling | None) -> Sequence[int]:
        """Frame numbers that the sampler takes.

        Raises:
            ValueError: it takes none.
        """
        if sampling is None:
            return range(self.frames)
        if sampling.steps_over_s is not None:
            most, length_s = sampling.max_frames, sampling.steps_over_s
            return step_indices(self.frames, self.fps, max_frames=most, length_s=length_s)
        most = sampling.max_frames
        return frame_indices(self.frames, self.fps, fps=sampling.fps, max_frames=most)


class Thumbnailer:
    """Takes thumbnails until a budget of bytes is spent; keeps the last decoded video."""

    def __init__(self, budget_bytes: int):
        self.left = budget_bytes
        self.failed: dict[str, str] = {}
        """Videos that could not be read, with the reason."""
        self._known: dict[tuple[str, int], Thumbnail] = {}
        self._last: tuple[tuple[Path, Sampling], Frames] | None = None
        self._sizes: dict[Path, _Size] = {}
        # A file that crashed the decoder in the run must not end the report.
        self._reader = IsolatedReader()

    def close(self) -> None:
        """End the decoding process."""
        self._reader.close()

    def length_s(self, video: Path) -> float | None:
        """Return a video's length, for annotations that do not tell it; `None` if unreadable."""
        if str(video) in self.failed:
            return None
        try:
            return self._size(video).length_s
        except (ValueError, OSError) as error:
            self.failed[str(video)] = str(error)
            return None

    def take(self, video: Path, wanted: Wanted) -> list[Thumbnail]:
        """Return pictures of the frames nearest to the wanted moments, in order of time.

        Fewer or none if the budget is spent or the video cannot be read (see `failed`).
        """
        if self.left <= 0 or str(video) in self.failed:
            return []
        try:
            size = self._size(video)
            found = {}
            for number in _nearest(size, wanted):
                picture = self._known.get((str(video), number))
                if picture is None:
                    pixels_HWC = self._frame(video, size, number, wanted.sampling)
                    picture = self._picture(video, number, number / size.fps, pixels_HWC)
                found[number] = picture
        except (ValueError, OSError) as error:
            self.failed[str(video)] = str(error)
            return []
        return [found[number] for number in sorted(found)]

    def _size(self, video: Path) -> _Size:
        if video not in self._sizes:
            ends = self._reader.read(video, fps=1.0, max_frames=2)
            self._sizes[video] = _Size(ends.total_frames, ends.source_fps)
        return self._sizes[video]

    def _frame(
        self, video: Path, size: _Size, number: int, sampling: Sampling | None
    ) -> NDArray[np.uint8]:
        """One frame: out of all that the sampler takes of a short video, else read alone."""
        if sampling is None or size.length_s > WHOLE_VIDEO_S:
            # The reader takes two frames at least; a quarter of a frame keeps clear of rounding.
            first = min(number, size.frames - 2)
            start_s, end_s = (first - 0.25) / size.fps, (first + 1.25) / size.fps
            frames = self._reader.read(video, max_frames=2, start_s=start_s, end_s=end_s)
        else:
            if self._last is None or self._last[0] != (video, sampling):
                self._last = (video, sampling), self._reader.read(video, **asdict(sampling))
            frames = self._last[1]
        pixels_HWC: NDArray[np.uint8] = frames.pixels_THWC[frames.indices.index(number)]
        return pixels_HWC

    def _picture(
        self, video: Path, number: int, time_s: float, pixels_HWC: NDArray[np.uint8]
    ) -> Thumbnail:
        made = Thumbnail(round(time_s, 3), encode(pixels_HWC))
        self._known[str(video), number] = made
        self.left -= len(made.uri)
        return made


def _nearest(size: _Size, wanted: Wanted) -> list[int]:
    """Numbers of the frames nearest to the moments, no more than are wanted."""
    numbers_T = np.asarray(size.chosen(wanted.sampling))
    nearest = (numbers_T[np.abs(numbers_T / size.fps - at_s).argmin()] for at_s in wanted.times_s)
    return list(dict.fromkeys(map(int, nearest)))[: wanted.count]


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
