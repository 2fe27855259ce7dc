"""The expanded output on whatever device the tensors are.

Axes: B batch, H heads, K key/value heads, R rank, V value width.
"""

import torch

from internvideo3.kernels.choice import on, wants_triton
from internvideo3.kernels.latent_expand import naive


def expand_output(latent_BHR: torch.Tensor, w_uv_KVR: torch.Tensor) -> torch.Tensor:
    """Apply the value up-projections; see ``naive.expand_output``."""
    if not wants_triton(latent_BHR):
        return naive.expand_output(latent_BHR, w_uv_KVR)
    from internvideo3.kernels.latent_expand import triton

    with on(latent_BHR.device):
        return triton.expand_output(latent_BHR, w_uv_KVR)
