# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
"""The Hopper kernel for rows whose latent is fp8.

Axes: B sequences, H query heads, R rank, S splits.

The warpgroup instruction reads both operands in one format, so a chunk of fp8 is copied to a small
ring and converted on its way into the tile: e4m3 to float16 is exact and one instruction for two
values. Queries become float16 too: exactly from 6e-5 to 65504, smaller ones to 3e-8. The rotary
chunk stays bfloat16, as it is cached. A row's scale is part of its weight's exponent (README), so
that weights of small latents do not leave float16's range.
"""

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from internvideo3.kernels.latent_decode.gluon import (
    CHUNK,
    NUM_WARPS,
    TILE,
    cta_barrier,
    fetch,
    reaches_last_row,
    store_parts,
    tile_base,
)
from internvideo3.kernels.latent_decode.rows import FP8, Rows
from internvideo3.kernels.triton_overlap import HOPPER, capability, overlap, wait_for_inputs

STAGES = gl.constexpr(3)
"""Chunks of fp8 on their way."""


@gluon.jit
def fetch_fp8(buffer, base_ptr, remaining, column, stride_rt):
    """Starts copying TILE rows of an fp8 chunk; rows behind the end become zeros."""
    load: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    step = gl.arange(0, TILE, gl.SliceLayout(1, load))
    place = gl.arange(0, CHUNK, gl.SliceLayout(0, load))
    source = base_ptr + step[:, None] * stride_rt + (column * CHUNK + place)[None, :]
    async_copy.async_copy_global_to_shared(buffer, source, mask=(step < remaining)[:, None])
    async_copy.commit_group()


@gluon.jit
def weigh_scaled(scores, row_scale, top, total):
    """As `weigh`, of scores that hold the row's scale; the sum of weights is without it."""
    new_top = gl.maximum(top, gl.max(scores, axis=0))
    keep = gl.exp2(top - new_top)
    weight = gl.exp2(scores - new_top[None, :])
    return weight, keep, new_top, total * keep[None, :] + weight * (1.0 / row_scale)[:, None]


@gluon.jit
def hopper_fp8_kernel(
    q_ptr,
    rows_ptr,
    rope_ptr,
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
    stride_kb,
    stride_kt,
    stride_sb,
    stride_pb,
    HEADS: gl.constexpr,
    VALUES: gl.constexpr,
    VALUE: gl.constexpr,
    PAGE: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Scores [tokens, heads], output [columns, heads] in VALUES chunks; grid (S, B)."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HEADS // 2, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEADS, 16])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    weight_shared: gl.constexpr = gl.NVMMASharedLayout(2 * HEADS, 16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 1, [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])

    split = gl.program_id(0)
    batch = gl.program_id(1).to(gl.int64)
    length = gl.load(lengths_ptr + batch)
    start = split * TILE
    step = gl.num_programs(0) * TILE
    late = reaches_last_row(split, gl.num_programs(0), length, 1)

    stages = gl.allocate_shared_memory(rows_ptr.dtype.element_ty, [STAGES, TILE, CHUNK], plain)
    tile = gl.allocate_shared_memory(gl.float16, [VALUES, TILE, CHUNK], swizzled)
    rope = gl.allocate_shared_memory(gl.bfloat16, [1, TILE, CHUNK], swizzled)
    q_tile = gl.allocate_shared_memory(gl.float16, [VALUES, HEADS, CHUNK], swizzled)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [1, HEADS, CHUNK], swizzled)
    weight_buffer = gl.allocate_shared_memory(gl.float16, [TILE, HEADS], weight_shared)

    if late:
        wait_for_inputs(OVERLAP)
    base = tile_base(
        rows_ptr, pages_ptr, batch, start, length, stride_rb, stride_rt, stride_pb, PAGE
    )
    for g in gl.static_range(STAGES):
        fetch_fp8(stages.index(g), base, length - start, g, stride_rt)
    rope_base = tile_base(
        rope_ptr, pages_ptr, batch, start, length, stride_kb, stride_kt, stride_pb, PAGE
    )
    fetch(rope.index(0), rope_base, length - start, 0, stride_kt)

    if not late:
        wait_for_inputs(OVERLAP)
    load: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    q_head = gl.arange(0, HEADS, gl.SliceLayout(1, load))
    q_place = gl.arange(0, CHUNK, gl.SliceLayout(0, load))
    q_source = q_ptr + batch * stride_qb + q_head[:, None] * stride_qh + q_place[None, :]
    queries = ()
    for c in gl.static_range(VALUES):
        queries = queries + (gl.load(q_source + c * CHUNK),)
    turned = gl.load(q_source + VALUE)
    for c in gl.static_range(VALUES):
        q_tile.index(c).store(queries[c].to(gl.float16))
    q_rope.index(0).store(turned)
    fence_async_shared()

    token = gl.arange(0, TILE, gl.SliceLayout(1, scores_layout))
    top = gl.full([HEADS], float("-inf"), gl.float32, gl.SliceLayout(0, scores_layout))
    total = gl.zeros([TILE, HEADS], gl.float32, scores_layout)
    accs = ()
    for _ in gl.static_range(VALUES):
        accs = accs + (gl.zeros([CHUNK, HEADS], gl.float32, out_layout),)

    slot = 0
    for first in range(start, length, step):
        next = first + step
        ahead = tile_base(
            rows_ptr, pages_ptr, batch, next, length, stride_rb, stride_rt, stride_pb, PAGE
        )
        rope_ahead = tile_base(
            rope_ptr, pages_ptr, batch, next, length, stride_kb, stride_kt, stride_pb, PAGE
        )
        scale_base = tile_base(
            row_scale_ptr, pages_ptr, batch, first, length, stride_sb, 1, stride_pb, PAGE
        )
        remaining = length - first
        row_scale = gl.load(scale_base + token, mask=token < remaining, other=1.0)
        raw = warpgroup_mma_init(gl.zeros([TILE, HEADS], gl.float32, scores_layout))
        for c in gl.static_range(VALUES):
            # The rotary chunk was fetched after the first STAGES chunks of its tile.
            if c < STAGES:
                async_copy.wait_group(STAGES)
            else:
                async_copy.wait_group(STAGES - 1)
            cta_barrier()
            stage = stages.index((slot + c) % STAGES)
            tile.index(c).store(stage.load(narrow).to(gl.float16))
            fence_async_shared()
            cta_barrier()
            if c + STAGES < VALUES:
                fetch_fp8(stage, base, remaining, c + STAGES, stride_rt)
            else:
                fetch_fp8(stage, ahead, remaining - step, c + STAGES - VALUES, stride_rt)
            query = q_tile.index(c).permute((1, 0))
            raw = warpgroup_mma(tile.index(c), query, raw, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[raw]) * row_scale[:, None]
        async_copy.wait_group(STAGES)
        fence_async_shared()
        cta_barrier()
        turning = warpgroup_mma(
            rope.index(0), q_rope.index(0).permute((1, 0)), scores, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=[turning])
        cta_barrier()
        fetch(rope.index(0), rope_ahead, remaining - step, 0, stride_kt)

        scores = scores * scale_log2 + gl.log2(row_scale)[:, None]
        scores = gl.where((token < remaining)[:, None], scores, float("-inf"))
        weight, keep, top, total = weigh_scaled(scores, row_scale, top, total)
        weight_buffer.store(weight.to(gl.float16))
        fence_async_shared()
        keep = gl.convert_layout(keep, gl.SliceLayout(0, out_layout))
        cta_barrier()

        running = ()
        for c in gl.static_range(VALUES):
            values = tile.index(c).permute((1, 0))
            scaled = accs[c] * keep[None, :]
            running = running + (warpgroup_mma(values, weight_buffer, scaled, is_async=True),)
        accs = ()
        for c in gl.static_range(VALUES):
            accs = accs + (warpgroup_mma_wait(VALUES - 1 - c, deps=[running[c]]),)
        base = ahead
        slot = (slot + VALUES) % STAGES
    async_copy.wait_group(0)

    store_parts(
        accs, top, total, parts_ptr, parts_lse_ptr, batch * total_splits + first_split + split,
        start < length, HEADS, VALUES * CHUNK, VALUE, VALUES, out_layout,
    )  # fmt: skip


def fits(run: Rows, heads: int) -> bool:
    """Whether the kernel takes such rows: rank 896 or less in chunks of 128, 128 rotary columns."""
    page = 0 if run.pages_BN is None else run.rows_bTW.shape[1]
    return (
        run.rows_bTW.is_cuda
        and capability(run.rows_bTW.device) == HOPPER
        and run.rows_bTW.dtype == FP8
        and run.rope_bTS is not None
        and run.rope_bTS.dtype == torch.bfloat16
        and run.rope_bTS.shape[-1] == CHUNK.value
        and heads == 32
        and run.rank % CHUNK.value == 0
        and STAGES.value <= run.rank // CHUNK.value <= 7
        and page % TILE.value == 0
    )


def launch_constants(run: Rows, *, heads: int, value_width: int) -> dict[str, Any]:
    """Compile-time arguments of a launch."""
    return {
        "HEADS": heads,
        "VALUES": run.rank // CHUNK.value,
        "VALUE": value_width,
        "PAGE": 0 if run.pages_BN is None else run.rows_bTW.shape[1],
        "num_warps": NUM_WARPS,
    }


def launch(
    q_BHW: torch.Tensor,
    run: Rows,
    parts_BSVH: torch.Tensor,
    parts_lse_BSH: torch.Tensor,
    *,
    scale_log2: float,
    first_split: int,
    n_splits: int,
) -> None:
    """As ``gluon.launch``, for rows that ``fits`` accepts."""
    rope, scale = run.rope_bTS, run.scale_bT
    assert rope is not None and scale is not None
    batch, heads, _ = q_BHW.shape
    rows, shared = run.rows_bTW, run.pages_BN is None and run.rows_bTW.shape[0] == 1
    hopper_fp8_kernel[(n_splits, batch)](
        q_BHW,
        rows,
        rope,
        scale,
        run.lengths_B if run.pages_BN is None else run.pages_BN,
        run.lengths_B,
        parts_BSVH,
        parts_lse_BSH,
        scale_log2,
        first_split,
        parts_BSVH.shape[1],
        *q_BHW.stride()[:2],
        0 if shared else rows.stride(0),
        rows.stride(1),
        0 if shared else rope.stride(0),
        rope.stride(1),
        0 if shared else scale.stride(0),
        0 if run.pages_BN is None else run.pages_BN.stride(0),
        **launch_constants(run, heads=heads, value_width=parts_BSVH.shape[2]),
        **overlap(q_BHW),
    )
