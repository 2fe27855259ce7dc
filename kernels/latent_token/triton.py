# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""A token's cache row and absorbed queries as one Triton kernel.

Axes: B sequences, H query heads, K key/value heads, D head width, W row width, S rotary slots.
"""

import torch
import triton
import triton.language as tl

from internvideo3.kernels.latent_token.naive import TokenMaps
from internvideo3.kernels.triton_overlap import overlap, wait_for_inputs

BLOCK_N = 4
"""Latent columns of a row that one program makes; half as many rotary pairs."""
BLOCK_R = 64
"""Latent columns of one head's query that one program makes."""


@triton.jit
def normalised(x, gain_ptr, normed, eps, D: tl.constexpr):
    """RMS norm of those rows of x [heads, D] that have one, in float32."""
    mean_square = tl.sum(x * x, axis=1) / D
    inverse = tl.where(normed, 1.0 / tl.sqrt(mean_square + eps), 1.0)
    gain = tl.load(gain_ptr + tl.arange(0, D)).to(tl.float32)
    return x * inverse[:, None] * tl.where(normed[:, None], gain[None, :], 1.0)


@triton.jit
def columns_of_row(weights, bias, kv):
    """Weights [N, 2 K, D] times kv [2 K, D], plus the bias [N]."""
    return tl.sum(tl.sum(weights.to(tl.float32) * kv[None, :, :], axis=2), axis=1) + bias


@triton.jit
def write_latent(
    kv_ptr, inner, k_norm_ptr, row_map_ptr, bias_ptr, slots_ptr, rows_ptr, eps, stride_row, batch,
    program, KV_HEADS: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr,
    BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_N latent columns of a row."""
    column = program * BLOCK_N + tl.arange(0, BLOCK_N)
    real = column < RANK
    place = column.to(tl.int64)[:, None, None] * (2 * KV_HEADS * D) + inner[None, :, :]
    weights = tl.load(row_map_ptr + place, mask=real[:, None, None], other=0.0)
    bias = tl.load(bias_ptr + column, mask=real, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    is_key = tl.arange(0, 2 * KV_HEADS) < KV_HEADS
    kv = normalised(tl.load(kv_ptr + inner).to(tl.float32), k_norm_ptr, is_key, eps, D)
    to_ptr = rows_ptr + tl.load(slots_ptr + batch) * stride_row
    made = columns_of_row(weights, bias, kv)
    tl.store(to_ptr + column, made.to(rows_ptr.dtype.element_ty), mask=real)


@triton.jit
def write_pairs(
    kv_ptr, inner, k_norm_ptr, row_map_ptr, bias_ptr, cos_ptr, sin_ptr, slots_ptr, rows_ptr,
    eps, stride_row, batch, program, KV_HEADS: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr,
    ROTARY: tl.constexpr, PAIRS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """PAIRS rotary pairs of a row."""
    pair = program * PAIRS + tl.arange(0, PAIRS)
    real = pair < ROTARY
    width: tl.constexpr = 2 * KV_HEADS * D
    place = (RANK + pair).to(tl.int64)[:, None, None] * width + inner[None, :, :]
    low = tl.load(row_map_ptr + place, mask=real[:, None, None], other=0.0)
    high = tl.load(row_map_ptr + place + ROTARY * width, mask=real[:, None, None], other=0.0)
    bias_ptr += RANK + pair
    bias_low = tl.load(bias_ptr, mask=real, other=0.0).to(tl.float32)
    bias_high = tl.load(bias_ptr + ROTARY, mask=real, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    is_key = tl.arange(0, 2 * KV_HEADS) < KV_HEADS
    kv = normalised(tl.load(kv_ptr + inner).to(tl.float32), k_norm_ptr, is_key, eps, D)
    first = columns_of_row(low, bias_low, kv)
    second = columns_of_row(high, bias_high, kv)
    cos = tl.load(cos_ptr + batch * ROTARY + pair, mask=real, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + batch * ROTARY + pair, mask=real, other=0.0).to(tl.float32)
    dtype = rows_ptr.dtype.element_ty
    to_ptr = rows_ptr + tl.load(slots_ptr + batch) * stride_row + RANK + pair
    tl.store(to_ptr, (first * cos - second * sin).to(dtype), mask=real)
    tl.store(to_ptr + ROTARY, (second * cos + first * sin).to(dtype), mask=real)


@triton.jit
def query_of(q_ptr, q_norm_ptr, eps, D: tl.constexpr):
    """One head's normalised query [D]."""
    q = tl.load(q_ptr + tl.arange(0, D)).to(tl.float32)
    gain = tl.load(q_norm_ptr + tl.arange(0, D)).to(tl.float32)
    return q / tl.sqrt(tl.sum(q * q, axis=0) / D + eps) * gain


@triton.jit
def query_latent(
    q_ptr, q_norm_ptr, map_ptr, out_ptr, eps, block, D: tl.constexpr, RANK: tl.constexpr,
    ROTARY: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_R latent columns of one head's query."""
    column = block * BLOCK_R + tl.arange(0, BLOCK_R)
    real = column < RANK
    place = tl.arange(0, D)[:, None] * (RANK + 2 * ROTARY) + column[None, :]
    weights = tl.load(map_ptr + place, mask=real[None, :], other=0.0)
    wait_for_inputs(OVERLAP)
    q = query_of(q_ptr, q_norm_ptr, eps, D)
    made = tl.sum(q[:, None] * weights.to(tl.float32), axis=0)
    tl.store(out_ptr + column, made.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def query_pairs(
    q_ptr, q_norm_ptr, map_ptr, cos_ptr, sin_ptr, out_ptr, eps, batch, D: tl.constexpr,
    RANK: tl.constexpr, ROTARY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """All rotary pairs of one head's query."""
    pair = tl.arange(0, ROTARY)
    place = tl.arange(0, D)[:, None] * (RANK + 2 * ROTARY) + RANK + pair[None, :]
    low, high = tl.load(map_ptr + place), tl.load(map_ptr + place + ROTARY)
    wait_for_inputs(OVERLAP)
    q = query_of(q_ptr, q_norm_ptr, eps, D)
    first = tl.sum(q[:, None] * low.to(tl.float32), axis=0)
    second = tl.sum(q[:, None] * high.to(tl.float32), axis=0)
    cos = tl.load(cos_ptr + batch * ROTARY + pair).to(tl.float32)
    sin = tl.load(sin_ptr + batch * ROTARY + pair).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + RANK + pair, (first * cos - second * sin).to(dtype))
    tl.store(out_ptr + RANK + ROTARY + pair, (second * cos + first * sin).to(dtype))


@triton.jit
def token_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    row_map_ptr,
    bias_ptr,
    query_map_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    rows_ptr,
    out_ptr,
    eps,
    stride_b,
    stride_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    RANK: tl.constexpr,
    ROTARY: tl.constexpr,
    ROW_PROGRAMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A piece of the row in the first programs, of a query in the others; grid (., B)."""
    batch = tl.program_id(1).to(tl.int64)
    qkv_ptr += batch * stride_b
    program = tl.program_id(0)
    latent_programs: tl.constexpr = (RANK + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    inner = tl.arange(0, 2 * KV_HEADS)[:, None] * D + tl.arange(0, D)[None, :]
    head = (program - ROW_PROGRAMS) // (blocks + 1)
    block = (program - ROW_PROGRAMS) % (blocks + 1)
    q_ptr = qkv_ptr + head * D
    map_ptr = query_map_ptr + head * (D * (RANK + 2 * ROTARY))
    to_ptr = out_ptr + (batch * HEADS + head) * (RANK + 2 * ROTARY)
    if program < latent_programs:
        write_latent(
            qkv_ptr + HEADS * D, inner, k_norm_ptr, row_map_ptr, bias_ptr, slots_ptr, rows_ptr,
            eps, stride_row, batch, program, KV_HEADS, D, RANK, BLOCK_N, OVERLAP,
        )  # fmt: skip
    elif program < ROW_PROGRAMS:
        write_pairs(
            qkv_ptr + HEADS * D, inner, k_norm_ptr, row_map_ptr, bias_ptr, cos_ptr, sin_ptr,
            slots_ptr, rows_ptr, eps, stride_row, batch, program - latent_programs,
            KV_HEADS, D, RANK, ROTARY, BLOCK_N // 2, OVERLAP,
        )  # fmt: skip
    elif block < blocks:
        query_latent(
            q_ptr, q_norm_ptr, map_ptr, to_ptr, eps, block, D, RANK, ROTARY, BLOCK_R, OVERLAP
        )
    else:
        query_pairs(
            q_ptr, q_norm_ptr, map_ptr, cos_ptr, sin_ptr, to_ptr, eps, batch, D, RANK, ROTARY,
            OVERLAP,
        )  # fmt: skip


def launch_constants(
    heads: int, kv_heads: int, dim: int, width: int, rotary: int
) -> dict[str, int]:
    """Compile-time arguments of a launch."""
    rank = width - 2 * rotary
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "D": dim,
        "RANK": rank,
        "ROTARY": rotary,
        "ROW_PROGRAMS": triton.cdiv(rank, BLOCK_N) + triton.cdiv(rotary, BLOCK_N // 2),
        "BLOCK_N": BLOCK_N,
        "BLOCK_R": BLOCK_R,
        "num_warps": 4,
    }


def latent_token(
    qkv_BP: torch.Tensor,
    maps: TokenMaps,
    cos_BS: torch.Tensor,
    sin_BS: torch.Tensor,
    slots_B: torch.Tensor,
    rows_CW: torch.Tensor,
) -> torch.Tensor:
    """Write rows, make queries; see ``naive.latent_token`` (D, K, S powers of two; contiguous)."""
    heads, dim, width = maps.query_HDW.shape
    batch, rotary = cos_BS.shape
    constants = launch_constants(heads, maps.row_WE.shape[1] // (2 * dim), dim, width, rotary)
    out_BHW = torch.empty(batch, heads, width, dtype=qkv_BP.dtype, device=qkv_BP.device)
    per_head = triton.cdiv(constants["RANK"], BLOCK_R) + 1
    token_kernel[(constants["ROW_PROGRAMS"] + heads * per_head, batch)](
        qkv_BP,
        maps.q_norm_D,
        maps.k_norm_D,
        maps.row_WE,
        maps.bias_W,
        maps.query_HDW,
        cos_BS,
        sin_BS,
        slots_B,
        rows_CW,
        out_BHW,
        maps.eps,
        qkv_BP.stride(0),
        rows_CW.stride(0),
        **constants,
        **overlap(qkv_BP),
    )
    return out_BHW
