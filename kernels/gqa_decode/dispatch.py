"""Grouped-query decode on whatever device the tensors are.

Axes: B batch, H query heads, D head width.
"""

from collections.abc import Sequence

import torch

from internvideo3.kernels.choice import (
    has_room,
    multiprocessors,
    triton_is_installed,
    wants_triton,
)
from internvideo3.kernels.gqa_decode import naive
from internvideo3.kernels.gqa_decode.naive import KeysValues

WIDTHS = (16, 32, 64, 128, 256)
"""Head widths that the kernel takes."""


TILE_BYTES = 71680
"""Shared memory of the kernel's tile at 128 columns, compiled for compute capability 8.9."""
WIDE_TILE_BYTES = 141312
"""At 256."""


def is_static(head_dim: int, device: torch.device) -> bool:
    """Whether keys on a GPU are read by the kernel; else by torch, with lengths on the host."""
    needed = WIDE_TILE_BYTES if head_dim == max(WIDTHS) else TILE_BYTES
    return head_dim in WIDTHS and triton_is_installed() and has_room(device, needed)


def decode_runs(
    q_BHD: torch.Tensor, runs: Sequence[KeysValues], *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query per head over runs of keys and values; see ``naive.decode_runs``."""
    if not is_static(q_BHD.shape[-1], q_BHD.device) or not wants_triton(q_BHD):
        return naive.decode_runs(q_BHD, runs, scale=scale)
    from internvideo3.kernels.gqa_decode import triton

    return triton.decode_runs(
        q_BHD, runs, scale=scale, multiprocessors=multiprocessors(q_BHD.device)
    )
