"""Grouped-query decode on whatever device the tensors are.

Axes: B batch, H query heads, D head width.
"""

from collections.abc import Sequence

import torch

from internvideo3.kernels.choice import (
    TRITON_DTYPES,
    has_room,
    multiprocessors,
    on,
    triton_is_installed,
    wants_triton,
)
from internvideo3.kernels.gqa_decode import naive
from internvideo3.kernels.gqa_decode.naive import KeysValues

WIDTHS = (16, 32, 64, 128, 256)
"""Head widths that the kernel takes."""


def tile_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Shared memory of the kernel's tile, compiled for compute capability 8.9."""
    if dtype == torch.float32:
        return 84032 if head_dim == max(WIDTHS) else 43072
    return 141312 if head_dim == max(WIDTHS) else 71680


def is_static(head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether keys on a GPU are read by the kernel; else by torch, with lengths on the host."""
    fits = head_dim in WIDTHS and dtype in TRITON_DTYPES and triton_is_installed()
    return fits and has_room(device, tile_bytes(head_dim, dtype))


def decode_runs(
    q_BHD: torch.Tensor, runs: Sequence[KeysValues], *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query per head over runs of keys and values; see ``naive.decode_runs``."""
    fits = is_static(q_BHD.shape[-1], q_BHD.dtype, q_BHD.device)
    if not fits or not wants_triton(q_BHD):
        return naive.decode_runs(q_BHD, runs, scale=scale)
    from internvideo3.kernels.gqa_decode import triton

    with on(q_BHD.device):
        return triton.decode_runs(
            q_BHD, runs, scale=scale, multiprocessors=multiprocessors(q_BHD.device)
        )
