"""From one token's projections to its cache row and its absorbed queries, in plain torch.

Axes: B sequences, P projections = (H + 2 K) D, H query heads, K key/value heads, D head width,
F = D / 2 rotary frequencies, E = 2 K D (a token's keys and values), R rank, S rotary slots,
W = R + 2 S row width, C cache slots. A leading 2 is the real and imaginary part of factors on the
pairs (f, f + F) of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from internvideo3.kernels.gqa_append.naive import rms_norm
from internvideo3.kernels.latent_append.naive import rotate


@dataclass(frozen=True)
class TokenMaps:
    """What one layer needs; a row is ``[latent | rotary pairs]``."""

    q_norm_D: torch.Tensor
    """RMS-norm gains of the queries."""
    k_norm_D: torch.Tensor
    eps: float
    row_WE: torch.Tensor
    """``[keys | values] -> row`` before rotation."""
    bias_W: torch.Tensor
    gain_2HF: torch.Tensor
    """Complex gain of each head's query before it meets the latent."""
    k_up_KDR: torch.Tensor
    """Up-projection of a key/value head's keys, shared by its query heads."""
    read_2SH: torch.Tensor
    """Complex factor with which a head reads a rotary slot."""
    frequency_S: torch.Tensor
    """Frequency of each slot (int64)."""


def widened(maps: TokenMaps) -> TokenMaps:
    """The same maps in float64, for reference."""
    fields: dict[str, Any] = vars(maps)
    tensors = {k: v for k, v in fields.items() if torch.is_tensor(v) and v.is_floating_point()}
    return TokenMaps(**fields | {name: tensor.double() for name, tensor in tensors.items()})


def latent_token(
    qkv_BP: torch.Tensor,
    maps: TokenMaps,
    cos_BS: torch.Tensor,
    sin_BS: torch.Tensor,
    slots_B: torch.Tensor,
    rows_CW: torch.Tensor,
) -> torch.Tensor:
    """Write each sequence's row at its slot, in place, and make its queries.

    ``row = rotate(row_WE [norm(k) | v] + bias)``, where only the last 2 S columns rotate, and with
    ``n = norm(q_h)`` a query is ``[(gain_h n) k_up | rotate(read_h n[frequency])]``.

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
    (_, heads, _), (kv_heads, dim, _) = maps.gain_2HF.shape, maps.k_up_KDR.shape
    kv = kv_heads * dim
    cos_BS, sin_BS = cos_BS.to(wide), sin_BS.to(wide)
    q_BP, k_BP, v_BE = qkv_BP.to(wide).split([heads * dim, kv, kv], dim=-1)
    k_BKD = rms_norm(k_BP.unflatten(1, (-1, dim)), maps.k_norm_D, maps.eps)
    kv_BE = torch.cat((k_BKD.flatten(1), v_BE), dim=-1).to(maps.row_WE.dtype)
    row_BW = functional.linear(kv_BE, maps.row_WE, maps.bias_W).to(wide)
    latent_BR, rope_BS = row_BW.split([maps.k_up_KDR.shape[2], 2 * cos_BS.shape[1]], dim=-1)
    row_BW = torch.cat((latent_BR, rotate(rope_BS, cos_BS, sin_BS)), dim=-1)
    rows_CW.index_copy_(0, slots_B, row_BW.to(rows_CW.dtype))

    q_BHD = rms_norm(q_BP.unflatten(1, (heads, dim)), maps.q_norm_D, maps.eps)
    gained_BHD = rotate(q_BHD, *maps.gain_2HF.to(wide)).to(maps.k_up_KDR.dtype)
    gained_BKGD = gained_BHD.unflatten(1, (kv_heads, -1))
    latent_BHR = torch.einsum("bkgd,kdr->bkgr", gained_BKGD, maps.k_up_KDR).flatten(1, 2).to(wide)
    pairs_BHS = torch.cat([x.index_select(-1, maps.frequency_S) for x in q_BHD.chunk(2, -1)], -1)
    rope_BHS = rotate(pairs_BHS, *maps.read_2SH.to(wide).mT)
    rope_BHS = rotate(rope_BHS, cos_BS[:, None], sin_BS[:, None])
    return torch.cat((latent_BHR, rope_BHS), dim=-1).to(qkv_BP.dtype)
