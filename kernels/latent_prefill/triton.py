# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Flash attention with query/key width 256 and value width 128, in Triton.

Axes: B batch, Q new queries, T keys, H query heads, K key/value heads, D query/key width,
V value width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Tile:
    """How one program walks the keys."""

    block_m: int
    """Queries per program."""
    block_n: int
    """Keys per step."""
    num_warps: int
    num_stages: int


TILES = {256: Tile(128, 64, 8, 3), 128: Tile(128, 128, 8, 2)}
"""The tile shipped for a query/key width."""
FLOAT32_TILE = Tile(16, 32, 4, 2)
"""Of float32, which needs twice the shared memory and registers."""


@triton.jit
def attend(
    acc,
    top,
    total,
    q,
    k_ptr,
    v_ptr,
    stride_kt,
    stride_vt,
    limit,
    first,
    last,
    n_keys,
    scale_log2,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Walk keys [first, last) with the online softmax; ``limit`` is the last key of each query."""
    wide = tl.arange(0, D)
    value = tl.arange(0, V)
    for block in tl.range(first, last, BLOCK_N):
        step = tl.arange(0, BLOCK_N)
        key = block + step
        # 64-bit only for the block's start: 768K keys of 32 x 256 exceed 2**31 values.
        k_block = k_ptr + tl.cast(block, tl.int64) * stride_kt
        v_block = v_ptr + tl.cast(block, tl.int64) * stride_vt
        k_offsets = step[:, None] * stride_kt + wide[None, :]
        v_offsets = step[:, None] * stride_vt + value[None, :]
        if MASKED:
            inside = (key < n_keys)[:, None]
            keys = tl.load(k_block + k_offsets, mask=inside, other=0.0)
            values = tl.load(v_block + v_offsets, mask=inside, other=0.0)
        else:
            keys = tl.load(k_block + k_offsets)
            values = tl.load(v_block + v_offsets)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if MASKED:
            visible = (key[None, :] <= limit[:, None]) & (key < n_keys)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
            safe = tl.where(new_top > float("-inf"), new_top, 0.0)
        else:
            new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
            safe = new_top
        weight = tl.exp2(scores * scale_log2 - safe[:, None])
        keep = tl.exp2(top - safe)
        total = total * keep + tl.sum(weight, axis=1)
        acc = acc * keep[:, None]
        acc = tl.dot(weight.to(values.dtype), values, acc, input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    scale_log2,
    n_queries,
    n_keys,
    offset,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_vb,
    stride_vt,
    stride_vh,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head; grid (Q / BLOCK_M, B * H)."""
    # The last queries see the most keys: start them first, so that the tail of the grid is short.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    # 64-bit: the last of 8 heads of keys lies 2**31 values behind the first from 2.4M tokens on.
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    kv_head = head // SHARE
    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = query < n_queries
    wide = tl.arange(0, D)
    value = tl.arange(0, V)
    q_ptr += batch * stride_qb + head * stride_qh + (block * BLOCK_M).to(tl.int64) * stride_qt
    q = tl.load(
        q_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_qt + wide[None, :],
        mask=here[:, None],
        other=0.0,
    )
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh

    if CAUSAL:
        limit = query + offset
        full = tl.minimum(tl.maximum(block * BLOCK_M + offset + 1, 0), n_keys)
        last = tl.minimum(tl.maximum((block + 1) * BLOCK_M + offset, 0), n_keys)
    else:
        limit = query * 0 + n_keys
        full = n_keys
        last = n_keys
    full = full // BLOCK_N * BLOCK_N
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, V], tl.float32)
    acc, top, total = attend(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, limit, 0, full, n_keys, scale_log2,
        False, D, V, BLOCK_N,
    )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, q, k_ptr, v_ptr, stride_kt, stride_vt, limit, full, last, n_keys,
        scale_log2, True, D, V, BLOCK_N,
    )  # fmt: skip

    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    row = (batch * n_queries + query) * HEADS + head
    tl.store(
        out_ptr + row[:, None] * V + value[None, :],
        (acc / divisor[:, None]).to(out_ptr.dtype.element_ty),
        mask=here[:, None],
    )
    lse = tl.where(some, (top + tl.log2(divisor)) * LN2, float("-inf"))
    tl.store(lse_ptr + (batch * HEADS + head) * n_queries + query, lse, mask=here)


def launch_constants(
    tile: Tile, *, heads: int, kv_heads: int, width: int, value_width: int, causal: bool
) -> dict[str, Any]:
    """Compile-time arguments of a launch.

    Raises:
        ValueError: if the heads do not divide or a width is no power of two.
    """
    if heads % kv_heads or width & (width - 1) or value_width & (value_width - 1):
        raise ValueError(
            f"{heads} query heads must be a multiple of {kv_heads} key/value heads and the widths "
            f"{width} and {value_width} powers of two"
        )
    return {
        "HEADS": heads,
        "SHARE": heads // kv_heads,
        "CAUSAL": causal,
        "D": width,
        "V": value_width,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def latent_prefill(
    q_BQHD: torch.Tensor,
    k_BTKD: torch.Tensor,
    v_BTKV: torch.Tensor,
    *,
    scale: float,
    offset: int | None,
    tile: Tile,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from a chunk of queries over reconstructed keys; see ``naive.latent_prefill``.

    Args:
        q_BQHD: queries, contiguous in D; other strides are free.
        k_BTKD: keys, likewise.
        v_BTKV: values, likewise.
        scale: factor on the scores.
        offset: query i sees key j when ``j <= i + offset``; None sees every key.
        tile: block sizes.

    Returns:
        Output ``[B, Q, H, V]`` in the dtype of q, natural-log float32 log-sum-exp ``[B, H, Q]``.
    """
    batch, n_queries, heads, width = q_BQHD.shape
    n_keys, kv_heads, value_width = v_BTKV.shape[1:]
    out_BQHV = torch.empty(
        batch, n_queries, heads, value_width, dtype=q_BQHD.dtype, device=q_BQHD.device
    )
    lse_BHQ = torch.empty(batch, heads, n_queries, dtype=torch.float32, device=q_BQHD.device)
    constants = launch_constants(
        tile,
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        value_width=value_width,
        causal=offset is not None,
    )
    strides = (*q_BQHD.stride()[:3], *k_BTKD.stride()[:3], *v_BTKV.stride()[:3])
    prefill_kernel[(triton.cdiv(n_queries, tile.block_m), batch * heads)](
        q_BQHD,
        k_BTKD,
        v_BTKV,
        out_BQHV,
        lse_BHQ,
        scale * LOG2_E,
        n_queries,
        n_keys,
        offset or 0,
        *strides,
        **constants,
    )
    return out_BQHV, lse_BHQ
