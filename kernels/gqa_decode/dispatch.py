"""Grouped-query decode on whatever device the tensors are.

Axes: B batch, H query heads, D head width.
"""

from collections.abc import Sequence

import torch

from internvideo3.kernels.choice import multiprocessors, triton_is_installed, wants_triton
from internvideo3.kernels.gqa_decode import naive
from internvideo3.kernels.gqa_decode.naive import KeysValues

WIDTHS = (16, 32, 64, 128, 256)
"""Head widths that the kernel takes."""


def is_static(head_dim: int) -> bool:
    """Whether keys on a GPU are read by the kernel; else by torch, with lengths on the host."""
    return head_dim in WIDTHS and triton_is_installed()


def decode_runs(
    q_BHD: torch.Tensor, runs: Sequence[KeysValues], *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query per head over runs of keys and values; see ``naive.decode_runs``."""
    if not is_static(q_BHD.shape[-1]) or not wants_triton(q_BHD):
        return naive.decode_runs(q_BHD, runs, scale=scale)
    from internvideo3.kernels.gqa_decode import triton

    return triton.decode_runs(
        q_BHD, runs, scale=scale, multiprocessors=multiprocessors(q_BHD.device)
    )
