"""Absorbed latent decode on whatever device the tensors are.

Axes: B batch, H query heads, W row width, V value width.
"""

from collections.abc import Sequence

import torch

from internvideo3.kernels.choice import (
    HALVES,
    has_room,
    multiprocessors,
    on,
    reads_fp8,
    triton_is_installed,
    wants_triton,
)
from internvideo3.kernels.latent_decode import naive
from internvideo3.kernels.latent_decode.rows import WIDEST_TAIL, Rows

WIDEST = 1024
"""Columns of a row that a kernel takes."""

NARROW = 512
"""Columns of the smaller tile of rows."""

MOST_HEADS = 32
"""Query heads that a kernel takes at once; the tile of more does not fit the shared memory."""


def is_static(run: Rows, dtype: torch.dtype) -> bool:
    """Whether rows on a GPU are read by a kernel alone; else by torch, with lengths on the host.

    The tiles of wider rows, and of float32 ones, are too large for the shared memory; those of more
    than 512 columns are so for cards with 99 KB of it (compute capability 8.6, 8.9, 12.0).
    """
    device = run.rows_bTW.device
    fits = run.width <= WIDEST and dtype in HALVES and has_room(device, tile_bytes(run))
    return fits and triton_is_installed() and (run.scale_bT is None or reads_fp8(device))


def tile_bytes(run: Rows) -> int:
    """Shared memory of the tile that a run gets, compiled for compute capability 8.0 or 8.9."""
    if run.scale_bT is not None:
        return 106496 if run.rank > NARROW else 73856
    is_one_tile = run.rank > NARROW or run.width - NARROW > WIDEST_TAIL
    return 147456 if run.width > NARROW and is_one_tile else 98304


def decode_runs(
    q_BHW: torch.Tensor, runs: Sequence[Rows], *, scale: float, value_width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from absorbed queries over runs of latent rows; see ``naive.decode_runs``.

    What is not ``is_static`` runs in torch; the interpreter, which has no limit, takes float32.
    More than `MOST_HEADS` heads are taken in equal groups, each of which reads the rows.
    """
    dtype = q_BHW.dtype if q_BHW.is_cuda else torch.bfloat16
    fits = all(is_static(run, dtype) for run in runs)
    if not fits or not wants_triton(q_BHW):
        return naive.decode_runs(q_BHW, runs, scale=scale, value_width=value_width)
    from internvideo3.kernels.latent_decode import triton

    with on(q_BHW.device):
        found = [
            triton.decode_runs(
                group_BHW,
                runs,
                scale=scale,
                value_width=value_width,
                multiprocessors=multiprocessors(q_BHW.device),
            )
            for group_BHW in q_BHW.tensor_split(-(-q_BHW.shape[1] // MOST_HEADS), dim=1)
        ]
    if len(found) == 1:
        return found[0]
    out_BHV, lse_BH = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return out_BHV, lse_BH
