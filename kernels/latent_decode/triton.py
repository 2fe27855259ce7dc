# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Split-KV absorbed decode over contiguous latent rows, in Triton.

Axes: B batch, H query heads, T cached tokens, R row width, V value width, S splits, G row groups.

A program owns one range of tokens of one sequence and all heads, so every cached byte is read once
from memory; the tile in shared memory serves as keys and as values. Partial outputs are joined by
``lse_merge``. The number of splits is fixed by the caller and the lengths are read on the device,
so a captured CUDA graph stays valid while sequences grow.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from internvideo3.kernels.lse_merge.triton import lse_merge

LOG2_E = 1.4426950408889634
GROUP_WIDTH = 128


@dataclass(frozen=True)
class Tile:
    """How one program walks its tokens."""

    form: Literal["transposed", "grouped"]
    """transposed: tokens and latent columns are the rows of the matrix products, heads the
    columns. grouped: the row is cut into groups of 128 columns, one warp each."""
    block_n: int
    """Tokens per step."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """The tile shipped for a row width."""

    tile: Tile
    programs_per_multiprocessor: int
    """How many fit in the shared memory of one multiprocessor."""


PLANS = {
    1024: Plan(Tile("transposed", 32, 8, 3), 1),
    576: Plan(Tile("transposed", 32, 4, 3), 2),
    512: Plan(Tile("transposed", 32, 4, 3), 2),
}


@triton.jit
def token_range(length, split, n_splits, BLOCK_N: tl.constexpr):
    """Tokens [start, end) of a split: whole blocks, dealt out evenly."""
    blocks = tl.cdiv(length, BLOCK_N)
    base = blocks // n_splits
    extra = blocks % n_splits
    start = (split * base + tl.minimum(split, extra)) * BLOCK_N
    end = start + (base + tl.where(split < extra, 1, 0)) * BLOCK_N
    return start, tl.minimum(end, length)


@triton.jit
def transposed_kernel(
    q_ptr,
    rows_ptr,
    lengths_ptr,
    parts_ptr,
    parts_lse_ptr,
    scale_log2,
    stride_qb,
    stride_qh,
    stride_rb,
    stride_rt,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scores [tokens, heads], output [columns, heads]; grid (S, B)."""
    split = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    n_splits = tl.num_programs(0)
    start, end = token_range(tl.load(lengths_ptr + batch), split, n_splits, BLOCK_N)

    head = tl.arange(0, BLOCK_H)
    column = tl.arange(0, MAIN)
    here = head < HEADS
    q_ptr += batch * stride_qb
    q = tl.load(q_ptr + head[:, None] * stride_qh + column[None, :], mask=here[:, None], other=0.0)
    if TAIL > 0:
        tail = MAIN + tl.arange(0, TAIL)
        q_tail = tl.load(
            q_ptr + head[:, None] * stride_qh + tail[None, :], mask=here[:, None], other=0.0
        )
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([MAIN, BLOCK_H], tl.float32)
    rows_ptr += batch * stride_rb
    for first in range(start, end, BLOCK_N):
        step = tl.arange(0, BLOCK_N)
        valid = first + step < end
        # 64-bit only for the block's start: 2.5M rows of 1024 exceed 2**31 values.
        block_ptr = rows_ptr + tl.cast(first, tl.int64) * stride_rt
        rows = tl.load(
            block_ptr + step[:, None] * stride_rt + column[None, :], mask=valid[:, None], other=0.0
        )
        scores = tl.dot(rows, tl.trans(q), input_precision="ieee")
        if TAIL > 0:
            rows_tail = tl.load(
                block_ptr + step[:, None] * stride_rt + tail[None, :],
                mask=valid[:, None],
                other=0.0,
            )
            scores = tl.dot(rows_tail, tl.trans(q_tail), scores, input_precision="ieee")
        scores = tl.where(valid[:, None], scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        keep = tl.exp2(top - new_top)
        weight = tl.exp2(scores - new_top[None, :])
        total = total * keep + tl.sum(weight, axis=0)
        acc = acc * keep[None, :]
        acc = tl.dot(tl.trans(rows), weight.to(rows.dtype), acc, input_precision="ieee")
        top = new_top

    slot = batch * n_splits + split
    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    tl.store(
        parts_lse_ptr + slot * HEADS + head,
        tl.where(some, top + tl.log2(divisor), float("-inf")),
        mask=here,
    )
    if end > start:
        tl.store(
            parts_ptr + slot * (VALUE * HEADS) + column[:, None] * HEADS + head[None, :],
            (acc / divisor[None, :]).to(parts_ptr.dtype.element_ty),
            mask=(column < VALUE)[:, None] & here[None, :],
        )


@triton.jit
def grouped_kernel(
    q_ptr,
    rows_ptr,
    lengths_ptr,
    parts_ptr,
    parts_lse_ptr,
    scale_log2,
    stride_qb,
    stride_qh,
    stride_rb,
    stride_rt,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The row cut into GROUPS x WIDTH columns, a batched product over groups; grid (S, B)."""
    split = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    n_splits = tl.num_programs(0)
    start, end = token_range(tl.load(lengths_ptr + batch), split, n_splits, BLOCK_N)

    group = tl.arange(0, GROUPS)
    head = tl.arange(0, BLOCK_H)
    column = tl.arange(0, WIDTH)
    here = head < HEADS
    q = tl.load(
        q_ptr
        + batch * stride_qb
        + group[:, None, None] * WIDTH
        + head[None, :, None] * stride_qh
        + column[None, None, :],
        mask=here[None, :, None],
        other=0.0,
    )
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([GROUPS, BLOCK_H, WIDTH], tl.float32)
    rows_ptr += batch * stride_rb
    for first in range(start, end, BLOCK_N):
        step = tl.arange(0, BLOCK_N)
        valid = first + step < end
        rows = tl.load(
            rows_ptr
            + tl.cast(first, tl.int64) * stride_rt
            + group[:, None, None] * WIDTH
            + step[None, :, None] * stride_rt
            + column[None, None, :],
            mask=valid[None, :, None],
            other=0.0,
        )
        scores = tl.sum(tl.dot(q, tl.permute(rows, (0, 2, 1)), input_precision="ieee"), axis=0)
        scores = tl.where(valid[None, :], scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        keep = tl.exp2(top - new_top)
        weight = tl.exp2(scores - new_top[:, None])
        total = total * keep + tl.sum(weight, axis=1)
        acc = acc * keep[None, :, None]
        shared = tl.broadcast_to(weight.to(rows.dtype)[None, :, :], (GROUPS, BLOCK_H, BLOCK_N))
        acc = tl.dot(shared, rows, acc, input_precision="ieee")
        top = new_top

    slot = batch * n_splits + split
    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    tl.store(
        parts_lse_ptr + slot * HEADS + head,
        tl.where(some, top + tl.log2(divisor), float("-inf")),
        mask=here,
    )
    if end > start:
        value = group[:, None, None] * WIDTH + column[None, None, :]
        tl.store(
            parts_ptr + slot * (VALUE * HEADS) + head[None, :, None] * VALUE + value,
            (acc / divisor[None, :, None]).to(parts_ptr.dtype.element_ty),
            mask=(value < VALUE) & here[None, :, None],
        )


def latent_decode(
    q_BHR: torch.Tensor,
    rows_BTR: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
    value_width: int,
    n_splits: int,
    tile: Tile,
    parts_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from absorbed queries over latent rows; see ``naive.latent_decode``.

    Args:
        q_BHR: absorbed query, contiguous in R.
        rows_BTR: cached rows, contiguous in R; other strides are free (multiples of 16 are fast).
        lengths_B: valid tokens, int32 on the device; only the kernel reads them.
        scale: factor on the scores.
        value_width: rank r of the latent.
        n_splits: programs per sequence.
        tile: form and block sizes.
        parts_dtype: dtype of the partial outputs; bfloat16 halves their traffic.

    Returns:
        Latent output ``[B, H, V]`` in the dtype of q, natural-log float32 log-sum-exp ``[B, H]``.
    """
    batch, heads, width = q_BHR.shape
    head_minor = tile.form == "transposed"
    shape = (value_width, heads) if head_minor else (heads, value_width)
    parts = torch.empty(batch, n_splits, *shape, dtype=parts_dtype, device=q_BHR.device)
    parts_lse_BSH = torch.empty(batch, n_splits, heads, dtype=torch.float32, device=q_BHR.device)
    kernel, constants = launch_constants(tile, heads=heads, width=width, value_width=value_width)
    strides = (q_BHR.stride(0), q_BHR.stride(1), rows_BTR.stride(0), rows_BTR.stride(1))
    kernel[(n_splits, batch)](
        q_BHR, rows_BTR, lengths_B, parts, parts_lse_BSH, scale * LOG2_E, *strides, **constants
    )
    return lse_merge(parts, parts_lse_BSH, out_dtype=q_BHR.dtype, head_minor=head_minor)


def launch_constants(
    tile: Tile, *, heads: int, width: int, value_width: int
) -> tuple[Any, dict[str, Any]]:
    """Return the kernel of a tile's form and the compile-time arguments of its launch.

    Raises:
        ValueError: if the row width does not fit the form.
    """
    common = {
        "HEADS": heads,
        "BLOCK_H": max(16, triton.next_power_of_2(heads)),
        "VALUE": value_width,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    if tile.form == "grouped":
        groups, rest = divmod(width, GROUP_WIDTH)
        if rest or groups & (groups - 1):
            raise ValueError(
                f"the grouped form needs a row of 128 x a power of two, got {width}: "
                "use the transposed form"
            )
        return grouped_kernel, common | {"GROUPS": groups, "WIDTH": GROUP_WIDTH}
    main = 1 << (width.bit_length() - 1)
    tail = width - main
    if tail & (tail - 1) or (tail and (tail < 16 or value_width > main)):
        raise ValueError(
            f"row width {width} with values {value_width} is neither a power of two nor a power "
            "of two holding the values plus a smaller one of at least 16"
        )
    return transposed_kernel, common | {"MAIN": main, "TAIL": tail}
