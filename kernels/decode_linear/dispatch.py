"""A linear layer for one token on whatever device the tensors are.

Axes: K input width, N output width.
"""

import torch

from internvideo3.kernels.choice import wants_triton
from internvideo3.kernels.decode_linear import naive


def decode_linear(
    x_K: torch.Tensor,
    weight_NK: torch.Tensor,
    *,
    norm_weight_K: torch.Tensor | None = None,
    residual_N: torch.Tensor | None = None,
    gated: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Multiply one token by a weight; see ``naive.decode_linear``."""
    if not wants_triton(x_K):
        return naive.decode_linear(
            x_K,
            weight_NK,
            norm_weight_K=norm_weight_K,
            residual_N=residual_N,
            gated=gated,
            eps=eps,
        )
    from internvideo3.kernels.decode_linear import triton

    return triton.decode_linear(
        x_K,
        weight_NK,
        norm_weight_K=norm_weight_K,
        residual_N=residual_N,
        gated=gated,
        eps=eps,
        tile=triton.GATED_TILE if gated else triton.PLAIN,
    )
