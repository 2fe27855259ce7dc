# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The log-sum-exp merge as one Triton kernel, one pass over the partial outputs.

Axes: B batch, S splits, H heads, V value width.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from internvideo3.kernels.overlap import overlap, wait_for_inputs

LN2 = tl.constexpr(0.6931471805599453)
MAX_SPLITS = 64
"""Splits read at once: more would cost registers, and with them programs side by side."""
COLUMNS = 64
"""(Value, head) columns of a program."""


@triton.jit
def merge_kernel(
    parts_ptr,
    parts_lse_ptr,
    out_ptr,
    lse_ptr,
    n_splits,
    HEADS: tl.constexpr,
    VALUE: tl.constexpr,
    HEAD_MINOR: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Merge BLOCK_V values of BLOCK_H heads of one sequence; grid (V, H, B) in blocks."""
    wait_for_inputs(OVERLAP)
    value = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    batch = tl.program_id(2).to(tl.int64)
    parts_ptr += batch * n_splits * HEADS * VALUE
    parts_lse_ptr += batch * n_splits * HEADS
    real_head = head < HEADS
    inside = (value < VALUE)[:, None] & real_head[None, :]
    if HEAD_MINOR:
        column = value[:, None] * HEADS + head[None, :]
    else:
        column = head[None, :] * VALUE + value[:, None]

    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_V, BLOCK_H], tl.float32)
    for first in range(0, n_splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        here = split < n_splits
        lse = tl.load(
            parts_lse_ptr + split[:, None] * HEADS + head[None, :],
            mask=here[:, None] & real_head[None, :],
            other=float("-inf"),
        )
        part = tl.load(
            parts_ptr + split[:, None, None] * (HEADS * VALUE) + column[None, :, :],
            mask=here[:, None, None] & inside[None, :, :],
            other=0.0,
        )
        # A split without tokens never wrote its part: what lies there may be NaN.
        part = tl.where((lse > float("-inf"))[:, None, :], part, 0.0).to(tl.float32)
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        safe = tl.where(new_top > float("-inf"), new_top, 0.0)
        keep = tl.exp2(top - safe)
        weight = tl.exp2(lse - safe[None, :])
        total = total * keep + tl.sum(weight, axis=0)
        acc = acc * keep[None, :] + tl.sum(weight[:, None, :] * part, axis=0)
        top = new_top

    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    out = acc / divisor[None, :]
    tl.store(
        out_ptr + batch * HEADS * VALUE + head[None, :] * VALUE + value[:, None],
        out.to(out_ptr.dtype.element_ty),
        mask=inside,
    )
    lse = tl.where(some, (top + tl.log2(divisor)) * LN2, float("-inf"))
    tl.store(
        lse_ptr + batch * HEADS + head, lse, mask=real_head & (tl.program_id(0) == 0)
    )  # fmt: skip


def launch_constants(
    n_splits: int, *, heads: int, value_width: int, head_minor: bool
) -> dict[str, Any]:
    """Compile-time arguments of a launch; heads together only where they lie side by side."""
    block_h = triton.next_power_of_2(heads) if head_minor else 1
    block_v = min(max(1, COLUMNS // block_h), triton.next_power_of_2(value_width))
    return {
        "HEADS": heads,
        "VALUE": value_width,
        "HEAD_MINOR": head_minor,
        "BLOCK_S": min(MAX_SPLITS, triton.next_power_of_2(n_splits)),
        "BLOCK_V": block_v,
        "BLOCK_H": block_h,
        "num_warps": 4,
    }


def lse_merge(
    parts: torch.Tensor,
    log2_lse_BSH: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    head_minor: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial attention outputs; see ``naive.lse_merge`` for the meaning.

    Args:
        parts: contiguous ``[B, S, H, V]``, or ``[B, S, V, H]`` when ``head_minor``.
        log2_lse_BSH: contiguous float32 base-2 log-sum-exp.
        out_dtype: dtype of the merged output.
        head_minor: the layout of ``parts``; the transposed decode kernel writes heads innermost.

    Returns:
        Output ``[B, H, V]`` and natural-log float32 log-sum-exp ``[B, H]``.
    """
    batch, n_splits, heads = log2_lse_BSH.shape
    value = parts.shape[2] if head_minor else parts.shape[3]
    out_BHV = torch.empty(batch, heads, value, dtype=out_dtype, device=parts.device)
    lse_BH = torch.empty(batch, heads, dtype=torch.float32, device=parts.device)
    constants = launch_constants(n_splits, heads=heads, value_width=value, head_minor=head_minor)
    blocks = (
        triton.cdiv(value, constants["BLOCK_V"]), triton.cdiv(heads, constants["BLOCK_H"])
    )  # fmt: skip
    merge_kernel[(*blocks, batch)](
        parts, log2_lse_BSH, out_BHV, lse_BH, n_splits, **constants, **overlap(parts)
    )
    return out_BHV, lse_BH
