# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""QK-norm, rotary and key/value cache write of one decode step as one Triton kernel.

Axes: B batch, H query heads, K key/value heads, T cache capacity, D head width, S = D / 2.
"""

import torch
import triton
import triton.language as tl

from internvideo3.kernels.triton_overlap import overlap, wait_for_inputs


@triton.jit
def gqa_append_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    eps,
    stride_b,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One head of q, k or v per program; grid (H + 2K, B)."""
    wait_for_inputs(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + batch)
    pair = tl.arange(0, HALF)
    x_ptr = qkv_ptr + batch * stride_b + head * (2 * HALF) + pair
    first = tl.load(x_ptr).to(tl.float32)
    second = tl.load(x_ptr + HALF).to(tl.float32)
    if head >= HEADS + KV_HEADS:
        to_ptr = values_ptr + batch * stride_vb + slot * stride_vt
        to_ptr += (head - HEADS - KV_HEADS) * stride_vh + pair
        tl.store(to_ptr, first.to(values_ptr.dtype.element_ty))
        tl.store(to_ptr + HALF, second.to(values_ptr.dtype.element_ty))
    else:
        mean_square = (tl.sum(first * first, axis=0) + tl.sum(second * second, axis=0)) / (2 * HALF)
        inverse = 1.0 / tl.sqrt(mean_square + eps)
        cos = tl.load(cos_ptr + batch * HALF + pair).to(tl.float32)
        sin = tl.load(sin_ptr + batch * HALF + pair).to(tl.float32)
        is_query = head < HEADS
        gain_1 = tl.load(q_norm_ptr + pair, mask=is_query, other=0.0).to(tl.float32)
        gain_2 = tl.load(q_norm_ptr + HALF + pair, mask=is_query, other=0.0).to(tl.float32)
        gain_1 += tl.load(k_norm_ptr + pair, mask=head >= HEADS, other=0.0).to(tl.float32)
        gain_2 += tl.load(k_norm_ptr + HALF + pair, mask=head >= HEADS, other=0.0).to(tl.float32)
        first = first * inverse * gain_1
        second = second * inverse * gain_2
        low = (first * cos - second * sin).to(out_ptr.dtype.element_ty)
        high = (second * cos + first * sin).to(out_ptr.dtype.element_ty)
        if is_query:
            to_ptr = out_ptr + (batch * HEADS + head) * (2 * HALF) + pair
            tl.store(to_ptr, low)
            tl.store(to_ptr + HALF, high)
        else:
            to_ptr = keys_ptr + batch * stride_kb + slot * stride_kt
            to_ptr += (head - HEADS) * stride_kh + pair
            tl.store(to_ptr, low)
            tl.store(to_ptr + HALF, high)


def gqa_append(
    qkv_BW: torch.Tensor,
    q_norm_D: torch.Tensor,
    k_norm_D: torch.Tensor,
    cos_BS: torch.Tensor,
    sin_BS: torch.Tensor,
    slots_B: torch.Tensor,
    keys_BKTD: torch.Tensor,
    values_BKTD: torch.Tensor,
    *,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Normalise, rotate and append; see ``naive.gqa_append`` (D a power of two)."""
    batch, width = qkv_BW.shape
    _, kv_heads, _, dim = keys_BKTD.shape
    heads = width // dim - 2 * kv_heads
    out_BHD = torch.empty(batch, heads, dim, dtype=qkv_BW.dtype, device=qkv_BW.device)
    gqa_append_kernel[(heads + 2 * kv_heads, batch)](
        qkv_BW,
        q_norm_D,
        k_norm_D,
        cos_BS,
        sin_BS,
        slots_B,
        keys_BKTD,
        values_BKTD,
        out_BHD,
        eps,
        qkv_BW.stride(0),
        *keys_BKTD.stride()[:3],
        *values_BKTD.stride()[:3],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=dim // 2,
        num_warps=1,
        **overlap(qkv_BW),
    )
    return out_BHD
