"""Frames of a video file, chosen and decoded as lmms-eval's stock `qwen3_vl` model does.

The choice of frames repeats lmms-eval 0.7.3 (`models/chat/qwen3_vl.py`) with qwen-vl-utils 0.0.14
(`vision_process.py`: `smart_nframes`, `calculate_video_frame_range`, then `torch.linspace(...)`
rounded), so that a number measured here and one measured there saw the same pictures.

Axes: T frames, H rows, W columns, C colours (red, green, blue).
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FRAME_FACTOR: Final = 2
"""Frame counts are multiples of this: Qwen3-VL merges two frames into one temporal patch."""
MIN_FRAMES: Final = 4
TIME_LIMIT_S: Final = 300.0
MAX_BYTES: Final = 8 << 30
"""Decoded pixels of one call; more is refused before it is allocated."""

_CHUNK: Final = 64
"""Frames decoded between two looks at the clock."""
_SMALL_FILE: Final = 4 << 20
"""Below this size starting decoder threads costs more than they save (measured: twice the time)."""


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
    """SHA-256 of pixels, indices and frame rate: equal digests are equal model inputs."""


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
    time_limit_s: float = TIME_LIMIT_S,
    speak: bool = False,
) -> Frames:
    """Decode evenly spaced frames of a video, or of a clip of it.

    decord decodes; where it fails (or has no build for the platform) PyAV does, and must then
    deliver every frame without an error. The work runs in a daemon thread that looks at the clock
    between chunks of frames. A native call that never returns cannot be killed from here: the
    caller gets its error at the limit all the same, and the thread is left behind.

    Args:
        path: A local file.
        fps: Frames to take for each second of video.
        max_frames: Upper bound on frames, spread over the whole length when it binds.
        start_s: Start of the clip in seconds; None for the start of the video.
        end_s: End of the clip in seconds; None for the end of the video.
        steps_over_s: Length of the video as annotated, in seconds, for single pictures as
            LongVideoBench takes them (see `step_indices`); `fps` and the clip do not count then.
        time_limit_s: Longest wait for the decoders, in seconds.
        speak: Whether decord writes what it finds damaged to standard error; it hides damage in a
            picture and goes on.

    Returns:
        An even number of frames, at least 2; of single pictures any number from 1.

    Raises:
        VideoError: If the file is missing, empty, no video, damaged, too short or too large to
            decode, or if the time limit is reached.
        ValueError: If `fps`, `max_frames` or the clip make no sense.
    """
    _check_request(fps, max_frames)
    file = Path(path)
    _check_file(file)
    choice = _Choice(fps, max_frames, start_s, end_s, steps_over_s)
    job = _Job(file, choice, time.monotonic() + time_limit_s, speak)
    thread = threading.Thread(target=job.run, name=f"decode {file.name}", daemon=True)
    thread.start()
    # Half a second of grace, so that the thread's own look at the clock comes first.
    thread.join(time_limit_s + 0.5)
    if job.error is not None:
        raise job.error
    if job.frames is None:
        raise _too_slow(file)
    return job.frames


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
class _Choice:
    fps: float
    max_frames: int
    start_s: float | None
    end_s: float | None
    steps_over_s: float | None

    def indices(self, total_frames: int, source_fps: float) -> tuple[int, ...]:
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


@dataclass(slots=True)
class _Job:
    """One decode: runs in its own thread and leaves either frames or an error."""

    path: Path
    choice: _Choice
    deadline: float
    speak: bool
    frames: Frames | None = None
    error: BaseException | None = None
    _failures: list[str] = field(default_factory=list)

    def run(self) -> None:
        try:
            self.frames = self._decode()
        except BaseException as error:  # raised again in the waiting thread
            self.error = error

    def _decode(self) -> Frames:
        first_error: Exception | None = None
        decord = functools.partial(_read_decord, speak=self.speak)
        for name, reader in (("decord", decord), ("PyAV", _read_pyav)):
            try:
                return reader(self.path, self.choice, self._check_clock)
            except VideoError:
                raise
            except Exception as error:
                first_error = first_error or error
                self._failures.append(f"{name}: {_first_line(error)}")
        reason = "; ".join(dict.fromkeys(self._failures))
        raise VideoError(
            f"cannot read the video {self.path}: {reason}. "
            "Check that it plays, or fetch or build it again"
        ) from first_error

    def _check_clock(self) -> None:
        if time.monotonic() > self.deadline:
            raise _too_slow(self.path)


def _read_decord(
    path: Path, choice: _Choice, check_clock: Callable[[], None], *, speak: bool
) -> Frames:
    import decord  # here: 0.1 s that a run without videos need not pay

    decord.logging.set_level(decord.logging.ERROR if speak else decord.logging.QUIET)
    threads = 1 if path.stat().st_size < _SMALL_FILE else 0
    reader = decord.VideoReader(str(path), num_threads=threads)
    total, source_fps = len(reader), float(reader.get_avg_fps())
    indices = choice.indices(total, source_fps)

    def chunks() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(indices), _CHUNK):
            check_clock()
            yield reader.get_batch(indices[start : start + _CHUNK]).asnumpy()

    return _assemble(path, chunks(), indices, source_fps, total)


def _read_pyav(path: Path, choice: _Choice, check_clock: Callable[[], None]) -> Frames:
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise VideoError(
                f"{path} has no picture: its streams are "
                f"{[stream.type for stream in container.streams]}. Give a file with a video stream"
            )
        stream = container.streams.video[0]
        source_fps = float(stream.average_rate or 0)
        total = sum(packet.pts is not None for packet in container.demux(stream))
    indices = choice.indices(total, source_fps)
    with av.open(str(path)) as container:
        chunks = _pick(container, set(indices), check_clock)
        frames = _assemble(path, chunks, indices, source_fps, total)
    return frames


def _pick(
    container: Any, wanted: set[int], check_clock: Callable[[], None]
) -> Iterator[NDArray[np.uint8]]:
    last = max(wanted)
    # Damage in a picture is an error; otherwise the decoder would hide it.
    container.streams.video[0].codec_context.options = {"err_detect": "explode"}
    for number, frame in enumerate(container.decode(video=0)):
        if number % _CHUNK == 0:
            check_clock()
        if number in wanted:
            yield frame.to_ndarray(format="rgb24")[None]
        if number == last:
            return


def _assemble(
    path: Path,
    chunks_THWC: Iterator[NDArray[np.uint8]],
    indices: tuple[int, ...],
    source_fps: float,
    total_frames: int,
) -> Frames:
    pixels_THWC: NDArray[np.uint8] | None = None
    filled = 0
    for chunk_THWC in chunks_THWC:
        if pixels_THWC is None:
            shape = (len(indices), *chunk_THWC.shape[1:])
            _check_size(path, shape)
            pixels_THWC = np.empty(shape, np.uint8)
        pixels_THWC[filled : filled + len(chunk_THWC)] = chunk_THWC
        filled += len(chunk_THWC)
    if pixels_THWC is None or filled < len(indices):
        raise ValueError(f"only {filled} of {len(indices)} frames could be decoded")
    return Frames(
        pixels_THWC=pixels_THWC,
        indices=indices,
        source_fps=source_fps,
        total_frames=total_frames,
        duration_s=total_frames / source_fps,
        digest=_digest(pixels_THWC, indices, source_fps),
    )


def _digest(pixels_THWC: NDArray[np.uint8], indices: tuple[int, ...], source_fps: float) -> str:
    sha = hashlib.sha256(repr((pixels_THWC.shape, indices, source_fps)).encode())
    sha.update(pixels_THWC.data)
    return sha.hexdigest()


def _check_request(fps: float, max_frames: int) -> None:
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a positive number, got {fps}")
    if max_frames < FRAME_FACTOR:
        raise ValueError(f"max_frames must be at least {FRAME_FACTOR}, got {max_frames}")


def _check_file(path: Path) -> None:
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
            f"{path}: {shape[0]} frames of {shape[2]}x{shape[1]} need {needed / 2**30:.1f} GiB "
            f"decoded, the limit is {MAX_BYTES / 2**30:.0f} GiB. Lower max_frames or fps, or scale "
            "the file down"
        )


def _too_slow(path: Path) -> VideoError:
    return VideoError(
        f"decoding {path} reached its time limit. The file may be damaged; for a very long video "
        "raise time_limit_s"
    )


def _first_line(error: Exception) -> str:
    """The message without decord's source positions and C++ stack."""
    text = re.sub(r"\[[\d:]+\] \S+?:\d+: ", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
