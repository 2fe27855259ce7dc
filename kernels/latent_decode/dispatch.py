"""Absorbed latent decode on whatever device the tensors are.

Axes: B batch, H query heads, T cached tokens, R row width, V value width.
"""

import torch

from internvideo3.kernels.choice import multiprocessors, wants_triton
from internvideo3.kernels.latent_decode import naive

KERNEL_WIDTHS = (512, 576, 1024)


def latent_decode(
    q_BHR: torch.Tensor,
    rows_BTR: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
    value_width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from absorbed queries over latent rows; see ``naive.latent_decode``.

    Row widths other than ``KERNEL_WIDTHS`` run in torch, which reads the lengths on the host.
    """
    width = q_BHR.shape[-1]
    if width not in KERNEL_WIDTHS or not wants_triton(q_BHR):
        return naive.latent_decode(q_BHR, rows_BTR, lengths_B, scale=scale, value_width=value_width)
    from internvideo3.kernels.latent_decode import triton

    plan = triton.PLANS[width]
    programs = multiprocessors(q_BHR.device) * plan.programs_per_multiprocessor
    return triton.latent_decode(
        q_BHR,
        rows_BTR,
        lengths_B,
        scale=scale,
        value_width=value_width,
        n_splits=max(1, programs // q_BHR.shape[0]),
        tile=plan.tile,
        parts_dtype=q_BHR.dtype,
    )
