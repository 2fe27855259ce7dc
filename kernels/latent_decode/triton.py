# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Split-KV absorbed decode over latent rows, in Triton.

Axes: B sequences, H query heads, T cached tokens, W row width, V value width (the query's rank),
R rank of a run, S splits, G row groups.

A program owns one range of tokens of one sequence and all heads, so every cached byte is read once
from memory; the tile in shared memory serves as keys and as values. Partial outputs of all runs are
joined by one ``lse_merge``. The number of splits is fixed by the caller and the lengths are read on
the device, so a captured CUDA graph stays valid while sequences grow. A run that all sequences
share is stored once; their programs meet its tiles in the L2 cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from internvideo3.kernels.latent_decode import gluon, gluon_fp8
from internvideo3.kernels.latent_decode.rows import WIDEST_TAIL, Rows
from internvideo3.kernels.lse_merge.triton import lse_merge
from internvideo3.kernels.triton_overlap import overlap, wait_for_inputs

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """How one program walks its tokens."""

    form: Literal["transposed", "warpgroups"]
    """transposed: tokens and latent columns are the rows of the matrix products, heads the
    columns. warpgroups: the same by the kernel of ``gluon.py``."""
    block_n: int
    """Tokens per step."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Plan:
    """The tile shipped for a kind of row."""

    tile: Tile
    programs_per_multiprocessor: int
    """How many fit in the shared memory of one multiprocessor."""


PLANS = {
    # By the widest row of a kind: up to 1024 columns in one tile, up to 512 and a second tile of
    # keys, up to 512. Rows between are padded in registers; what is read is what is there.
    1024: Plan(Tile("transposed", 32, 8, 3), 1),
    576: Plan(Tile("transposed", 32, 4, 3), 2),
    512: Plan(Tile("transposed", 32, 4, 3), 2),
}
PAGED_PLANS = PLANS | {576: Plan(Tile("transposed", 32, 8, 3), 2)}
FP8_PLANS = {
    # One stage: with two, 1024 columns converted in registers spill (README, "fp8 rows"). Twice the
    # tokens fit contiguous rows of 512 + 64 only: triton 3.6 spills with pages, masks or more keys.
    1024: Plan(Tile("transposed", 16, 8, 1), 2),
    576: Plan(Tile("transposed", 32, 8, 2), 2),
    512: Plan(Tile("transposed", 16, 8, 2), 2),
}
WARPGROUPS = Tile("warpgroups", gluon.TILE.value, gluon.NUM_WARPS, 1)
HOPPER_PLAN = Plan(WARPGROUPS, 1)
BLOCKS_PER_SPLIT = 4
"""A run of few tokens gets fewer programs than the card has: at least so many blocks for each."""


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
    tail_ptr,
    row_scale_ptr,
    pages_ptr,
    lengths_ptr,
    parts_ptr,
    parts_lse_ptr,
    scale_log2,
    first_split,
    total_splits,
    stride_qb,
    stride_qh,
    stride_rb,
    stride_rt,
    stride_tb,
    stride_tt,
    stride_sb,
    stride_pb,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    MAIN: tl.constexpr,
    REAL: tl.constexpr,
    TAIL: tl.constexpr,
    TAIL_REAL: tl.constexpr,
    RANK: tl.constexpr,
    VALUE: tl.constexpr,
    PAGE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Scores [tokens, heads], output [columns, heads]; grid (S, B).

    A row is its first REAL columns (padded to MAIN) and TAIL_REAL more (padded to TAIL), read
    through another pointer: they are keys only. RANK columns are latent; the query's rank is VALUE.
    """
    wait_for_inputs(OVERLAP)
    split = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    start, end = token_range(tl.load(lengths_ptr + batch), split, tl.num_programs(0), BLOCK_N)

    head = tl.arange(0, BLOCK_H)
    column = tl.arange(0, MAIN)
    here = head < HEADS
    q_ptr += batch * stride_qb
    # Columns of a nested rank: the first of the query's latent ones, then its rotary ones.
    q_column = tl.where(column < RANK, column, column + (VALUE - RANK))
    q = tl.load(
        q_ptr + head[:, None] * stride_qh + q_column[None, :],
        mask=here[:, None] & (column < REAL)[None, :],
        other=0.0,
    )
    if TAIL > 0:
        tail = tl.arange(0, TAIL)
        q_tail = tl.load(
            q_ptr + head[:, None] * stride_qh + (VALUE - RANK + REAL + tail)[None, :],
            mask=here[:, None] & (tail < TAIL_REAL)[None, :],
            other=0.0,
        )
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([MAIN, BLOCK_H], tl.float32)
    for first in range(start, end, BLOCK_N):
        step = tl.arange(0, BLOCK_N)
        valid = first + step < end
        # 64-bit only for the block's start: 2.5M rows of 1024 exceed 2**31 values.
        if PAGE > 0:
            item = tl.load(pages_ptr + batch * stride_pb + first // PAGE).to(tl.int64)
            token = tl.cast(first % PAGE, tl.int64)
        else:
            item = batch
            token = tl.cast(first, tl.int64)
        loads = valid[:, None]
        if REAL < MAIN:
            loads = loads & (column < REAL)[None, :]
        rows = tl.load(
            rows_ptr
            + item * stride_rb
            + token * stride_rt
            + step[:, None] * stride_rt
            + column[None, :],
            mask=loads,
            other=0.0,
        )
        if SCALED:
            rows = rows.to(q.dtype)
            row_scale = tl.load(
                row_scale_ptr + item * stride_sb + token + step, mask=valid, other=1.0
            )
        scores = tl.dot(rows, tl.trans(q), input_precision="ieee")
        if SCALED:
            scores = scores * row_scale[:, None]
        if TAIL > 0:
            tail_loads = valid[:, None]
            if TAIL_REAL < TAIL:
                tail_loads = tail_loads & (tail < TAIL_REAL)[None, :]
            rows_tail = tl.load(
                tail_ptr
                + item * stride_tb
                + token * stride_tt
                + step[:, None] * stride_tt
                + tail[None, :],
                mask=tail_loads,
                other=0.0,
            )
            scores = tl.dot(rows_tail, tl.trans(q_tail), scores, input_precision="ieee")
        scores = scores * scale_log2
        if SCALED:
            # A weight takes its row's scale along: small ones would leave float16's range.
            scores += tl.log2(row_scale)[:, None]
        scores = tl.where(valid[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=0))
        keep = tl.exp2(top - new_top)
        weight = tl.exp2(scores - new_top[None, :])
        if SCALED:
            total = total * keep + tl.sum(weight / row_scale[:, None], axis=0)
        else:
            total = total * keep + tl.sum(weight, axis=0)
        acc = acc * keep[None, :]
        acc = tl.dot(tl.trans(rows), weight.to(rows.dtype), acc, input_precision="ieee")
        top = new_top

    slot = batch * total_splits + first_split + split
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
            mask=(column < RANK)[:, None] & here[None, :],
        )


def latent_decode(
    q_BHW: torch.Tensor,
    rows_BTW: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
    value_width: int,
    n_splits: int,
    tile: Tile,
    parts_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over one contiguous run of rows; see ``naive.latent_decode``.

    Args:
        q_BHW: absorbed query, contiguous in W.
        rows_BTW: cached rows, contiguous in W; other strides are free (multiples of 16 are fast).
        lengths_B: valid tokens, int32 on the device; only the kernel reads them.
        scale: factor on the scores.
        value_width: rank of the latent.
        n_splits: programs per sequence.
        tile: form and block sizes.
        parts_dtype: dtype of the partial outputs; bfloat16 halves their traffic.

    Returns:
        Latent output ``[B, H, V]`` in the dtype of q, natural-log float32 log-sum-exp ``[B, H]``.
    """
    run = Rows(rows_bTW=rows_BTW, lengths_B=lengths_B, rank=value_width)
    return _launch(q_BHW, [(run, tile, n_splits)], scale, value_width, parts_dtype)


def decode_runs(
    q_BHW: torch.Tensor,
    runs: Sequence[Rows],
    *,
    scale: float,
    value_width: int,
    multiprocessors: int,
    parts_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over several runs with the shipped tiles; see ``naive.decode_runs``.

    Args:
        q_BHW: absorbed query, contiguous in W.
        runs: at least one; rows contiguous in W.
        scale: factor on the scores.
        value_width: rank of the query.
        multiprocessors: of the device; decides how many programs share a run.
        parts_dtype: dtype of the partial outputs; None is that of q.

    Returns:
        Latent output ``[B, H, V]`` in the dtype of q, natural-log float32 log-sum-exp ``[B, H]``.
    """
    launches = []
    for run in runs:
        plan = plan_of(run, q_BHW.shape[1])
        most = multiprocessors * plan.programs_per_multiprocessor // q_BHW.shape[0]
        few = triton.cdiv(run.capacity, plan.tile.block_n * BLOCKS_PER_SPLIT)
        launches.append((run, plan.tile, max(1, min(most, few))))
    return _launch(q_BHW, launches, scale, value_width, parts_dtype or q_BHW.dtype)


def plan_of(run: Rows, heads: int) -> Plan:
    """The tile shipped for a run's kind and width.

    Raises:
        ValueError: if its tile has more columns than one that is shipped.
    """
    if gluon.fits(run, heads) or gluon_fp8.fits(run, heads):
        return HOPPER_PLAN
    if run.width > max(PLANS):
        raise ValueError(f"no tile is shipped for rows of {run.width}; 1024 is the widest")
    real, tail = _columns(run)
    widest = 1024 if real > 512 else 576 if tail else 512
    if run.scale_bT is not None:
        is_576 = (real, tail) == (512, 64) and run.pages_BN is None
        return FP8_PLANS[1024 if widest == 1024 else 576 if is_576 else 512]
    return (PLANS if run.pages_BN is None else PAGED_PLANS)[widest]


def _launch(
    q_BHW: torch.Tensor,
    launches: Sequence[tuple[Rows, Tile, int]],
    scale: float,
    value_width: int,
    parts_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One transposed kernel for each run, all into one set of partial outputs, then the merge."""
    batch, heads, _ = q_BHW.shape
    total = sum(n_splits for _, _, n_splits in launches)
    parts_BSVH = torch.empty(
        batch, total, value_width, heads, dtype=parts_dtype, device=q_BHW.device
    )
    parts_lse_BSH = torch.empty(batch, total, heads, dtype=torch.float32, device=q_BHW.device)
    first = 0
    for run, tile, n_splits in launches:
        if run.rank < value_width:
            parts_BSVH[:, first : first + n_splits, run.rank :].zero_()
        if tile == WARPGROUPS:
            by_warpgroups = gluon if run.scale_bT is None else gluon_fp8
            by_warpgroups.launch(
                q_BHW,
                run,
                parts_BSVH,
                parts_lse_BSH,
                scale_log2=scale * LOG2_E,
                first_split=first,
                n_splits=n_splits,
            )
            first += n_splits
            continue
        constants = launch_constants(tile, run, heads=heads, value_width=value_width)
        tail = run.rope_bTS
        if tail is None:
            tail = run.rows_bTW[..., constants["REAL"] :]
        transposed_kernel[(n_splits, batch)](
            q_BHW,
            run.rows_bTW,
            tail,
            q_BHW if run.scale_bT is None else run.scale_bT,
            run.lengths_B if run.pages_BN is None else run.pages_BN,
            run.lengths_B,
            parts_BSVH,
            parts_lse_BSH,
            scale * LOG2_E,
            first,
            total,
            *q_BHW.stride()[:2],
            *_strides(run, run.rows_bTW),
            *_strides(run, tail),
            0 if run.scale_bT is None else _strides(run, run.scale_bT)[0],
            0 if run.pages_BN is None else run.pages_BN.stride(0),
            **constants,
            **overlap(q_BHW),
        )
        first += n_splits
    return lse_merge(parts_BSVH, parts_lse_BSH, out_dtype=q_BHW.dtype)


def _strides(run: Rows, tensor: torch.Tensor) -> tuple[int, int]:
    """Strides over sequences (or pages) and tokens; 0 over sequences that share one copy."""
    shared = run.pages_BN is None and tensor.shape[0] == 1
    return 0 if shared else tensor.stride(0), tensor.stride(1)


def launch_constants(tile: Tile, run: Rows, *, heads: int, value_width: int) -> dict[str, Any]:
    """Compile-time arguments of a transposed launch.

    Raises:
        ValueError: if a page is no multiple of the tile.
    """
    page = 0 if run.pages_BN is None else run.rows_bTW.shape[1]
    if page % tile.block_n:
        raise ValueError(
            f"a page of {page} tokens is no multiple of the tile's {tile.block_n}; "
            "allocate pages of 64 or 128 tokens"
        )
    real, tail = _columns(run)
    return {
        "HEADS": heads,
        "BLOCK_H": max(16, triton.next_power_of_2(heads)),
        "MAIN": max(16, triton.next_power_of_2(real)),
        "REAL": real,
        "TAIL": max(16, triton.next_power_of_2(tail)) if tail else 0,
        "TAIL_REAL": tail,
        "RANK": run.rank,
        "VALUE": value_width,
        "PAGE": page,
        "SCALED": run.scale_bT is not None,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _columns(run: Rows) -> tuple[int, int]:
    """Columns of the first tile, which holds all values, and of the second, for keys only.

    A second tile saves padding where a power of two holds the values and little is left over;
    otherwise all is one tile.
    """
    if run.rope_bTS is not None:
        return run.rows_bTW.shape[-1], run.rope_bTS.shape[-1]
    real = 1 << (run.width.bit_length() - 1)
    left = run.width - real
    return (run.width, 0) if run.rank > real or left > WIDEST_TAIL else (real, left)
