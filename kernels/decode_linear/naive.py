"""A linear layer for one token of each sequence with its neighbours fused, in plain torch.

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
    """Compute ``W norm(x) + bias + residual``, or ``silu(W norm(x)) * (F norm(x))`` with a factor.

    Args:
        x_BK: one token of each sequence.
        weight_NK: weight; with a factor, the gate.
        norm_weight_K: RMS-norm gains of the input; None takes x as it is.
        factor_NK: the other half of SwiGLU; excludes bias and residual.
        bias_N: added to the output.
        residual_BN: added to the output.
        eps: added to the mean square.

    Returns:
        ``[B, N]`` in the dtype of x.
    """
    wide = torch.promote_types(x_BK.dtype, torch.float32)
    x = x_BK.to(wide)
    if norm_weight_K is not None:
        x = rms_norm(x, norm_weight_K, eps)
    out = x @ weight_NK.to(wide).T
    if factor_NK is not None:
        out = functional.silu(out) * (x @ factor_NK.to(wide).T)
    if bias_N is not None:
        out = out + bias_N.to(wide)
    if residual_BN is not None:
        out = out + residual_BN.to(wide)
    return out.to(x_BK.dtype)
