"""The same layer for several sequences, by torch's own matrix products in the weights' dtype.

A batch makes it a matrix product, which the vendor's library does best: it reads the weight once
and never converts it.

Axes: B batch, K input width, N output width.
"""

import torch
from torch.nn import functional

from internvideo3.kernels.gqa_append.naive import rms_norm


def decode_linear(
    x_BK: torch.Tensor,
    weight_NK: torch.Tensor,
    *,
    norm_weight_K: torch.Tensor | None = None,
    factor_NK: torch.Tensor | None = None,
    bias_N: torch.Tensor | None = None,
    residual_BN: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """See ``naive.decode_linear``; only the norm is computed in float32 at least."""
    if norm_weight_K is not None:
        wide = torch.promote_types(x_BK.dtype, torch.float32)
        x_BK = rms_norm(x_BK.to(wide), norm_weight_K, eps).to(x_BK.dtype)
    out = functional.linear(x_BK, weight_NK, bias_N)
    if factor_NK is not None:
        out = functional.silu(out) * functional.linear(x_BK, factor_NK)
    return out if residual_BN is None else out + residual_BN
