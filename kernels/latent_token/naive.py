"""From one token's projections to its cache row and its absorbed queries, in plain torch.

Axes: B sequences, P projections = (H + 2 K) D, H query heads, K key/value heads, D head width,
E = 2 K D (a token's keys and values), W row width, S rotary slots, C cache slots.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from internvideo3.kernels.gqa_append.naive import rms_norm
from internvideo3.kernels.latent_append.naive import rotate


@dataclass(frozen=True)
class TokenMaps:
    """What one layer needs; a row is ``[latent | rotary pairs]``, W = R + 2 S."""

    q_norm_D: torch.Tensor
    """RMS-norm gains of the queries."""
    k_norm_D: torch.Tensor
    eps: float
    row_WE: torch.Tensor
    """``[keys | values] -> row`` before rotation."""
    bias_W: torch.Tensor
    query_HDW: torch.Tensor
    """``query -> absorbed query`` of each head, before rotation."""


def latent_token(
    qkv_BP: torch.Tensor,
    maps: TokenMaps,
    cos_BS: torch.Tensor,
    sin_BS: torch.Tensor,
    slots_B: torch.Tensor,
    rows_CW: torch.Tensor,
) -> torch.Tensor:
    """Write each sequence's row at its slot, in place, and make its queries.

    ``row = rotate(row_WE [norm(k) | v] + bias)`` and ``q_h = rotate(query_h norm(q_h))``, where
    only the last 2 S columns rotate.

    Args:
        qkv_BP: queries, keys and values as projected, head after head.
        maps: the layer's weights.
        cos_BS: cosines of each sequence's rotary angles.
        sin_BS: sines.
        slots_B: cache slot of each sequence's row (int64).
        rows_CW: the cache.

    Returns:
        Absorbed queries ``[B, H, W]`` in the dtype of qkv.
    """
    wide = torch.promote_types(qkv_BP.dtype, torch.float32)
    heads, dim, width = maps.query_HDW.shape
    kv = maps.row_WE.shape[1] // 2
    q_BP, k_BP, v_BE = qkv_BP.to(wide).split([heads * dim, kv, kv], dim=-1)
    q_BHD = rms_norm(q_BP.unflatten(1, (heads, dim)), maps.q_norm_D, maps.eps)
    k_BKD = rms_norm(k_BP.unflatten(1, (-1, dim)), maps.k_norm_D, maps.eps)
    kv_BE = torch.cat((k_BKD.flatten(1), v_BE), dim=-1).to(maps.row_WE.dtype)
    row_BW = functional.linear(kv_BE, maps.row_WE, maps.bias_W).to(wide)
    q_HBD = q_BHD.transpose(0, 1).to(maps.query_HDW.dtype)
    q_BHW = (q_HBD @ maps.query_HDW).transpose(0, 1).to(wide)
    turned = width - 2 * cos_BS.shape[1]
    cos_BS, sin_BS = cos_BS.to(wide), sin_BS.to(wide)
    rope_BS = rotate(row_BW[:, turned:], cos_BS, sin_BS)
    rows_CW.index_copy_(0, slots_B, torch.cat((row_BW[:, :turned], rope_BS), -1).to(rows_CW.dtype))
    rope_BHS = rotate(q_BHW[..., turned:], cos_BS[:, None], sin_BS[:, None])
    return torch.cat((q_BHW[..., :turned], rope_BHS), dim=-1).to(qkv_BP.dtype)
