"""Frames of a video file: chosen as `sampling.py` says, decoded as `pictures.py` does, and fitted.

They are those of lmms-eval's stock `qwen3_vl` model wherever decord, which decodes there, gives the
pictures that it is asked for.

Axes: T frames, H rows, W columns, C colours (red, green, blue).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from internvideo3.tasks.pictures import LostError, read_reel
from internvideo3.tasks.sampling import Choice, Plan

TIME_LIMIT_S: Final = 300.0
"""Longest that a video is decoded, or twice its length if that is longer, up to `MOST_S`."""
MOST_S: Final = 6 * 3600.0
MAX_BYTES: Final = 8 << 30
"""Pixels that one call may keep; more is refused before it is allocated."""

_CHUNK: Final = 64
"""Most frames that are fitted at once."""
_CHUNK_BYTES: Final = 64 << 20
"""Most bytes of them, if that is more than one frame."""

Fit = Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]
"""Some frames' pixels `[T,H,W,C]` and how many frames there are in all → the pixels to keep."""


class VideoError(ValueError):
    """A video that cannot be read; the message says which file, why, and what to do."""


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """Decoded frames and where in the source they come from."""

    pixels_THWC: NDArray[np.uint8]
    """RGB, 0 to 255."""
    indices: tuple[int, ...]
    """Frame numbers in the file, counted from 0; the time of one is `index / source_fps`."""
    source_fps: float
    total_frames: int
    """Frames in the whole file, also when only a clip of it was read."""
    duration_s: float
    digest: str
    """SHA-256 of decoded pixels, indices and frame rate: equal digests are equal model inputs."""
    off_s: float = 0.0
    """Farthest that a frame's own time in the file is from `index / source_fps`, in seconds."""


def joined(looks: Sequence[Frames]) -> list[Frames]:
    """Looks in order of time as one list of frames; those of another size begin a list anew."""
    lists: list[list[Frames]] = []
    for look in looks:
        if lists and lists[-1][-1].pixels_THWC.shape[1:] == look.pixels_THWC.shape[1:]:
            lists[-1].append(look)
        else:
            lists.append([look])
    return [_one(parts) for parts in lists]


def _one(parts: Sequence[Frames]) -> Frames:
    if len(parts) == 1:
        return parts[0]
    digest = hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest()
    return replace(
        parts[0],
        pixels_THWC=np.concatenate([part.pixels_THWC for part in parts]),
        indices=tuple(index for part in parts for index in part.indices),
        digest=digest,
    )


def read_frames(
    path: str | Path,
    *,
    fps: float = 2.0,
    max_frames: int = 768,
    start_s: float | None = None,
    end_s: float | None = None,
    steps_over_s: float | None = None,
    time_limit_s: float | None = None,
    fit: Fit | None = None,
) -> Frames:
    """Decode evenly spaced frames of a video, or of a clip of it.

    The work runs in a daemon thread that looks at the clock at every packet. A native call that
    never returns cannot be killed from here: the caller gets its error at the limit all the same,
    and the thread is left behind.

    Args:
        path: A local file.
        fps: Frames to take for each second of video.
        max_frames: Upper bound on frames, spread over the whole length when it binds.
        start_s: Start of the clip in seconds; None for the start of the video.
        end_s: End of the clip in seconds; None for the end of the video.
        steps_over_s: Length of the video as annotated, in seconds, for single pictures as
            LongVideoBench takes them (`sampling.step_indices`); `fps` and the clip do not
            count then.
        time_limit_s: Longest wait for the decoder, in seconds; None for what the video's length
            allows (see `TIME_LIMIT_S`).
        fit: Makes frames smaller while more are decoded, so that only fitted ones are in memory;
            None to keep them as they are.

    Returns:
        An even number of frames, at least 2; of single pictures any number from 1.

    Raises:
        VideoError: If the file is missing, empty, no video, damaged, too short or too large to
            keep, or if the time limit is reached.
        ValueError: If `fps`, `max_frames` or the clip make no sense.
    """
    choice = Choice(fps, max_frames, start_s, end_s, steps_over_s)
    file, clock = Path(path), Clock.of(time_limit_s)
    choice.check()
    check_file(file)
    gathered = Gathered(file, fit)
    job = _Job(file, choice, clock, gathered)
    thread = threading.Thread(target=job.run, name=f"decode {file.name}", daemon=True)
    thread.start()
    # Half a second of grace, so that the thread's own look at the clock comes first.
    while thread.is_alive() and (left_s := clock.left_s() + 0.5) > 0:
        thread.join(left_s)
    if job.error is not None:
        raise job.error
    if job.digest is None:
        raise too_slow(file, clock.limit_s)
    return gathered.frames(job.digest)


class Receiver(Protocol):
    """Takes frames as they are decoded."""

    def begin(self, plan: Plan) -> None:
        """Frames will come; those that came before are to be forgotten."""

    def add(self, pixels_THWC: NDArray[np.uint8]) -> None:
        """The next frames."""


class Gathered:
    """Frames as they come, fitted: only what is kept of them, and a chunk, is in memory."""

    def __init__(self, path: Path, fit: Fit | None) -> None:
        self.path = path
        self.fit = fit
        self.plan: Plan | None = None
        self._pixels_THWC: NDArray[np.uint8] | None = None
        self._filled = 0

    def begin(self, plan: Plan) -> None:
        """Begin, or begin anew."""
        self.plan, self._pixels_THWC, self._filled = plan, None, 0

    def add(self, pixels_THWC: NDArray[np.uint8]) -> None:
        """Fit and keep frames.

        Raises:
            VideoError: All of them would be too large.
        """
        assert self.plan is not None
        count = len(self.plan.indices)
        kept_THWC = pixels_THWC if self.fit is None else self.fit(pixels_THWC, count)
        if self._pixels_THWC is None:
            shape = (count, *kept_THWC.shape[1:])
            _check_size(self.path, shape)
            self._pixels_THWC = np.empty(shape, np.uint8)
        self._pixels_THWC[self._filled : self._filled + len(kept_THWC)] = kept_THWC
        self._filled += len(kept_THWC)

    def frames(self, digest: str) -> Frames:
        """All of them, when all have come."""
        assert self.plan is not None and self._pixels_THWC is not None
        assert self._filled == len(self.plan.indices)
        return Frames(
            pixels_THWC=self._pixels_THWC,
            indices=self.plan.indices,
            source_fps=self.plan.source_fps,
            total_frames=self.plan.total_frames,
            duration_s=self.plan.duration_s,
            digest=digest,
            off_s=self.plan.off_s,
        )


@dataclass(slots=True)
class Clock:
    """How long decoding may still take; what happens to the frames meanwhile does not count."""

    limit_s: float
    grows: bool
    """Whether a long video may take longer."""
    _started: float = field(default_factory=time.monotonic)
    _paused: float | None = None
    """Since when it stands still."""

    @classmethod
    def of(cls, limit_s: float | None) -> Clock:
        """A clock that starts now; without a limit it takes the video's length into account."""
        return cls(TIME_LIMIT_S if limit_s is None else limit_s, grows=limit_s is None)

    def allow(self, duration_s: float) -> None:
        """Take in how long the video lasts."""
        if self.grows:
            self.limit_s = max(TIME_LIMIT_S, min(2 * duration_s, MOST_S))

    def left_s(self) -> float:
        """Seconds that are left; below 0 when the limit is reached."""
        return self._started + self.limit_s - (self._paused or time.monotonic())

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what is done in the block."""
        self._paused = before = time.monotonic()
        yield
        self._started += time.monotonic() - before
        self._paused = None


def decode(path: Path, choice: Choice, clock: Clock, receiver: Receiver) -> str:
    """Decode frames into a receiver.

    Returns:
        The digest that belongs to them.

    Raises:
        VideoError: as `read_frames`.
    """

    def tick() -> None:
        if clock.left_s() < 0:
            raise too_slow(path, clock.limit_s)

    with _in_words(path):
        reel = read_reel(path, tick)
    while True:
        with _in_words(path):
            plan = choice.plan(reel)
        clock.allow(plan.duration_s)
        with clock.paused():
            receiver.begin(plan)
        try:
            return _deliver(path, reel.pictures(plan.indices, tick), plan, clock, receiver)
        except LostError as lost:
            reel = lost.instead


def _deliver(
    path: Path,
    pictures_HWC: Iterator[NDArray[np.uint8]],
    plan: Plan,
    clock: Clock,
    receiver: Receiver,
) -> str:
    sha = None
    for chunk_THWC in _chunks(path, pictures_HWC):
        if sha is None:
            shape = (len(plan.indices), *chunk_THWC.shape[1:])
            sha = hashlib.sha256(repr((shape, plan.indices, plan.source_fps)).encode())
        sha.update(chunk_THWC.data)
        with clock.paused():
            receiver.add(chunk_THWC)
    assert sha is not None
    return sha.hexdigest()


def _chunks(path: Path, pictures_HWC: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    with _in_words(path):
        for first_HWC in pictures_HWC:
            size = max(1, min(_CHUNK, _CHUNK_BYTES // first_HWC.nbytes))
            yield np.stack([first_HWC, *itertools.islice(pictures_HWC, size - 1)])


@contextlib.contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """What a decoder raises in words of ours; it raises anything."""
    try:
        yield
    except (VideoError, LostError):
        raise
    except Exception as error:
        raise VideoError(
            f"cannot read the video {path}: {_first_line(error)}. "
            "Check that it plays, or fetch or build it again"
        ) from error


@dataclass(slots=True)
class _Job:
    """One decode: runs in its own thread and leaves either a digest or an error."""

    path: Path
    choice: Choice
    clock: Clock
    receiver: Receiver
    digest: str | None = None
    error: BaseException | None = None

    def run(self) -> None:
        try:
            self.digest = decode(self.path, self.choice, self.clock, self.receiver)
        except BaseException as error:  # raised again in the waiting thread
            self.error = error


def check_file(path: Path) -> None:
    """Refuse a file that is not there, or nothing.

    Raises:
        VideoError: as it says.
    """
    try:
        size = path.stat().st_size
        if path.is_file() and size > 0:
            with path.open("rb"):
                return
    except FileNotFoundError:
        raise VideoError(
            f"no video at {path}. Check the path; videos of the scale world are made by "
            "`internvideo3 world build`"
        ) from None
    except OSError as error:
        raise VideoError(f"cannot open the video {path}: {error.strerror}") from error
    what = "is empty (0 bytes); fetch or build it again" if path.is_file() else "is not a file"
    raise VideoError(f"the video {path} {what}")


def _check_size(path: Path, shape: tuple[int, ...]) -> None:
    needed = math.prod(shape)
    if needed > MAX_BYTES:
        raise VideoError(
            f"{path}: {shape[0]} frames of {shape[2]}x{shape[1]} need {needed / 2**30:.1f} GiB, "
            f"the limit is {MAX_BYTES / 2**30:.0f} GiB. Lower max_frames, fps or max_pixels"
        )


def too_slow(path: str | Path, limit_s: float) -> VideoError:
    """The error of a video whose decoding reached its limit."""
    return VideoError(
        f"decoding {path} reached its time limit of {limit_s:g} s. The file may be damaged; if it "
        "plays, give more: --decode-limit of eval, time_limit_s in Python"
    )


def _first_line(error: Exception) -> str:
    """The message, without the number and path that a decoder's error has around it."""
    text = str(getattr(error, "strerror", None) or error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
