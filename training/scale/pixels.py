"""Training pixels: painted, degraded as H.264 does, cut into patches.

Letters: N frames, P temporal patches (two frames each), H/W pixels, C channels, D patch values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from internvideo3.model.scale.build import PATCH_SIZE
from internvideo3.tasks.world.difficulty import FILE_FPS
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.scenes import VideoSpec

SIDE_PX = 64
SAMPLE_FPS = 2
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
NOISE = 0.012
"""Standard deviation of pixel noise in 0-1; about what crf 12 leaves."""
_NOISE_BANK = np.random.default_rng(0).normal(0, NOISE, 1 << 20).astype(np.float32)


def sampled_times(length_s: int, fps: int = SAMPLE_FPS) -> Any:
    """Times in seconds of the frames that sampling (at 2 fps) takes from a file, ends included.

    Evenly spaced over the file's frames, as qwen-vl-utils samples; `tasks/video.py` reads the same.
    """
    total = length_s * FILE_FPS
    frames = np.linspace(0, total - 1, length_s * fps).round()
    return frames / FILE_FPS


def training_patches(spec: VideoSpec, rng: np.random.Generator | None) -> Tensor:
    """Vision-tower input of a video at 2 fps.

    Args:
        spec: The video.
        rng: Source of the pixel noise; None paints clean frames.

    Returns:
        `[P,16,D]` float32: sixteen 16-pixel patches for each second, in the order and scale of
        `Qwen3VLVideoProcessor` (2 x 2 merge groups, values in -1..1).
    """
    pixels_NHWC = paint(spec, sampled_times(int(spec.length_s)), SIDE_PX)
    if rng is None:
        return to_patches(torch.from_numpy(pixels_NHWC).float() / 255)
    return to_patches(torch.from_numpy(_like_video(pixels_NHWC, rng)))


def _like_video(pixels_NHWC: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
    """Frames in 0-1 with halved colour resolution (yuv420p) and noise."""
    frames_NHWC = pixels_NHWC.astype(np.float32) * np.float32(1 / 255)
    luma_NHW1 = (frames_NHWC @ LUMA)[..., None]
    chroma_NHWC = frames_NHWC - luma_NHW1
    rows = chroma_NHWC[:, 0::2] + chroma_NHWC[:, 1::2]
    coarse = 0.25 * (rows[:, :, 0::2] + rows[:, :, 1::2])
    smooth_NHWC = coarse.repeat(2, axis=1).repeat(2, axis=2)
    # A slice of a fixed bank: drawing fresh noise would cost more than painting the frames.
    start = int(rng.integers(_NOISE_BANK.size - frames_NHWC[0].size))
    grain_HWC = _NOISE_BANK[start : start + frames_NHWC[0].size].reshape(frames_NHWC[0].shape)
    return np.clip(luma_NHW1 + smooth_NHWC + grain_HWC, 0, 1).astype(np.float32)


def to_patches(frames_NHWC: Tensor) -> Tensor:
    """Cut frames `[N,64,64,3]` in 0-1 into `[N/2,16,D]` as the video processor does."""
    grid = SIDE_PX // PATCH_SIZE
    x = (frames_NHWC * 2 - 1).permute(0, 3, 1, 2)
    x = x.reshape(-1, 2, 3, grid // 2, 2, PATCH_SIZE, grid // 2, 2, PATCH_SIZE)
    # [P, frame, C, row group, row, y, column group, column, x] -> patches in merge groups
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(-1, grid * grid, 3 * 2 * PATCH_SIZE * PATCH_SIZE)
