"""The absorbed query and the expanded output on whatever device the tensors are.

Axes: B batch, H heads, K key/value heads, N content width, S rotary slots, R rank, V value width.
"""

import torch

from internvideo3.kernels.choice import is_power_of_two, wants_triton
from internvideo3.kernels.latent_absorb import naive


def absorb_query(
    q_BHW: torch.Tensor, w_uk_HNR: torch.Tensor, cos_BS: torch.Tensor, sin_BS: torch.Tensor
) -> torch.Tensor:
    """Make latent queries; see ``naive.absorb_query``."""
    fits = is_power_of_two(w_uk_HNR.shape[1]) and is_power_of_two(cos_BS.shape[1])
    if not fits or not wants_triton(q_BHW):
        return naive.absorb_query(q_BHW, w_uk_HNR, cos_BS, sin_BS)
    from internvideo3.kernels.latent_absorb import triton

    return triton.absorb_query(q_BHW, w_uk_HNR, cos_BS, sin_BS)


def expand_output(latent_BHR: torch.Tensor, w_uv_KVR: torch.Tensor) -> torch.Tensor:
    """Apply the value up-projections; see ``naive.expand_output``."""
    if not wants_triton(latent_BHR):
        return naive.expand_output(latent_BHR, w_uv_KVR)
    from internvideo3.kernels.latent_absorb import triton

    return triton.expand_output(latent_BHR, w_uv_KVR)
