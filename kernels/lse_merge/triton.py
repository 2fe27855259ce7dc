# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The log-sum-exp merge as one Triton kernel, one pass over the partial outputs.

Axes: B batch, S splits, H heads, V value width.
"""

from typing import Any

import torch
import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
BLOCK_S = 32
BLOCK_C = 128


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
    BLOCK_C: tl.constexpr,
):
    """Merge a block of (head, value) columns of one sequence; grid (columns / BLOCK_C, B)."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    batch = tl.program_id(1).to(tl.int64)
    inside = column < HEADS * VALUE
    if HEAD_MINOR:
        head = column % HEADS
        value = column // HEADS
    else:
        head = column // VALUE
        value = column % VALUE
    parts_ptr += batch * n_splits * HEADS * VALUE
    parts_lse_ptr += batch * n_splits * HEADS

    top = tl.full([BLOCK_C], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_C], tl.float32)
    acc = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, n_splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        mask = (split < n_splits)[:, None] & inside[None, :]
        lse = tl.load(
            parts_lse_ptr + split[:, None] * HEADS + head[None, :], mask=mask, other=float("-inf")
        )
        part = tl.load(
            parts_ptr + split[:, None] * (HEADS * VALUE) + column[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        # A split without tokens never wrote its part: what lies there may be NaN.
        part = tl.where(lse > float("-inf"), part, 0.0)
        new_top = tl.maximum(top, tl.max(lse, axis=0))
        safe = tl.where(new_top > float("-inf"), new_top, 0.0)
        keep = tl.exp2(top - safe)
        weight = tl.exp2(lse - safe[None, :])
        total = total * keep + tl.sum(weight, axis=0)
        acc = acc * keep + tl.sum(weight * part, axis=0)
        top = new_top

    some = total > 0.0
    divisor = tl.where(some, total, 1.0)
    out = acc / divisor
    tl.store(
        out_ptr + batch * HEADS * VALUE + head * VALUE + value,
        out.to(out_ptr.dtype.element_ty),
        mask=inside,
    )
    lse = tl.where(some, (top + tl.log2(divisor)) * LN2, float("-inf"))
    tl.store(lse_ptr + batch * HEADS + head, lse, mask=inside & (value == 0))


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
    constants: dict[str, Any] = {"BLOCK_S": BLOCK_S, "BLOCK_C": BLOCK_C, "num_warps": 4}
    merge_kernel[(triton.cdiv(heads * value, BLOCK_C), batch)](
        parts, log2_lse_BSH, out_BHV, lse_BH, n_splits, heads, value, head_minor, **constants
    )
    return out_BHV, lse_BH
