"""Fold the up-projections into the query and out of the output, in plain torch.

Axes: B batch, H heads, N content width, S rotary slots, R rank, V value width.
"""

import torch

from internvideo3.kernels.latent_append.naive import rotate


def absorb_query(
    q_BHW: torch.Tensor, w_uk_HNR: torch.Tensor, cos_BS: torch.Tensor, sin_BS: torch.Tensor
) -> torch.Tensor:
    """Turn per-head queries ``[q_nope | q_rope]`` into latent queries ``[q_nope W_UK | rotated]``.

    Args:
        q_BHW: queries, W = N + 2S.
        w_uk_HNR: key up-projection of each head.
        cos_BS: cosines of each sequence's rotary angles.
        sin_BS: sines.

    Returns:
        ``[B, H, R + 2S]`` in the dtype of q.
    """
    wide = torch.promote_types(q_BHW.dtype, torch.float32)
    content = w_uk_HNR.shape[1]
    q = q_BHW.to(wide)
    latent_BHR = torch.einsum("bhn,hnr->bhr", q[..., :content], w_uk_HNR.to(wide))
    rope_BHW = rotate(q[..., content:], cos_BS.to(wide)[:, None], sin_BS.to(wide)[:, None])
    return torch.cat((latent_BHR, rope_BHW), dim=-1).to(q_BHW.dtype)


def expand_output(latent_BHR: torch.Tensor, w_uv_HVR: torch.Tensor) -> torch.Tensor:
    """Apply each head's value up-projection: ``[B, H, R] -> [B, H, V]``."""
    wide = torch.promote_types(latent_BHR.dtype, torch.float32)
    out_BHV = torch.einsum("bhr,hvr->bhv", latent_BHR.to(wide), w_uv_HVR.to(wide))
    return out_BHV.to(latent_BHR.dtype)
