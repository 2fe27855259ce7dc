"""Fold the value up-projections out of a latent output, in plain torch.

Axes: B batch, H heads, K key/value heads, R rank, V value width.
"""

import torch


def expand_output(latent_BHR: torch.Tensor, w_uv_KVR: torch.Tensor) -> torch.Tensor:
    """Apply the value up-projections: ``[B, H, R] -> [B, H, V]``; ``H / K`` heads share one."""
    wide = torch.promote_types(latent_BHR.dtype, torch.float32)
    latent_BKGR = latent_BHR.to(wide).unflatten(1, (w_uv_KVR.shape[0], -1))
    out_BKGV = torch.einsum("bkgr,kvr->bkgv", latent_BKGR, w_uv_KVR.to(wide))
    return out_BKGV.flatten(1, 2).to(latent_BHR.dtype)
