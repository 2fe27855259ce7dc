"""Latent cache append on whatever device the tensors are.

Axes: N tokens, C cache slots, W row width, R rank, S rotary slots, M modalities.
"""

import torch

from internvideo3.kernels.choice import on, wants_triton
from internvideo3.kernels.latent_append import naive


def latent_append(
    projected_NW: torch.Tensor,
    cos_NS: torch.Tensor,
    sin_NS: torch.Tensor,
    slots_N: torch.Tensor,
    rows_CW: torch.Tensor,
    *,
    norm_weight_R: torch.Tensor | None = None,
    eps: float = 1e-6,
    gain_MR: torch.Tensor | None = None,
    bias_MR: torch.Tensor | None = None,
    modality_N: torch.Tensor | None = None,
) -> None:
    """Write the latent rows of N tokens in place; see ``naive.latent_append``."""
    append = naive.latent_append
    if wants_triton(projected_NW):
        from internvideo3.kernels.latent_append import triton

        append = triton.latent_append
    with on(projected_NW.device):
        append(
            projected_NW,
            cos_NS,
            sin_NS,
            slots_N,
            rows_CW,
            norm_weight_R=norm_weight_R,
            eps=eps,
            gain_MR=gain_MR,
            bias_MR=bias_MR,
            modality_N=modality_N,
        )
