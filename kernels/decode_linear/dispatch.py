"""A linear layer for one token of each sequence on whatever device the tensors are.

Axes: B batch, K input width, N output width.
"""

import torch

from internvideo3.kernels.choice import on, wants_triton
from internvideo3.kernels.decode_linear import batched


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
    """Multiply tokens by a weight; see ``naive.decode_linear``.

    One sequence is a matrix-vector product, fused in Triton; a batch is a matrix product.
    """
    if x_BK.shape[0] > 1 or not wants_triton(x_BK):
        return batched.decode_linear(
            x_BK,
            weight_NK,
            norm_weight_K=norm_weight_K,
            factor_NK=factor_NK,
            bias_N=bias_N,
            residual_BN=residual_BN,
            eps=eps,
        )
    from internvideo3.kernels.decode_linear import triton

    with on(x_BK.device):
        return triton.decode_linear(
            x_BK,
            weight_NK,
            norm_weight_K=norm_weight_K,
            factor_NK=factor_NK,
            bias_N=bias_N,
            residual_BN=residual_BN,
            eps=eps,
            tile=triton.TILE,
        )
