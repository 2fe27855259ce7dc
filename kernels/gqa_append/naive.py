"""QK-norm, rotary and key/value cache write of one decode step, in plain torch.

Axes: B batch, H query heads, K key/value heads, T cache capacity, D head width, S = D / 2.
"""

import torch

from internvideo3.kernels.latent_append.naive import rotate


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


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
    """Normalise and rotate q and k, write k and v at each sequence's slot in place.

    Args:
        qkv_BW: merged projection ``[q | k | v]``, W = (H + 2K) * D.
        q_norm_D: QK-norm gains of the query.
        k_norm_D: QK-norm gains of the key.
        cos_BS: cosines of each sequence's rotary angles.
        sin_BS: sines.
        slots_B: slot of the new token of each sequence (int64).
        keys_BKTD: key cache.
        values_BKTD: value cache.
        eps: added to the mean square.

    Returns:
        Queries ``[B, H, D]`` in the dtype of qkv.
    """
    wide = torch.promote_types(qkv_BW.dtype, torch.float32)
    batch, width = qkv_BW.shape
    _, kv_heads, _, dim = keys_BKTD.shape
    heads = width // dim - 2 * kv_heads
    x = qkv_BW.to(wide).view(batch, -1, dim)
    cos, sin = cos_BS.to(wide)[:, None], sin_BS.to(wide)[:, None]
    q_BHD = rotate(rms_norm(x[:, :heads], q_norm_D, eps), cos, sin)
    k_BKD = rotate(rms_norm(x[:, heads : heads + kv_heads], k_norm_D, eps), cos, sin)
    index_B = torch.arange(batch, device=qkv_BW.device)
    keys_BKTD[index_B, :, slots_B] = k_BKD.to(keys_BKTD.dtype)
    values_BKTD[index_B, :, slots_B] = x[:, heads + kv_heads :].to(values_BKTD.dtype)
    return q_BHD.to(qkv_BW.dtype)
