# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The expanded output of one decode step, in Triton.

Axes: B batch, H heads, K key/value heads, R rank, V value width.
"""

import torch
import triton
import triton.language as tl

from internvideo3.kernels.triton_overlap import overlap, wait_for_inputs

BLOCK_V = 8


@triton.jit
def expand_kernel(
    latent_ptr,
    w_ptr,
    out_ptr,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    RANK: tl.constexpr,
    VALUE: tl.constexpr,
    POW2_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_V output values of one head; grid (V / BLOCK_V, H, B)."""
    head = tl.program_id(1)
    batch = tl.program_id(2)
    value = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = value < VALUE
    column = tl.arange(0, POW2_R)
    real = column < RANK
    w = tl.load(
        w_ptr + (head // SHARE) * (VALUE * RANK) + value[:, None] * RANK + column[None, :],
        mask=inside[:, None] & real[None, :],
        other=0.0,
    )
    wait_for_inputs(OVERLAP)
    latent = tl.load(latent_ptr + (batch * HEADS + head) * RANK + column, mask=real, other=0.0).to(
        tl.float32
    )
    out = tl.sum(w.to(tl.float32) * latent[None, :], axis=1)
    tl.store(
        out_ptr + (batch * HEADS + head) * VALUE + value,
        out.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


def expand_output(latent_BHR: torch.Tensor, w_uv_KVR: torch.Tensor) -> torch.Tensor:
    """Apply each head's value up-projection; see ``naive.expand_output`` (both contiguous)."""
    batch, heads, rank = latent_BHR.shape
    kv_heads, value, _ = w_uv_KVR.shape
    out = torch.empty(batch, heads, value, dtype=latent_BHR.dtype, device=latent_BHR.device)
    expand_kernel[(triton.cdiv(value, BLOCK_V), heads, batch)](
        latent_BHR,
        w_uv_KVR,
        out,
        HEADS=heads,
        SHARE=heads // kv_heads,
        RANK=rank,
        VALUE=value,
        POW2_R=triton.next_power_of_2(rank),
        BLOCK_V=BLOCK_V,
        num_warps=4,
        **overlap(latent_BHR),
    )
    return out
