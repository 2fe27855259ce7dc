"""What comes before the language model: decoding a video, and encoding its frames.

Axes: T frames, H height, W width.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from internvideo3.harness.profile.measure import Row, spread
from internvideo3.harness.profile.subjects import Subject
from internvideo3.model.session import Session
from internvideo3.tasks.video import Frames, read_frames

VIDEO_TEXT = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"


UNTIMED = 1
"""Runs before the timed ones: the first finds nothing in the caches and the pool of threads."""


def decoding_row(
    video: Path, fps: float, max_frames: int, repeats: int, untimed: int = UNTIMED
) -> tuple[Row, Frames]:
    """Time reading frames, so many a second, from a file; returns the row and the frames.

    Raises:
        VideoError: the file cannot be decoded.
    """
    seconds = []
    for _ in range(untimed + repeats):
        started = time.perf_counter()
        frames = read_frames(video, fps=fps, max_frames=max_frames)
        seconds.append(time.perf_counter() - started)
    count, height, width, _ = frames.pixels_THWC.shape
    row = {
        "kind": "video_decoding",
        **spread(seconds[untimed:], count),
        "frames": count,
        "fps": fps,
        "of_frames": frames.total_frames,
        "height": height,
        "width": width,
        "video": video.name,
    }
    row["frames_per_s"] = row.pop("tokens_per_s")
    return row, frames


@torch.no_grad()
def encoding_row(subject: Subject, frames: Frames, repeats: int, untimed: int = UNTIMED) -> Row:
    """Time the vision tower on decoded frames: vision tokens a second, the processor left out."""
    assert subject.processor is not None, "random weights have no processor"
    session = Session(subject.model, subject.processor)
    piece = session._prompter.piece(VIDEO_TEXT, [frames])
    seconds, count = [], 0
    for _ in range(untimed + repeats):
        fresh = Session(subject.model, subject.processor)
        encoded: Any = fresh._encode(piece)
        seconds.append(fresh.encode_s)
        count = len(encoded.tokens_VX)
    return {"kind": "vision_encoding", **spread(seconds[untimed:], count), "vision_tokens": count}
