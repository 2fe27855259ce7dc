"""Fold the up-projections into the query and out of the output, in plain torch.

Axes: B batch, H heads, K key/value heads, N content width, S rotary slots, R rank, V value width.
"""

import torch

from internvideo3.kernels.latent_append.naive import rotate


def absorb_query(
    q_BHW: torch.Tensor, w_uk_HNR: torch.Tensor, cos_BS: torch.Tensor, sin_BS: torch.Tensor
) -> torch.Tensor:
    """Turn per-head queries into latent queries ``[content W_UK | rotated]``.

    The part to rotate is the query's own tail (``q = [content | rotary]``, ``w_uk`` has R columns),
    or the map makes it as well (``q = content``, ``w_uk`` has R + 2S columns).

    Args:
        q_BHW: queries, W = N + 2S, or N.
        w_uk_HNR: map of each head, R columns, or R + 2S.
        cos_BS: cosines of each sequence's rotary angles.
        sin_BS: sines.

    Returns:
        ``[B, H, R + 2S]`` in the dtype of q.
    """
    wide = torch.promote_types(q_BHW.dtype, torch.float32)
    content, rotary = w_uk_HNR.shape[1], 2 * cos_BS.shape[1]
    q = q_BHW.to(wide)
    made_BHR = torch.einsum("bhn,hnr->bhr", q[..., :content], w_uk_HNR.to(wide))
    made_BHW = torch.cat((made_BHR, q[..., content:]), dim=-1)
    latent_BHR, rope_BHS = made_BHW[..., :-rotary], made_BHW[..., -rotary:]
    rope_BHS = rotate(rope_BHS, cos_BS.to(wide)[:, None], sin_BS.to(wide)[:, None])
    return torch.cat((latent_BHR, rope_BHS), dim=-1).to(q_BHW.dtype)


def expand_output(latent_BHR: torch.Tensor, w_uv_KVR: torch.Tensor) -> torch.Tensor:
    """Apply the value up-projections: ``[B, H, R] -> [B, H, V]``; ``H / K`` heads share one."""
    wide = torch.promote_types(latent_BHR.dtype, torch.float32)
    latent_BKGR = latent_BHR.to(wide).unflatten(1, (w_uv_KVR.shape[0], -1))
    out_BKGV = torch.einsum("bkgr,kvr->bkgv", latent_BKGR, w_uv_KVR.to(wide))
    return out_BKGV.flatten(1, 2).to(latent_BHR.dtype)
