"""Absorbed latent decode on whatever device the tensors are.

Axes: B batch, H query heads, W row width, V value width.
"""

from collections.abc import Sequence

import torch

from internvideo3.kernels.choice import multiprocessors, wants_triton
from internvideo3.kernels.latent_decode import naive
from internvideo3.kernels.latent_decode.rows import Rows

KERNEL_WIDTHS = (512, 576, 1024)


def decode_runs(
    q_BHW: torch.Tensor, runs: Sequence[Rows], *, scale: float, value_width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from absorbed queries over runs of latent rows; see ``naive.decode_runs``.

    Row widths other than ``KERNEL_WIDTHS`` run in torch, which reads the lengths on the host; so do
    float32 rows on a GPU, whose tiles its shared memory does not hold.
    """
    fits = all(run.width in KERNEL_WIDTHS for run in runs)
    fits = fits and not (q_BHW.is_cuda and q_BHW.dtype == torch.float32)
    if not fits or not wants_triton(q_BHW):
        return naive.decode_runs(q_BHW, runs, scale=scale, value_width=value_width)
    from internvideo3.kernels.latent_decode import triton

    return triton.decode_runs(
        q_BHW,
        runs,
        scale=scale,
        value_width=value_width,
        multiprocessors=multiprocessors(q_BHW.device),
    )
