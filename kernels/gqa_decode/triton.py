# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Split-KV grouped-query decode in Triton: the control against which the latent kernel is timed.

Axes: B batch, H query heads, K key/value heads, T cached tokens, D head width, S splits.

The same family as ``latent_decode``: one program per token range (and key/value head), lengths
read on the device, a fixed number of splits, the same merge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from internvideo3.kernels.gqa_decode.naive import KeysValues
from internvideo3.kernels.latent_decode.triton import BLOCKS_PER_SPLIT, LOG2_E, token_range
from internvideo3.kernels.lse_merge.triton import lse_merge
from internvideo3.kernels.triton_overlap import overlap, wait_for_inputs


@dataclass(frozen=True)
class Tile:
    """How one program walks its tokens."""

    block_n: int
    """Tokens per step."""
    num_warps: int
    num_stages: int


TILE = Tile(64, 4, 3)
FLOAT32_TILE = Tile(32, 8, 2)
"""Of float32, which needs twice the shared memory and registers."""
PROGRAMS_PER_MULTIPROCESSOR = 3


@triton.jit
def gqa_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    lengths_ptr,
    parts_ptr,
    parts_lse_ptr,
    scale_log2,
    first_split,
    total_splits,
    stride_qb,
    stride_qh,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The SHARE query heads of one key/value head over one token range; grid (S, K, B)."""
    wait_for_inputs(OVERLAP)
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start, end = token_range(tl.load(lengths_ptr + batch), split, tl.num_programs(0), BLOCK_N)

    member = tl.arange(0, BLOCK_G)
    column = tl.arange(0, WIDTH)
    here = member < SHARE
    head = kv_head * SHARE + member
    q = tl.load(
        q_ptr + batch * stride_qb + head[:, None] * stride_qh + column[None, :],
        mask=here[:, None],
        other=0.0,
    )
    top = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, WIDTH], tl.float32)
    keys_ptr += batch * stride_kb + kv_head * stride_kh
    values_ptr += batch * stride_vb + kv_head * stride_vh
    for first in range(start, end, BLOCK_N):
        step = tl.arange(0, BLOCK_N)
        valid = first + step < end
        first_long = tl.cast(first, tl.int64)
        keys = tl.load(
            keys_ptr + first_long * stride_kt + step[:, None] * stride_kt + column[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        values = tl.load(
            values_ptr + first_long * stride_vt + step[:, None] * stride_vt + column[None, :],
            mask=valid[:, None],
            other=0.0,
        )
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        scores = tl.where(valid[None, :], scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        keep = tl.exp2(top - new_top)
        weight = tl.exp2(scores - new_top[:, None])
        total = total * keep + tl.sum(weight, axis=1)
        acc = acc * keep[:, None]
        acc = tl.dot(weight.to(values.dtype), values, acc, input_precision="ieee")
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
            parts_ptr + slot * (WIDTH * HEADS) + column[None, :] * HEADS + head[:, None],
            (acc / divisor[:, None]).to(parts_ptr.dtype.element_ty),
            mask=here[:, None],
        )


def launch_constants(tile: Tile, *, heads: int, kv_heads: int, width: int) -> dict[str, Any]:
    """Compile-time arguments of a launch.

    Raises:
        ValueError: if the heads do not divide or the head width is no power of two.
    """
    if heads % kv_heads or width & (width - 1):
        raise ValueError(
            f"{heads} query heads must be a multiple of {kv_heads} key/value heads and the head "
            f"width {width} a power of two"
        )
    share = heads // kv_heads
    return {
        "HEADS": heads,
        "SHARE": share,
        "BLOCK_G": max(16, triton.next_power_of_2(share)),
        "WIDTH": width,
        "BLOCK_N": tile.block_n,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def gqa_decode(
    q_BHD: torch.Tensor,
    keys_BKTD: torch.Tensor,
    values_BKTD: torch.Tensor,
    lengths_B: torch.Tensor,
    *,
    scale: float,
    n_splits: int,
    tile: Tile,
    parts_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query per head; see ``naive.gqa_decode``.

    Args:
        q_BHD: queries, contiguous in D.
        keys_BKTD: cached keys, contiguous in D; other strides are free.
        values_BKTD: cached values, likewise.
        lengths_B: valid tokens, int32 on the device; only the kernel reads them.
        scale: factor on the scores.
        n_splits: programs per sequence and key/value head.
        tile: block sizes.
        parts_dtype: dtype of the partial outputs.

    Returns:
        Output ``[B, H, D]`` in the dtype of q, natural-log float32 log-sum-exp ``[B, H]``.
    """
    run = KeysValues(keys_bKTD=keys_BKTD, values_bKTD=values_BKTD, lengths_B=lengths_B)
    return _launch(q_BHD, [(run, n_splits)], scale, tile, parts_dtype)


def decode_runs(
    q_BHD: torch.Tensor,
    runs: Sequence[KeysValues],
    *,
    scale: float,
    multiprocessors: int,
    parts_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over several runs with the shipped tile; see ``naive.decode_runs``.

    Args:
        q_BHD: queries, contiguous in D.
        runs: at least one; keys and values contiguous in D.
        scale: factor on the scores.
        multiprocessors: of the device; decides how many programs share a run.
        parts_dtype: dtype of the partial outputs; None is that of q.

    Returns:
        Output ``[B, H, D]`` in the dtype of q, natural-log float32 log-sum-exp ``[B, H]``.
    """
    tile = FLOAT32_TILE if q_BHD.dtype == torch.float32 else TILE
    launches = []
    for run in runs:
        _, kv_heads, capacity, _ = run.keys_bKTD.shape
        most = multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // (q_BHD.shape[0] * kv_heads)
        few = triton.cdiv(capacity, tile.block_n * BLOCKS_PER_SPLIT)
        launches.append((run, max(1, min(most, few))))
    return _launch(q_BHD, launches, scale, tile, parts_dtype or q_BHD.dtype)


def _launch(
    q_BHD: torch.Tensor,
    launches: Sequence[tuple[KeysValues, int]],
    scale: float,
    tile: Tile,
    parts_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel for each run, all into one set of partial outputs, then the merge."""
    batch, heads, width = q_BHD.shape
    total = sum(n_splits for _, n_splits in launches)
    parts_BSDH = torch.empty(batch, total, width, heads, dtype=parts_dtype, device=q_BHD.device)
    parts_lse_BSH = torch.empty(batch, total, heads, dtype=torch.float32, device=q_BHD.device)
    first = 0
    for run, n_splits in launches:
        kv_heads = run.keys_bKTD.shape[1]
        gqa_kernel[(n_splits, kv_heads, batch)](
            q_BHD,
            run.keys_bKTD,
            run.values_bKTD,
            run.lengths_B,
            parts_BSDH,
            parts_lse_BSH,
            scale * LOG2_E,
            first,
            total,
            *q_BHD.stride()[:2],
            *_strides(run.keys_bKTD),
            *_strides(run.values_bKTD),
            **launch_constants(tile, heads=heads, kv_heads=kv_heads, width=width),
            **overlap(q_BHD),
        )
        first += n_splits
    return lse_merge(parts_BSDH, parts_lse_BSH, out_dtype=q_BHD.dtype)


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Strides over sequences (0 where they share one copy), heads and tokens."""
    of_sequence, of_head, of_token, _ = tensor.stride()
    return 0 if tensor.shape[0] == 1 else of_sequence, of_head, of_token
