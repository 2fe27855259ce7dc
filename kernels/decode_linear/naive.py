"""A linear layer for one token with its neighbours fused, in plain torch.

Axes: K input width, N output width.
"""

import torch

from internvideo3.kernels.gqa_append.naive import rms_norm


def decode_linear(
    x_K: torch.Tensor,
    weight_NK: torch.Tensor,
    *,
    norm_weight_K: torch.Tensor | None = None,
    residual_N: torch.Tensor | None = None,
    gated: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Compute ``residual + W norm(x)``, or ``silu(W_1 norm(x)) * (W_2 norm(x))`` when gated.

    Args:
        x_K: input of one token.
        weight_NK: weight; when gated the gate's rows come first, then as many of the other factor.
        norm_weight_K: RMS-norm gains of the input; None takes x as it is.
        residual_N: added to the output.
        gated: SwiGLU, halving the output width.
        eps: added to the mean square.

    Returns:
        ``[N]`` (``[N / 2]`` when gated) in the dtype of x.
    """
    wide = torch.promote_types(x_K.dtype, torch.float32)
    x = x_K.to(wide)
    if norm_weight_K is not None:
        x = rms_norm(x, norm_weight_K, eps)
    out = weight_NK.to(wide) @ x
    if gated:
        gate, factor = out.chunk(2)
        out = torch.nn.functional.silu(gate) * factor
    if residual_N is not None:
        out = out + residual_N.to(wide)
    return out.to(x_K.dtype)
