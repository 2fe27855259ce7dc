"""A token's row and queries on whatever device the tensors are.

Axes: B sequences, P projections, H query heads, S rotary slots, C cache slots, W row width.
"""

import torch

from internvideo3.kernels.choice import is_power_of_two, on, wants_triton
from internvideo3.kernels.latent_token import naive
from internvideo3.kernels.latent_token.naive import TokenMaps


def latent_token(
    qkv_BP: torch.Tensor,
    maps: TokenMaps,
    cos_BS: torch.Tensor,
    sin_BS: torch.Tensor,
    slots_B: torch.Tensor,
    rows_CW: torch.Tensor,
) -> torch.Tensor:
    """Write rows, make queries; see ``naive.latent_token``."""
    kv_heads, dim, _ = maps.k_up_KDR.shape
    fits = dim >= 16 and all(is_power_of_two(n) for n in (dim, kv_heads, cos_BS.shape[1]))
    if not fits or not wants_triton(qkv_BP):
        return naive.latent_token(qkv_BP, maps, cos_BS, sin_BS, slots_B, rows_CW)
    from internvideo3.kernels.latent_token import triton

    with on(qkv_BP.device):
        return triton.latent_token(qkv_BP, maps, cos_BS, sin_BS, slots_B, rows_CW)
