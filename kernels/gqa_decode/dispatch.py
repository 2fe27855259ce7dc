"""Grouped-query decode on whatever device the tensors are.

Axes: B batch, H query heads, D head width.
"""

from collections.abc import Sequence

import torch

from internvideo3.kernels.choice import is_power_of_two, multiprocessors, wants_triton
from internvideo3.kernels.gqa_decode import naive
from internvideo3.kernels.gqa_decode.naive import KeysValues


def decode_runs(
    q_BHD: torch.Tensor, runs: Sequence[KeysValues], *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query per head over runs of keys and values; see ``naive.decode_runs``."""
    if not is_power_of_two(q_BHD.shape[-1]) or not wants_triton(q_BHD):
        return naive.decode_runs(q_BHD, runs, scale=scale)
    from internvideo3.kernels.gqa_decode import triton

    return triton.decode_runs(
        q_BHD, runs, scale=scale, multiprocessors=multiprocessors(q_BHD.device)
    )
