"""QK-norm, rotary and key/value append on whatever device the tensors are.

Axes: B batch, H query heads, K key/value heads, T cache capacity, D head width, S = D / 2.
"""

import torch

from internvideo3.kernels.choice import is_power_of_two, on, wants_triton
from internvideo3.kernels.gqa_append import naive


def gqa_append(
    qkv_BW: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    cos_BS: torch.Tensor,
    sin_BS: torch.Tensor,
    slots_B: torch.Tensor,
    keys_BKTD: torch.Tensor,
    values_BKTD: torch.Tensor,
    *,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Normalise and rotate q and k, append k and v; see ``naive.gqa_append``."""
    append = naive.gqa_append
    if wants_triton(qkv_BW) and is_power_of_two(cos_BS.shape[1]):
        from internvideo3.kernels.gqa_append import triton

        append = triton.gqa_append
    with on(qkv_BW.device):
        return append(
            qkv_BW,
            q_norm_D,
            k_norm_D,
            cos_BS,
            sin_BS,
            slots_B,
            keys_BKTD,
            values_BKTD,
            eps=eps,
        )
