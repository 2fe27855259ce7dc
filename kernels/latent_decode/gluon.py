# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, var-annotated"
"""Split-KV absorbed decode for Hopper, in Gluon: both matrix products by warpgroups.

Axes: B sequences, H query heads, W row width, V value width (the query's rank), R rank of a run,
S splits.

Triton's own pipeline keeps whole tiles in flight, and two tiles of 64 tokens by 1024 columns do not
fit the shared memory; with 32 tokens the scores miss the warpgroup instruction and shared memory
becomes the limit (README). Here a tile of 64 tokens is cut into chunks of 128 columns in a ring of
buffers. A chunk that is only a key is replaced as soon as its scores are known, and so are the
first HELD chunks of values, which wait for the weights in registers; the others once their part of
the output is known. So copies go on while the tile is worked on: without the held chunks the ring
would be a chunk longer than a tile, too little to keep the memory busy (README).
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

from internvideo3.kernels.latent_decode.rows import Rows
from internvideo3.kernels.triton_overlap import HOPPER, capability, overlap, wait_for_inputs

TILE = gl.constexpr(64)
"""Tokens at a time: the height of a warpgroup's product."""
CHUNK = gl.constexpr(128)
"""Columns of a buffer: one product of two warpgroups."""
HELD = 3
"""Chunks of values kept in registers, 16 a thread each; a fourth leaves none to spare."""
GROUP = 2
"""Chunks between two barriers."""
NUM_WARPS = 8
SHARED_BYTES = 232448 - 4096 - 2048
"""For the queries and the ring; the rest holds the weights of a tile and reductions."""

# Named anew in triton 3.8.
cta_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def fetch(buffer, base_ptr, remaining, column, stride_rt):
    """Starts copying TILE rows of a chunk; rows behind the end become zeros."""
    load: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    step = gl.arange(0, TILE, gl.SliceLayout(1, load))
    place = gl.arange(0, CHUNK, gl.SliceLayout(0, load))
    source = base_ptr + step[:, None] * stride_rt + (column * CHUNK + place)[None, :]
    async_copy.async_copy_global_to_shared(buffer, source, mask=(step < remaining)[:, None])
    async_copy.commit_group()


@gluon.jit
def reaches_last_row(split, n_splits, length, TILES: gl.constexpr):
    """Whether a sequence's last row may be among a program's first TILES tiles.

    The predecessor writes that row and no other, so all others may be read before the wait.
    """
    return (split + TILES * n_splits) * TILE >= length


@gluon.jit
def refill(
    buffer, ahead_1, ahead_2, remaining, step,
    POSITION: gl.constexpr, CHUNKS: gl.constexpr, VALUES: gl.constexpr, stride_rt,
):  # fmt: skip
    """Starts copying the chunk at a position of the next tile or of the one after it."""
    column: gl.constexpr = (POSITION + VALUES) % CHUNKS
    if POSITION < 2 * CHUNKS:
        fetch(buffer, ahead_1, remaining - step, column, stride_rt)
    else:
        fetch(buffer, ahead_2, remaining - 2 * step, column, stride_rt)


@gluon.jit
def tile_base(
    rows_ptr, pages_ptr, batch, first, end, stride_rb, stride_rt, stride_pb, PAGE: gl.constexpr
):
    """Pointer to a tile's first row; 64-bit, since 2.5M rows of 1024 exceed 2**31 values."""
    if PAGE > 0:
        page = gl.load(pages_ptr + batch * stride_pb + first // PAGE, mask=first < end, other=0)
        return rows_ptr + page.to(gl.int64) * stride_rb + (first % PAGE).to(gl.int64) * stride_rt
    else:
        return rows_ptr + batch * stride_rb + first.to(gl.int64) * stride_rt


@gluon.jit
def weigh(scores, top, total):
    """A tile's weights by the online softmax, the factor on what came before, the new state."""
    new_top = gl.maximum(top, gl.max(scores, axis=0))
    keep = gl.exp2(top - new_top)
    weight = gl.exp2(scores - new_top[None, :])
    return weight, keep, new_top, total * keep[None, :] + weight


@gluon.jit
def store_parts(
    accs, top, total, parts_ptr, parts_lse_ptr, place, is_some,
    HEADS: gl.constexpr, RANK: gl.constexpr, VALUE: gl.constexpr, VALUES: gl.constexpr,
    out_layout: gl.constexpr,
):  # fmt: skip
    """Writes a program's partial output and its log-sum-exp; no output where it had no tokens."""
    summed = gl.sum(total, axis=0)
    some = summed > 0.0
    divisor = gl.where(some, summed, 1.0)
    head = gl.arange(0, HEADS, top.type.layout)
    lse = gl.where(some, top + gl.log2(divisor), float("-inf"))
    gl.store(parts_lse_ptr + place * HEADS + head, lse)
    if is_some:
        inverse = gl.convert_layout(1.0 / divisor, gl.SliceLayout(0, out_layout))
        out_head = gl.arange(0, HEADS, gl.SliceLayout(0, out_layout))
        out_place = gl.arange(0, CHUNK, gl.SliceLayout(1, out_layout))
        to_ptr = parts_ptr + place * (VALUE * HEADS)
        for c in gl.static_range(VALUES):
            value = c * CHUNK + out_place
            gl.store(
                to_ptr + value[:, None] * HEADS + out_head[None, :],
                (accs[c] * inverse[None, :]).to(parts_ptr.dtype.element_ty),
                mask=(value < RANK)[:, None],
            )


@gluon.jit
def hopper_kernel(
    q_ptr,
    rows_ptr,
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
    stride_pb,
    HEADS: gl.constexpr,
    CHUNKS: gl.constexpr,
    RANK: gl.constexpr,
    VALUE: gl.constexpr,
    PAGE: gl.constexpr,
    RING: gl.constexpr,
    HELD: gl.constexpr,
    GROUP: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """Scores [tokens, heads], output [columns, heads] in chunks; grid (S, B)."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    VALUES: gl.constexpr = (RANK + CHUNK - 1) // CHUNK
    KEYS: gl.constexpr = CHUNKS - VALUES
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HEADS // 2, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEADS, 16])
    held_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    EARLY: gl.constexpr = KEYS + HELD
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    weight_shared: gl.constexpr = gl.NVMMASharedLayout(2 * HEADS, 16, rank=2)

    split = gl.program_id(0)
    batch = gl.program_id(1).to(gl.int64)
    length = gl.load(lengths_ptr + batch)
    # Tiles are dealt out in turn: all programs together read one stretch of memory at a time.
    start = split * TILE
    step = gl.num_programs(0) * TILE
    late = reaches_last_row(split, gl.num_programs(0), length, (RING + CHUNKS - 1) // CHUNKS)

    ring = gl.allocate_shared_memory(dtype, [RING, TILE, CHUNK], swizzled)
    q_shared = gl.allocate_shared_memory(dtype, [CHUNKS, HEADS, CHUNK], swizzled)
    weight_buffer = gl.allocate_shared_memory(dtype, [TILE, HEADS], weight_shared)

    if late:
        wait_for_inputs(OVERLAP)
    # Position p of a tile is column chunk (p + VALUES) % CHUNKS: those that are only keys first.
    for g in gl.static_range(RING):
        first = start + (g // CHUNKS) * step
        tile = tile_base(
            rows_ptr, pages_ptr, batch, first, length, stride_rb, stride_rt, stride_pb, PAGE
        )
        fetch(ring.index(g), tile, length - first, (g + VALUES) % CHUNKS, stride_rt)

    if not late:
        wait_for_inputs(OVERLAP)
    load: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    q_head = gl.arange(0, HEADS, gl.SliceLayout(1, load))
    q_place = gl.arange(0, CHUNK, gl.SliceLayout(0, load))
    queries = ()
    for c in gl.static_range(CHUNKS):
        column = c * CHUNK + q_place
        # Columns of a nested rank: the first of the query's latent ones, then its rotary ones.
        column = gl.where(column < RANK, column, column + (VALUE - RANK))
        source = q_ptr + batch * stride_qb + q_head[:, None] * stride_qh + column[None, :]
        queries = queries + (gl.load(source),)
    # All are on their way before the first is stored: each store waits for its load.
    for c in gl.static_range(CHUNKS):
        q_shared.index(c).store(queries[c])
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
        ahead_1 = tile_base(
            rows_ptr, pages_ptr, batch, next, length, stride_rb, stride_rt, stride_pb, PAGE
        )
        ahead_2 = tile_base(
            rows_ptr, pages_ptr, batch, next + step, length, stride_rb, stride_rt, stride_pb, PAGE
        )
        remaining = length - first
        raw = warpgroup_mma_init(gl.zeros([TILE, HEADS], gl.float32, scores_layout))
        held = ()
        for g in gl.static_range(0, CHUNKS, GROUP):
            if g >= 2 * GROUP:
                raw = warpgroup_mma_wait(GROUP, deps=[raw])
            async_copy.wait_group(RING - GROUP - g + min(max(g - 2 * GROUP, 0), EARLY))
            cta_barrier()
            fence_async_shared()
            for p in gl.static_range(g, g + GROUP):
                keys = ring.index((slot + p) % RING)
                query = q_shared.index((p + VALUES) % CHUNKS).permute((1, 0))
                raw = warpgroup_mma(keys, query, raw, is_async=True)
            for p in gl.static_range(max(g, KEYS), min(g + GROUP, EARLY)):
                keys = ring.index((slot + p) % RING)
                held = held + (keys.permute((1, 0)).load(held_layout),)
            for p in gl.static_range(max(g - 2 * GROUP, 0), min(g - GROUP, EARLY)):
                buffer = ring.index((slot + p) % RING)
                refill(
                    buffer, ahead_1, ahead_2, remaining, step, p + RING, CHUNKS, VALUES, stride_rt
                )
        scores = warpgroup_mma_wait(0, deps=[raw])
        if max(CHUNKS - 2 * GROUP, 0) < EARLY:
            cta_barrier()
            for p in gl.static_range(max(CHUNKS - 2 * GROUP, 0), EARLY):
                buffer = ring.index((slot + p) % RING)
                refill(
                    buffer, ahead_1, ahead_2, remaining, step, p + RING, CHUNKS, VALUES, stride_rt
                )

        scores = gl.where((token < remaining)[:, None], scores * scale_log2, float("-inf"))
        weight, keep, top, total = weigh(scores, top, total)
        weight_buffer.store(weight.to(dtype))
        fence_async_shared()
        keep = gl.convert_layout(keep, gl.SliceLayout(0, out_layout))
        cta_barrier()

        running = ()
        for c in gl.static_range(HELD, VALUES):
            values = ring.index((slot + KEYS + c) % RING).permute((1, 0))
            scaled = accs[c] * keep[None, :]
            running = running + (warpgroup_mma(values, weight_buffer, scaled, is_async=True),)
        for c in gl.static_range(HELD):
            scaled = accs[c] * keep[None, :]
            running = running + (warpgroup_mma(held[c], weight_buffer, scaled, is_async=True),)
        accs = ()
        for g in gl.static_range(HELD, VALUES, GROUP):
            for c in gl.static_range(g, min(g + GROUP, VALUES)):
                done = warpgroup_mma_wait(
                    VALUES - min(g + GROUP, VALUES) + HELD, deps=[running[c - HELD]]
                )
                accs = accs + (done,)
            cta_barrier()
            for c in gl.static_range(g, min(g + GROUP, VALUES)):
                buffer = ring.index((slot + KEYS + c) % RING)
                refill(
                    buffer, ahead_1, ahead_2, remaining, step, KEYS + c + RING, CHUNKS, VALUES,
                    stride_rt,
                )  # fmt: skip
        first_accs = ()
        for c in gl.static_range(HELD):
            done = warpgroup_mma_wait(HELD - 1 - c, deps=[running[VALUES - HELD + c]])
            first_accs = first_accs + (done,)
        accs = first_accs + accs
        slot = (slot + CHUNKS) % RING
    async_copy.wait_group(0)

    store_parts(
        accs, top, total, parts_ptr, parts_lse_ptr, batch * total_splits + first_split + split,
        start < length, HEADS, RANK, VALUE, VALUES, out_layout,
    )  # fmt: skip


def fits(run: Rows, heads: int) -> bool:
    """Whether the kernel takes such rows: bfloat16 of 512 or 1024 columns, for 32 heads.

    More heads need more accumulators than a thread has registers, and a larger query than leaves
    room for a ring of one tile.
    """
    page = 0 if run.pages_BN is None else run.rows_bTW.shape[1]
    return (
        run.rows_bTW.is_cuda
        and capability(run.rows_bTW.device) == HOPPER
        and run.scale_bT is None
        and run.rows_bTW.dtype == torch.bfloat16
        and heads == 32
        and run.width in (512, 1024)
        and page % TILE.value == 0
    )


def launch_constants(run: Rows, *, heads: int, value_width: int) -> dict[str, Any]:
    """Compile-time arguments of a launch."""
    chunks = run.width // CHUNK.value
    buffer = TILE.value * CHUNK.value * 2
    ring = min((SHARED_BYTES - run.width * heads * 2) // buffer, 2 * chunks)
    assert ring > chunks, "a tile must fit, and a chunk of the next"
    return {
        "HEADS": heads,
        "CHUNKS": chunks,
        "RANK": run.rank,
        "VALUE": value_width,
        "PAGE": 0 if run.pages_BN is None else run.rows_bTW.shape[1],
        "RING": ring,
        "HELD": min(HELD, -(-run.rank // CHUNK.value)),
        "GROUP": GROUP,
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
    """Write the partial outputs of one run into splits [first_split, first_split + n_splits).

    Args:
        q_BHW: absorbed query, contiguous in W.
        run: rows that ``fits`` accepts, contiguous in W.
        parts_BSVH: partial outputs of all runs.
        parts_lse_BSH: their base-2 log-sum-exp.
        scale_log2: factor on the scores, times log2(e).
        first_split: where this run's splits begin.
        n_splits: programs per sequence.
    """
    batch, heads, _ = q_BHW.shape
    rows = run.rows_bTW
    shared = run.pages_BN is None and rows.shape[0] == 1
    hopper_kernel[(n_splits, batch)](
        q_BHW,
        rows,
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
        0 if run.pages_BN is None else run.pages_BN.stride(0),
        **launch_constants(run, heads=heads, value_width=parts_BSVH.shape[2]),
        **overlap(q_BHW),
    )
