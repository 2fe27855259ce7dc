"""Frames and images at the size that the vision tower takes, for evaluation and training alike.

Axes: T frames, H rows, W columns, C colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from internvideo3.model.prompt import Frames

Decoded = TypeVar("Decoded", bound=Frames)
"""A dataclass of decoded frames (`internvideo3.tasks.video.Frames`)."""


def fit_frames(frames: Decoded, *, factor: int, min_pixels: int, max_pixels: int) -> Decoded:
    """Resize frames to a multiple of `factor` within a pixel budget, keeping their shape nearly."""
    fitted: Any = frames
    pixels_THWC = fit_pixels(
        frames.pixels_THWC, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels
    )
    made: Decoded = replace(fitted, pixels_THWC=pixels_THWC)
    return made


def fit_pixels(
    pixels_THWC: NDArray[np.uint8], *, factor: int, min_pixels: int, max_pixels: int
) -> NDArray[np.uint8]:
    """The pixels of `fit_frames`; a frame's do not depend on which others are given with it.

    The size rule and the interpolation (bicubic, antialiased, on bytes) are those of
    qwen-vl-utils 0.0.14 `vision_process.py: smart_resize, fetch_video`, so that a video gives the
    model the same pixels here as in lmms-eval's own Qwen3-VL class.
    """
    height, width = pixels_THWC.shape[1:3]
    size = _fitted_size(height, width, factor, min_pixels, max_pixels)
    if size == (height, width):
        return pixels_THWC
    pixels_TCHW = torch.from_numpy(np.ascontiguousarray(pixels_THWC)).permute(0, 3, 1, 2)
    resized_TCHW = resize(pixels_TCHW, list(size), InterpolationMode.BICUBIC, antialias=True)
    resized_THWC: NDArray[np.uint8] = resized_TCHW.permute(0, 2, 3, 1).contiguous().numpy()
    return resized_THWC


def fitter(
    factor: int, bounds: Callable[[int], tuple[int, int]]
) -> Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]:
    """What fits frames while more are decoded (`internvideo3.tasks.video.Fit`).

    Args:
        factor: as in `fit_frames`.
        bounds: fewest and most pixels of a frame, by how many frames there are in all.
    """

    def fit(pixels_THWC: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
        low, high = bounds(count)
        return fit_pixels(pixels_THWC, factor=factor, min_pixels=low, max_pixels=high)

    return fit


def fit_image(image: Any, factor: int, min_pixels: int, max_pixels: int) -> Any:
    """A Pillow image by the size rule of `fit_frames`."""
    width, height = image.size
    rows, columns = _fitted_size(height, width, factor, min_pixels, max_pixels)
    return image if (columns, rows) == (width, height) else image.resize((columns, rows))


def _fitted_size(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    fitted = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(fitted) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted = [
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        ]
    elif math.prod(fitted) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        fitted = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return fitted[0], fitted[1]
