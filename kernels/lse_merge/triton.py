# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
"""The log-sum-exp merge as one Triton kernel, one pass over the partial outputs.

Axes: B batch, S splits, H heads, V value width.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from internvideo3.kernels.lse_merge import naive
from internvideo3.kernels.triton_overlap import overlap, wait_for_inputs

LN2 = tl.constexpr(0.6931471805599453)
BLOCK_S = 16
"""Fewest splits in one block of registers."""
MAX_BLOCKS = 9
MOST_SPLITS = 528
"""Of one launch, of two bytes a value: four runs that fill an H200, the most that is compiled for
it without a spill."""
COLUMNS = 32
"""(Value, head) columns of a program."""
NUM_WARPS = 4


@triton.jit
def merge_kernel(
    parts_ptr,
    parts_lse_ptr,
    out_ptr,
    lse_ptr,
    n_splits,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Merge BLOCK_V values of BLOCK_H heads of one sequence; grid (V, H, B) in blocks.

    Sums over splits cost barriers, so there are three in all: the largest log-sum-exp, the weights,
    the weighted parts. Every load is issued before the first of them.
    """
    wait_for_inputs(OVERLAP)
    value = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    batch = tl.program_id(2).to(tl.int64)
    parts_ptr += batch * n_splits * HEADS * VALUE
    parts_lse_ptr += batch * n_splits * HEADS
    real_head = head < HEADS
    inside = (value < VALUE)[:, None] & real_head[None, :]
    column = value[:, None] * HEADS + head[None, :]

    # The log-sum-exps are read once for each value as well, since equal shapes need no exchange
    # between threads, and once more for the weights, since kept they would take half of all
    # registers, and with them half of the programs that run side by side.
    lse_ptr_VH = parts_lse_ptr + head[None, None, :] + 0 * value[None, :, None]
    split = tl.arange(0, BLOCK_S)[:, None, None]
    parts = ()
    highest = tl.full([BLOCK_S, BLOCK_V, BLOCK_H], float("-inf"), tl.float32)
    for block in tl.static_range(BLOCKS):
        real = (block * BLOCK_S + split < n_splits) & inside[None, :, :]
        place = (block * BLOCK_S + split) * (HEADS * VALUE) + column[None, :, :]
        parts = parts + (tl.load(parts_ptr + place, mask=real, other=0.0),)
        place = (block * BLOCK_S + split) * HEADS
        lse = tl.load(lse_ptr_VH + place, mask=real, other=float("-inf"))
        highest = tl.maximum(highest, lse)
    top = tl.max(highest, axis=0)
    safe = tl.where(top > float("-inf"), top, 0.0)[None, :, :]
    weights = tl.zeros([BLOCK_S, BLOCK_V, BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_S, BLOCK_V, BLOCK_H], tl.float32)
    for block in tl.static_range(BLOCKS):
        real = (block * BLOCK_S + split < n_splits) & inside[None, :, :]
        place = (block * BLOCK_S + split) * HEADS
        weight = tl.exp2(tl.load(lse_ptr_VH + place, mask=real, other=float("-inf")) - safe)
        weights += weight
        # A split without tokens never wrote its part: what lies there may be NaN.
        acc += weight * tl.where(weight > 0.0, parts[block].to(tl.float32), 0.0)
    total = tl.sum(weights, axis=0)

    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    tl.store(
        out_ptr + batch * HEADS * VALUE + head[None, :] * VALUE + value[:, None],
        (tl.sum(acc, axis=0) / divisor).to(out_ptr.dtype.element_ty),
        mask=inside,
    )
    total_lse = tl.where(some, (top + tl.log2(divisor)) * LN2, float("-inf"))
    first = (value == 0)[:, None] & real_head[None, :]
    tl.store(lse_ptr + batch * HEADS + head[None, :] + 0 * value[:, None], total_lse, mask=first)


def launch_constants(n_splits: int, *, heads: int, value_width: int) -> dict[str, Any]:
    """Compile-time arguments of a launch."""
    block_s = max(BLOCK_S, triton.next_power_of_2(triton.cdiv(n_splits, MAX_BLOCKS)))
    block_h = min(COLUMNS, triton.next_power_of_2(heads))
    block_v = min(max(1, COLUMNS // block_h), triton.next_power_of_2(value_width))
    return {
        "HEADS": heads,
        "VALUE": value_width,
        "BLOCKS": triton.cdiv(n_splits, block_s),
        "BLOCK_S": block_s,
        "BLOCK_V": block_v,
        "BLOCK_H": block_h,
        "num_warps": NUM_WARPS,
    }


def most_splits(dtype: torch.dtype) -> int:
    """How many parts of a dtype one launch merges: each thread holds its values of all of them."""
    return MOST_SPLITS * 2 // max(2, dtype.itemsize)


def lse_merge(
    parts_BSVH: torch.Tensor, log2_lse_BSH: torch.Tensor, *, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial attention outputs; see ``naive.lse_merge`` for the meaning.

    Args:
        parts_BSVH: contiguous, heads innermost, as the decode kernels write them.
        log2_lse_BSH: contiguous float32 base-2 log-sum-exp.
        out_dtype: dtype of the merged output.

    Returns:
        Output ``[B, H, V]`` and natural-log float32 log-sum-exp ``[B, H]``.
    """
    batch, n_splits, heads = log2_lse_BSH.shape
    value = parts_BSVH.shape[2]
    if n_splits > most_splits(parts_BSVH.dtype):
        return _merge_in_groups(parts_BSVH, log2_lse_BSH, out_dtype)
    out_BHV = torch.empty(batch, heads, value, dtype=out_dtype, device=parts_BSVH.device)
    lse_BH = torch.empty(batch, heads, dtype=torch.float32, device=parts_BSVH.device)
    constants = launch_constants(n_splits, heads=heads, value_width=value)
    blocks = (
        triton.cdiv(value, constants["BLOCK_V"]), triton.cdiv(heads, constants["BLOCK_H"])
    )  # fmt: skip
    merge_kernel[(*blocks, batch)](
        parts_BSVH, log2_lse_BSH, out_BHV, lse_BH, n_splits, **constants, **overlap(parts_BSVH)
    )
    return out_BHV, lse_BH


def _merge_in_groups(
    parts_BSVH: torch.Tensor, log2_lse_BSH: torch.Tensor, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges so many splits at a time, then what became of them, in float32."""
    most = most_splits(parts_BSVH.dtype)
    groups = (t.split(most, dim=1) for t in (parts_BSVH, log2_lse_BSH))
    found = [
        lse_merge(parts.contiguous(), lse.contiguous(), out_dtype=torch.float32)
        for parts, lse in zip(*groups, strict=True)
    ]
    outs_GBHV, lses_GBH = (torch.stack(one) for one in zip(*found, strict=True))
    log2_BGH = lses_GBH.transpose(0, 1) / naive.LN2
    out_BHV, lse_BH = naive.lse_merge(outs_GBHV.transpose(0, 1), log2_BGH)
    return out_BHV.to(out_dtype), lse_BH
