# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The absorbed query and the expanded output of one decode step, in Triton.

Axes: B batch, H heads, K key/value heads, N content width, S rotary slots, R rank, V value width.
"""

import torch
import triton
import triton.language as tl

from internvideo3.kernels.overlap import overlap, wait_for_inputs

BLOCK_R = 128
BLOCK_V = 8


@triton.jit
def absorb_kernel(
    q_ptr,
    w_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    stride_qb,
    stride_qh,
    HEADS: tl.constexpr,
    CONTENT: tl.constexpr,
    ROTARY: tl.constexpr,
    RANK: tl.constexpr,
    MAPPED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_R latent columns of one head, or its rotation in the last program; grid (., H, B)."""
    head = tl.program_id(1)
    batch = tl.program_id(2)
    q_ptr += batch * stride_qb + head * stride_qh
    out_ptr += (batch * HEADS + head) * (RANK + 2 * ROTARY)
    dtype = out_ptr.dtype.element_ty
    content = tl.arange(0, CONTENT)
    stride_w = RANK + 2 * ROTARY if MAPPED else RANK
    w_ptr += head * (CONTENT * stride_w)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        pair = tl.arange(0, ROTARY)
        if MAPPED:
            map_ptr = w_ptr + content[:, None] * stride_w + RANK + pair[None, :]
            low, high = tl.load(map_ptr), tl.load(map_ptr + ROTARY)
            wait_for_inputs(OVERLAP)
            q_column = tl.load(q_ptr + content).to(tl.float32)[:, None]
            first = tl.sum(q_column * low.to(tl.float32), axis=0)
            second = tl.sum(q_column * high.to(tl.float32), axis=0)
        else:
            wait_for_inputs(OVERLAP)
            first = tl.load(q_ptr + CONTENT + pair).to(tl.float32)
            second = tl.load(q_ptr + CONTENT + ROTARY + pair).to(tl.float32)
        cos = tl.load(cos_ptr + batch * ROTARY + pair).to(tl.float32)
        sin = tl.load(sin_ptr + batch * ROTARY + pair).to(tl.float32)
        tl.store(out_ptr + RANK + pair, (first * cos - second * sin).to(dtype))
        tl.store(out_ptr + RANK + ROTARY + pair, (second * cos + first * sin).to(dtype))
    else:
        column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = column < RANK
        w = tl.load(
            w_ptr + content[:, None] * stride_w + column[None, :], mask=inside[None, :], other=0.0
        )
        wait_for_inputs(OVERLAP)
        q = tl.load(q_ptr + content).to(tl.float32)
        made = tl.sum(q[:, None] * w.to(tl.float32), axis=0)
        tl.store(out_ptr + column, made.to(dtype), mask=inside)


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


def absorb_query(
    q_BHW: torch.Tensor, w_uk_HNR: torch.Tensor, cos_BS: torch.Tensor, sin_BS: torch.Tensor
) -> torch.Tensor:
    """Make latent queries; see ``naive.absorb_query`` (N, S powers of two; w contiguous)."""
    batch, heads, _ = q_BHW.shape
    _, content, columns = w_uk_HNR.shape
    rotary = cos_BS.shape[1]
    mapped = q_BHW.shape[2] == content
    rank = columns - 2 * rotary if mapped else columns
    out = torch.empty(batch, heads, rank + 2 * rotary, dtype=q_BHW.dtype, device=q_BHW.device)
    absorb_kernel[(triton.cdiv(rank, BLOCK_R) + 1, heads, batch)](
        q_BHW,
        w_uk_HNR,
        cos_BS,
        sin_BS,
        out,
        q_BHW.stride(0),
        q_BHW.stride(1),
        HEADS=heads,
        CONTENT=content,
        ROTARY=rotary,
        RANK=rank,
        MAPPED=mapped,
        BLOCK_R=BLOCK_R,
        num_warps=4,
        **overlap(q_BHW),
    )
    return out


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
