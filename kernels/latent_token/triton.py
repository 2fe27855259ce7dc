# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""A token's cache row and absorbed queries as one Triton kernel.

Axes: B sequences, H query heads, K key/value heads, G query heads of one of them, D head width,
R rank, W row width, S rotary slots.
"""

import torch
import triton
import triton.language as tl

from internvideo3.kernels.latent_token.naive import TokenMaps
from internvideo3.kernels.triton_overlap import overlap, wait_for_inputs

BLOCK_N = 4
"""Latent columns of a row that one program makes; half as many rotary pairs."""
BLOCK_R = 64
"""Latent columns of the queries of one key/value head that one program makes."""


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
def inverse_rms(q_ptr, row, here, eps, D: tl.constexpr):
    """One over the RMS of each query of a key/value head, [G]."""
    inner = tl.arange(0, D)
    q = tl.load(q_ptr + row[:, None] * D + inner[None, :], mask=here[:, None], other=0.0)
    q = q.to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(q * q, axis=1) / D + eps)


@triton.jit
def normalised_at(q_ptr, q_norm_ptr, inverse, row, here, place, D: tl.constexpr):
    """Normalised queries [G, .] at some places of a head."""
    q = tl.load(q_ptr + row[:, None] * D + place[None, :], mask=here[:, None], other=0.0)
    gain = tl.load(q_norm_ptr + place).to(tl.float32)
    return q.to(tl.float32) * inverse[:, None] * gain[None, :]


@triton.jit
def query_latent(
    q_ptr, q_norm_ptr, gain_ptr, k_up_ptr, out_ptr, eps, kv_head, block, HEADS: tl.constexpr,
    SHARE: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_R latent columns of all queries of one key/value head: its map is read once."""
    HALF: tl.constexpr = D // 2
    inner = tl.arange(0, D)
    column = block * BLOCK_R + tl.arange(0, BLOCK_R)
    real = column < RANK
    member = tl.arange(0, BLOCK_G)
    here = member < SHARE
    head = kv_head * SHARE + member
    weights = tl.load(
        k_up_ptr + kv_head * (D * RANK) + inner[:, None] * RANK + column[None, :],
        mask=real[None, :],
        other=0.0,
    )
    factor = gain_ptr + head[:, None] * HALF + (inner % HALF)[None, :]
    re = tl.load(factor, mask=here[:, None], other=0.0).to(tl.float32)
    im = tl.load(factor + HEADS * HALF, mask=here[:, None], other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    inverse = inverse_rms(q_ptr, head, here, eps, D)
    q = normalised_at(q_ptr, q_norm_ptr, inverse, head, here, inner, D)
    other = normalised_at(q_ptr, q_norm_ptr, inverse, head, here, (inner + HALF) % D, D)
    sign = tl.where(inner < HALF, -1.0, 1.0)
    gained = (q * re + other * im * sign[None, :]).to(weights.dtype)
    made = tl.dot(gained, weights, input_precision="ieee")
    tl.store(
        out_ptr + head[:, None] * (RANK + 2 * ROTARY) + column[None, :],
        made.to(out_ptr.dtype.element_ty),
        mask=here[:, None] & real[None, :],
    )


@triton.jit
def query_pairs(
    q_ptr, q_norm_ptr, read_ptr, frequency_ptr, cos_ptr, sin_ptr, out_ptr, eps, batch, kv_head,
    HEADS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr,
    ROTARY: tl.constexpr, BLOCK_G: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """All rotary pairs of all queries of one key/value head."""
    slot = tl.arange(0, ROTARY)
    member = tl.arange(0, BLOCK_G)
    here = member < SHARE
    head = kv_head * SHARE + member
    place = tl.load(frequency_ptr + slot)
    factor = read_ptr + slot[None, :] * HEADS + head[:, None]
    read_re = tl.load(factor, mask=here[:, None], other=0.0).to(tl.float32)
    read_im = tl.load(factor + ROTARY * HEADS, mask=here[:, None], other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    cos = tl.load(cos_ptr + batch * ROTARY + slot).to(tl.float32)
    sin = tl.load(sin_ptr + batch * ROTARY + slot).to(tl.float32)
    turn_re = read_re * cos[None, :] - read_im * sin[None, :]
    turn_im = read_re * sin[None, :] + read_im * cos[None, :]
    inverse = inverse_rms(q_ptr, head, here, eps, D)
    re = normalised_at(q_ptr, q_norm_ptr, inverse, head, here, place, D)
    im = normalised_at(q_ptr, q_norm_ptr, inverse, head, here, place + D // 2, D)
    dtype = out_ptr.dtype.element_ty
    to_ptr = out_ptr + head[:, None] * (RANK + 2 * ROTARY) + RANK + slot[None, :]
    tl.store(to_ptr, (re * turn_re - im * turn_im).to(dtype), mask=here[:, None])
    tl.store(to_ptr + ROTARY, (re * turn_im + im * turn_re).to(dtype), mask=here[:, None])


@triton.jit
def token_kernel(
    qkv_ptr,
    q_norm_ptr,
    k_norm_ptr,
    row_map_ptr,
    bias_ptr,
    gain_ptr,
    k_up_ptr,
    read_ptr,
    frequency_ptr,
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
    BLOCK_G: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A piece of the row in the first programs, of queries in the others; grid (., B)."""
    batch = tl.program_id(1).to(tl.int64)
    qkv_ptr += batch * stride_b
    program = tl.program_id(0)
    latent_programs: tl.constexpr = (RANK + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    inner = tl.arange(0, 2 * KV_HEADS)[:, None] * D + tl.arange(0, D)[None, :]
    share: tl.constexpr = HEADS // KV_HEADS
    kv_head = (program - ROW_PROGRAMS) // (blocks + 1)
    block = (program - ROW_PROGRAMS) % (blocks + 1)
    to_ptr = out_ptr + batch * HEADS * (RANK + 2 * ROTARY)
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
            qkv_ptr, q_norm_ptr, gain_ptr, k_up_ptr, to_ptr, eps, kv_head, block,
            HEADS, share, D, RANK, ROTARY, BLOCK_G, BLOCK_R, OVERLAP,
        )  # fmt: skip
    else:
        query_pairs(
            qkv_ptr, q_norm_ptr, read_ptr, frequency_ptr, cos_ptr, sin_ptr, to_ptr, eps, batch,
            kv_head, HEADS, share, D, RANK, ROTARY, BLOCK_G, OVERLAP,
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
        "BLOCK_G": max(16, triton.next_power_of_2(heads // kv_heads)),
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
    (_, heads, _), (kv_heads, dim, _) = maps.gain_2HF.shape, maps.k_up_KDR.shape
    (batch, rotary), width = cos_BS.shape, rows_CW.shape[1]
    constants = launch_constants(heads, kv_heads, dim, width, rotary)
    out_BHW = torch.empty(batch, heads, width, dtype=qkv_BP.dtype, device=qkv_BP.device)
    per_head = triton.cdiv(constants["RANK"], BLOCK_R) + 1
    token_kernel[(constants["ROW_PROGRAMS"] + kv_heads * per_head, batch)](
        qkv_BP,
        maps.q_norm_D,
        maps.k_norm_D,
        maps.row_WE,
        maps.bias_W,
        maps.gain_2HF,
        maps.k_up_KDR,
        maps.read_2SH,
        maps.frequency_S,
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
