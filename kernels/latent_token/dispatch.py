"""A token's row and queries on whatever device the tensors are.

Axes: B sequences, P projections, H query heads, S rotary slots, C cache slots, W row width.
"""

import torch

from internvideo3.kernels.choice import is_power_of_two, wants_triton
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
    _, dim, _ = maps.query_HDW.shape
    kv_heads = maps.row_WE.shape[1] // (2 * dim)
    fits = all(is_power_of_two(n) for n in (dim, kv_heads, cos_BS.shape[1]))
    run = naive.latent_token
    if fits and wants_triton(qkv_BP):
        from internvideo3.kernels.latent_token import triton

        run = triton.latent_token
    return run(qkv_BP, maps, cos_BS, sin_BS, slots_B, rows_CW)
