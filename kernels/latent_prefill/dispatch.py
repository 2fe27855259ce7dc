"""Prefill attention on whatever device the tensors are.

Axes: B batch, Q new queries, T keys, H query heads, K key/value heads, D query/key width,
V value width.
"""

import torch

from internvideo3.kernels.choice import has_room, on, wants_triton
from internvideo3.kernels.latent_prefill import cudnn, fused

TILE_BYTES = {128: 98304, 256: 163840}
"""Shared memory of the kernel's tile by the width of queries and keys that it takes, compiled for
compute capability 8.0 or 8.9."""
FLOAT32_TILE_BYTES = {128: 43008, 256: 67584}
"""Of float32."""
VALUE_WIDTHS = (16, 32, 64, 128)


def latent_prefill(
    q_BQHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKV: torch.Tensor,
    *,
    scale: float,
    offset: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from a chunk of queries over reconstructed keys; see ``naive.latent_prefill``."""
    if cudnn.fits(q_BQHD, k_BTKD, v_BTKV, offset):
        return cudnn.latent_prefill(q_BQHD, k_BTKD, v_BTKV, scale=scale, offset=offset)
    width = q_BQHD.shape[-1]
    fits = width in TILE_BYTES and v_BTKV.shape[-1] in VALUE_WIDTHS
    needed = FLOAT32_TILE_BYTES if q_BQHD.dtype == torch.float32 else TILE_BYTES
    fits = fits and wants_triton(q_BQHD) and has_room(q_BQHD.device, needed[width])
    if not fits:
        return fused.latent_prefill(q_BQHD, k_BTKD, v_BTKV, scale=scale, offset=offset)
    from internvideo3.kernels.latent_prefill import triton

    tile = triton.FLOAT32_TILE if q_BQHD.dtype == torch.float32 else triton.TILES[width]
    with on(q_BQHD.device):
        return triton.latent_prefill(q_BQHD, k_BTKD, v_BTKV, scale=scale, offset=offset, tile=tile)
