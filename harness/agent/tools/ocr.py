"""Tool: text in the picture, by RapidOCR (PP-OCR in ONNX; its weights come in the wheel).

Axes: T frames, H rows, W columns, C colours.
"""

import functools
from typing import Any

import numpy as np

from internvideo3.tasks.video import read_frames

SURE = 0.5
"""Least confidence of a line that is told."""


def run(
    path: str, start_s: float = 0.0, end_s: float | None = None, frames: int = 4
) -> dict[str, Any]:
    """Read text at evenly spaced moments of a part of a video.

    Returns:
        `lines` with at_s, text and score, in order of time, then from top to bottom.

    Raises:
        ValueError: the video cannot be read, or the part is empty.
    """
    count = max(2, frames + frames % 2)
    read = read_frames(path, fps=30.0, max_frames=count, start_s=start_s, end_s=end_s)
    lines = []
    for index, pixels_HWC in zip(read.indices, read.pixels_THWC, strict=True):
        # The engine wants OpenCV's order of colours.
        found = _engine()(np.ascontiguousarray(pixels_HWC[:, :, ::-1]))
        at_s = round(index / read.source_fps, 2)
        for text, score in zip(found.txts or (), found.scores or (), strict=True):
            if score >= SURE:
                lines.append({"at_s": at_s, "text": text, "score": round(float(score), 3)})
    return {"lines": lines}


@functools.cache
def _engine() -> Any:
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "critical"})
