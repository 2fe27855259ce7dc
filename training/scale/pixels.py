"""Training pixels on the model's device: drawn, degraded as H.264 does, cut into patches.

Letters: N frames, P temporal patches (two frames each), H/W pixels, C channels, D patch values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internvideo3.model.scale.build import PATCH_SIZE
from internvideo3.tasks.world.render import Tracks, draw

SIDE_PX = 64
LUMA = (0.299, 0.587, 0.114)
NOISE = 0.012
"""Standard deviation of pixel noise in 0-1; about what crf 12 leaves."""


def tracks_on(shown: Tracks, device: torch.device) -> Tracks:
    """The tracks as tensors on a device."""
    return Tracks(*(torch.as_tensor(part).to(device, non_blocking=True) for part in shown))


def training_patches(shown: Tracks, generator: torch.Generator | None) -> Tensor:
    """Vision-tower input of the tracks' frames.

    Args:
        shown: Tracks of N frames as tensors, N even.
        generator: Source of the pixel noise; None draws clean frames.

    Returns:
        `[P,16,D]` float32: sixteen 16-pixel patches for each of N/2 temporal patches, in the order
        and scale of `Qwen3VLVideoProcessor` (2 x 2 merge groups, values in -1..1).
    """
    frames_NHWC: Tensor = draw(shown, SIDE_PX, torch)
    if generator is not None:
        frames_NHWC = _like_video(frames_NHWC, generator)
    return to_patches(frames_NHWC)


def _like_video(frames_NHWC: Tensor, generator: torch.Generator) -> Tensor:
    """Halve the colour resolution (yuv420p) and add noise."""
    luma_NHW = sum(
        weight * frames_NHWC[..., index] for index, weight in enumerate(LUMA)
    )  # a Tensor: the sum starts from the first product
    chroma_NCHW = (frames_NHWC - torch.as_tensor(luma_NHW)[..., None]).permute(0, 3, 1, 2)
    coarse = torch.nn.functional.avg_pool2d(chroma_NCHW, 2)
    smooth = torch.nn.functional.interpolate(coarse, scale_factor=2, mode="nearest")
    frames = torch.as_tensor(luma_NHW)[..., None] + smooth.permute(0, 2, 3, 1)
    noise = torch.randn(frames.shape, generator=generator, device=frames.device)
    return (frames + NOISE * noise).clamp(0, 1)


def to_patches(frames_NHWC: Tensor) -> Tensor:
    """Cut frames `[N,64,64,3]` in 0-1 into `[N/2,16,D]` as the video processor does."""
    grid = SIDE_PX // PATCH_SIZE
    x: Any = (frames_NHWC * 2 - 1).permute(0, 3, 1, 2)
    x = x.reshape(-1, 2, 3, grid // 2, 2, PATCH_SIZE, grid // 2, 2, PATCH_SIZE)
    # [P, frame, C, row group, row, y, column group, column, x] -> patches in merge groups
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    patches: Tensor = x.reshape(-1, grid * grid, 3 * 2 * PATCH_SIZE * PATCH_SIZE)
    return patches
