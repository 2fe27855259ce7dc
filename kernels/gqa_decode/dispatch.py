"""Grouped-query decode on whatever device the tensors are.

Axes: B batch, H query heads, K key/value heads, T cached tokens, D head width.
"""

import torch

from internvideo3.kernels.choice import multiprocessors, wants_triton
from internvideo3.kernels.gqa_decode import naive


def gqa_decode(
    q_BHD: torch.Tensor,
    keys_BKTD: torch.Tensor,
    values_BKTD: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query per head; see ``naive.gqa_decode``."""
    if not wants_triton(q_BHD):
        return naive.gqa_decode(q_BHD, keys_BKTD, values_BKTD, lengths_B, scale=scale)
    from internvideo3.kernels.gqa_decode import triton

    programs = multiprocessors(q_BHD.device) * triton.PROGRAMS_PER_MULTIPROCESSOR
    return triton.gqa_decode(
        q_BHD,
        keys_BKTD,
        values_BKTD,
        lengths_B,
        scale=scale,
        n_splits=max(1, programs // (q_BHD.shape[0] * keys_BKTD.shape[1])),
        tile=triton.TILE,
        parts_dtype=q_BHD.dtype,
    )
