"""Correctness and speed of every kernel on a GPU, written point by point to one JSON file.

    python -m internvideo3.harness.gpu.kernels --out kernels.json --budget-s 150

Every kernel and tile is first compared with float64 on fresh random inputs, its outputs poisoned
with NaN; what fails is not timed. ``--device cpu`` under ``TRITON_INTERPRET=1`` rehearses the
script on tiny shapes.

Axes: B batch, H query heads, K key/value heads, T tokens, R row width, V value width, D head width.
"""

import functools
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any

import torch

from internvideo3.harness.gpu import rows as row_forms
from internvideo3.harness.gpu.measure import (
    Results,
    ResultsError,
    device_given,
    in_words,
    poisoned,
    rotation,
    say,
    script_parser,
    time_calls,
    timing_fields,
)
from internvideo3.kernels.choice import multiprocessors
from internvideo3.kernels.decode_linear import naive as linear_naive
from internvideo3.kernels.decode_linear import triton as linear
from internvideo3.kernels.gqa_append import naive as gqa_append_naive
from internvideo3.kernels.gqa_append import triton as gqa_append
from internvideo3.kernels.gqa_decode import naive as gqa_naive
from internvideo3.kernels.gqa_decode import triton as gqa
from internvideo3.kernels.latent_append import naive as append_naive
from internvideo3.kernels.latent_append import triton as append
from internvideo3.kernels.latent_decode import naive as latent_naive
from internvideo3.kernels.latent_decode import triton as latent
from internvideo3.kernels.latent_expand import naive as expand_naive
from internvideo3.kernels.latent_expand import triton as expand
from internvideo3.kernels.latent_prefill import cudnn
from internvideo3.kernels.latent_prefill import naive as prefill_naive
from internvideo3.kernels.latent_prefill import triton as prefill
from internvideo3.kernels.latent_token import naive as token_naive
from internvideo3.kernels.latent_token import triton as token
from internvideo3.kernels.lse_merge.triton import lse_merge

TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 1e-5}
WORKERS = 10
CHECK_S = 90
"""A check that takes longer hangs; the first ones of a process wait for its compiler."""
TIMED_SHARE = 0.15
"""Of the budget, kept for what is timed: checks that hang do not take it."""
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
LATENT = {"m2la-1024": (1024, 896), "m2la-576": (576, 512), "m2la-512": (512, 384)}

LATENT_TILES = {
    "m2la-1024": (latent.WARPGROUPS, latent.Tile("transposed", 32, 8, 3)),
    "m2la-576": (latent.Tile("transposed", 64, 8, 2), latent.Tile("transposed", 32, 4, 3)),
    "m2la-512": (latent.WARPGROUPS, latent.Tile("transposed", 32, 4, 3)),
}
GQA_TILES = (gqa.Tile(64, 4, 3), gqa.Tile(64, 4, 4), gqa.Tile(128, 4, 3), gqa.Tile(128, 8, 3))
PREFILL_TILES = {256: (prefill.Tile(128, 64, 8, 3),), 128: (prefill.Tile(128, 128, 8, 2),)}
LINEAR_TILES = (
    linear.TILE,
    linear.Tile(4, 1024, 4, 2048),
    linear.Tile(1, 4096, 4, 4096),
    linear.Tile(4, 2048, 8, 4096),
)


@dataclass(frozen=True)
class Linear:
    """A linear layer of the 8B model as a decode step calls it."""

    rows: int
    width: int
    norm: bool = False
    gated: bool = False
    residual: bool = False


LINEARS = {
    "qkv": Linear(6144, 4096, norm=True),
    "out": Linear(4096, 4096, residual=True),
    "gate-up": Linear(12288, 4096, norm=True, gated=True),
    "down": Linear(4096, 12288, residual=True),
    "lm-head": Linear(151936, 4096, norm=True),
}


@dataclass(frozen=True)
class Sizes:
    """What is measured: real sizes on a GPU, tiny ones in a rehearsal."""

    dtype: torch.dtype
    check_lengths: tuple[int, ...]
    long_check: int
    check_queries: int
    heads: int
    sweep_tokens: int
    decode_tokens: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    shrink_linear: int


REAL = Sizes(
    dtype=torch.bfloat16,
    check_lengths=(1, 31, 0, 3001),
    long_check=131079,
    check_queries=700,
    heads=HEADS,
    sweep_tokens=131072,
    decode_tokens=(32768, 65536, 131072, 262144, 393216, 524288, 786432),
    prefill_tokens=(16384, 65536),
    shrink_linear=1,
)
TINY = Sizes(
    dtype=torch.float32,
    check_lengths=(1, 0, 37),
    long_check=70,
    check_queries=20,
    heads=HEADS,
    sweep_tokens=40,
    decode_tokens=(40,),
    prefill_tokens=(40,),
    shrink_linear=512,
)


def sizes_of(device: torch.device) -> Sizes:
    """Real sizes on a GPU, tiny ones elsewhere."""
    return REAL if device.type == "cuda" else TINY


def tile_id(tile: Any) -> str:
    """A tile in a point's name."""
    return "-".join(str(v) for v in vars(tile).values())


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference; NaN stays NaN."""
    return float((out.double() - reference).norm() / reference.norm())


def make_random(*size: int, like: torch.dtype, device: torch.device) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(*size, device=device, dtype=like)


# --- correctness -----------------------------------------------------------------------------


def check_latent(kind: str, tile: latent.Tile, device: torch.device) -> float:
    """Worst error of absorbed decode over a ragged batch and one long sequence."""
    sizes, (width, value) = sizes_of(device), LATENT[kind]
    errors = []
    for lengths, parts in (
        (sizes.check_lengths, torch.float32),
        ((sizes.long_check,), sizes.dtype),
    ):
        q = 3 * make_random(len(lengths), HEADS, width, like=sizes.dtype, device=device)
        rows = make_random(len(lengths), max(lengths) + 5, width, like=sizes.dtype, device=device)
        lengths_B = torch.tensor(lengths, dtype=torch.int32, device=device)
        options: dict[str, Any] = {"scale": width**-0.5, "value_width": value}
        expected, _ = latent_naive.latent_decode(q.double(), rows.double(), lengths_B, **options)
        for index, length in enumerate(lengths):
            rows[index, length:] = float("nan")
        with poisoned():
            out, _ = latent.latent_decode(
                q,
                rows,
                lengths_B,
                n_splits=2 * multiprocessors(device) + 1,
                tile=tile,
                parts_dtype=parts,
                **options,
            )
        errors.append(relative_error(out, expected))
    return worst(errors)


def worst(errors: list[float]) -> float:
    """The largest error; NaN beats all."""
    return max(errors, key=lambda e: float("inf") if e != e else e)


def check_gqa(tile: gqa.Tile, device: torch.device) -> float:
    """Error of grouped-query decode over a ragged batch and one long sequence."""
    sizes = sizes_of(device)
    errors = []
    for lengths in (sizes.check_lengths, (sizes.long_check,)):
        shape = (len(lengths), KV_HEADS, max(lengths) + 5, HEAD_DIM)
        q = 3 * make_random(len(lengths), HEADS, HEAD_DIM, like=sizes.dtype, device=device)
        keys = make_random(*shape, like=sizes.dtype, device=device)
        values = make_random(*shape, like=sizes.dtype, device=device)
        lengths_B = torch.tensor(lengths, dtype=torch.int32, device=device)
        expected, _ = gqa_naive.gqa_decode(
            q.double(), keys.double(), values.double(), lengths_B, scale=HEAD_DIM**-0.5
        )
        with poisoned():
            out, _ = gqa.gqa_decode(
                q,
                keys,
                values,
                lengths_B,
                scale=HEAD_DIM**-0.5,
                n_splits=multiprocessors(device) // 2 + 1,
                tile=tile,
                parts_dtype=sizes.dtype,
            )
        errors.append(relative_error(out, expected))
    return worst(errors)


def check_prefill(width: int, tile: prefill.Tile, device: torch.device) -> float:
    """Error of causal attention at a chunk's end, and without a mask."""
    sizes = sizes_of(device)
    n_queries = sizes.check_queries
    n_keys = 2 * n_queries + 33
    kv_heads = KV_HEADS
    q = make_random(1, n_queries, HEADS, width, like=sizes.dtype, device=device)
    k = make_random(1, n_keys, kv_heads, width, like=sizes.dtype, device=device)
    v = make_random(1, n_keys, kv_heads, HEAD_DIM, like=sizes.dtype, device=device)
    errors = []
    for offset in (n_keys - n_queries, None):
        options: dict[str, Any] = {"scale": width**-0.5, "offset": offset}
        expected, _ = prefill_naive.latent_prefill(q.double(), k.double(), v.double(), **options)
        with poisoned():
            out, _ = prefill.latent_prefill(q, k, v, tile=tile, **options)
        errors.append(relative_error(out, expected))
    return worst(errors)


def check_cudnn(width: int, device: torch.device) -> float:
    """Error of the same attention by cuDNN, its log-sum-exp's too, as prefill calls it."""
    sizes, errors = sizes_of(device), []
    for heads, queries, offset in ((HEADS, sizes.check_queries, 0), (KV_HEADS, 1401, None)):
        q = make_random(1, queries, heads, width, like=sizes.dtype, device=device)
        k = make_random(1, sizes.check_queries, KV_HEADS, width, like=sizes.dtype, device=device)
        v = make_random(1, sizes.check_queries, KV_HEADS, 128, like=sizes.dtype, device=device)
        options: dict[str, Any] = {"scale": width**-0.5, "offset": offset}
        expected = prefill_naive.latent_prefill(q.double(), k.double(), v.double(), **options)
        if not cudnn.fits(q, k, v, offset):
            raise ValueError(f"cuDNN does not take {queries} queries of width {width}")
        for found, truth in zip(cudnn.latent_prefill(q, k, v, **options), expected, strict=True):
            errors.append(relative_error(found, truth))
    return worst(errors)


def linear_inputs(shape: str, device: torch.device) -> tuple[torch.Tensor, dict[str, Any]]:
    """An input, and what the layer needs besides its weights."""
    sizes, about = sizes_of(device), LINEARS[shape]
    rows, width = about.rows // sizes.shrink_linear, max(64, about.width // sizes.shrink_linear)
    draw = functools.partial(make_random, like=sizes.dtype, device=device)
    options: dict[str, Any] = {}
    if about.norm:
        options["norm_weight_K"] = draw(width)
    if about.residual:
        options["residual_BN"] = draw(1, rows)
    return draw(1, width), options


def linear_weights(shape: str, device: torch.device) -> torch.Tensor:
    """Weights [1 or 2, N, K]: the second are the factor of a gated layer."""
    sizes, about = sizes_of(device), LINEARS[shape]
    rows, width = about.rows // sizes.shrink_linear, max(64, about.width // sizes.shrink_linear)
    return make_random(1 + about.gated, rows, width, like=sizes.dtype, device=device)


def check_linear(shape: str, tile: linear.Tile, device: torch.device) -> float:
    """Error of one fused linear layer."""
    x, options = linear_inputs(shape, device)
    weights = linear_weights(shape, device)
    if LINEARS[shape].gated:
        options["factor_NK"] = weights[1]
    with poisoned():
        out = linear.decode_linear(x, weights[0], tile=tile, **options)
    wide = {name: tensor.double() for name, tensor in options.items()}
    expected = linear_naive.decode_linear(x.double(), weights[0].double(), **wide)
    return relative_error(out, expected)


def token_inputs(device: torch.device) -> tuple[torch.Tensor, token_naive.TokenMaps]:
    """Projections of a token, and the maps of a layer."""
    draw = functools.partial(make_random, like=sizes_of(device).dtype, device=device)
    kv = 2 * KV_HEADS * HEAD_DIM
    maps = token_naive.TokenMaps(
        q_norm_D=draw(HEAD_DIM),
        k_norm_D=draw(HEAD_DIM),
        eps=1e-6,
        row_WE=draw(1024, kv),
        bias_W=draw(1024),
        gain_2HF=draw(2, HEADS, HEAD_DIM // 2),
        k_up_KDR=draw(KV_HEADS, HEAD_DIM, 896),
        read_2SH=draw(2, 64, HEADS),
        frequency_S=torch.arange(64, device=device),
    )
    return draw(1, HEADS * HEAD_DIM + kv), maps


def check_token(device: torch.device) -> float:
    """Error of a token's row and of its queries."""
    qkv, maps = token_inputs(device)
    angle, slots = torch.randn(1, 64, device=device), torch.tensor([2], device=device)
    rows = torch.zeros(3, 1024, dtype=qkv.dtype, device=device)
    wide_rows = rows.double()
    with poisoned():
        q = token.latent_token(qkv, maps, angle.cos(), angle.sin(), slots, rows)
    wide = token_naive.widened(maps)
    cos, sin = angle.cos().double(), angle.sin().double()
    expected = token_naive.latent_token(qkv.double(), wide, cos, sin, slots, wide_rows)
    return worst([relative_error(q, expected), relative_error(rows, wide_rows)])


def check_append(device: torch.device) -> float:
    """Error of the latent append with norm and affine."""
    dtype = sizes_of(device).dtype
    x = make_random(9, 1024, like=dtype, device=device)
    norm = make_random(896, like=dtype, device=device)
    gain, bias = (make_random(2, 896, like=dtype, device=device) for _ in range(2))
    angle = torch.randn(9, 64, device=device)
    kinds = torch.arange(9, device=device, dtype=torch.int32) % 2
    slots = torch.arange(9, device=device).flip(0)
    rows = torch.full((9, 1024), float("nan"), dtype=dtype, device=device)
    with poisoned():
        append.latent_append(
            x, angle.cos(), angle.sin(), slots, rows,
            norm_weight_R=norm, gain_MR=gain, bias_MR=bias, modality_N=kinds,
        )  # fmt: skip
    expected = torch.zeros(9, 1024, dtype=torch.float64, device=device)
    append_naive.latent_append(
        x.double(), angle.cos().double(), angle.sin().double(), slots, expected,
        norm_weight_R=norm.double(), gain_MR=gain.double(), bias_MR=bias.double(),
        modality_N=kinds,
    )  # fmt: skip
    return relative_error(rows, expected)


def check_expand(device: torch.device) -> float:
    """Error of the expanded output."""
    dtype = sizes_of(device).dtype
    w_uv = make_random(KV_HEADS, 128, 896, like=dtype, device=device)
    o = make_random(2, HEADS, 896, like=dtype, device=device)
    with poisoned():
        output = expand.expand_output(o, w_uv)
    return relative_error(output, expand_naive.expand_output(o.double(), w_uv.double()))


def check_gqa_append(device: torch.device) -> float:
    """Error of the queries and caches after one append."""
    dtype = sizes_of(device).dtype
    qkv = make_random(2, (HEADS + 2 * KV_HEADS) * HEAD_DIM, like=dtype, device=device)
    q_norm, k_norm = (make_random(HEAD_DIM, like=dtype, device=device) for _ in range(2))
    angle = torch.randn(2, HEAD_DIM // 2, device=device)
    slots = torch.tensor([3, 0], device=device)
    keys, values = (
        torch.zeros(2, KV_HEADS, 5, HEAD_DIM, dtype=dtype, device=device) for _ in range(2)
    )
    wide_keys, wide_values = keys.double(), values.double()
    with poisoned():
        q = gqa_append.gqa_append(
            qkv, q_norm, k_norm, angle.cos(), angle.sin(), slots, keys, values
        )
    cos, sin = angle.cos().double(), angle.sin().double()
    expected = gqa_append_naive.gqa_append(
        qkv.double(), q_norm.double(), k_norm.double(), cos, sin, slots, wide_keys, wide_values
    )
    pairs = [(q, expected), (keys, wide_keys), (values, wide_values)]
    return worst([relative_error(out, reference) for out, reference in pairs])


def all_checks(device: torch.device) -> dict[str, Callable[[torch.device], float]]:
    """Every kernel and tile by name."""
    sizes = sizes_of(device)
    checks = row_forms.checks(LATENT, sizes.check_lengths, sizes.dtype)
    for kind, tiles in LATENT_TILES.items():
        for tile in tiles:
            if tile == latent.WARPGROUPS and device.type != "cuda":
                continue  # Gluon has no interpreter.
            checks[f"{kind}/{tile_id(tile)}"] = functools.partial(check_latent, kind, tile)
    for gqa_tile in GQA_TILES:
        checks[f"gqa/{tile_id(gqa_tile)}"] = functools.partial(check_gqa, gqa_tile)
    for width, prefill_tiles in PREFILL_TILES.items():
        for prefill_tile in prefill_tiles:
            name = f"prefill-{width}/{tile_id(prefill_tile)}"
            checks[name] = functools.partial(check_prefill, width, prefill_tile)
        if device.type == "cuda":
            checks[f"prefill-{width}/cudnn"] = functools.partial(check_cudnn, width)
    for shape in LINEARS:
        for linear_tile in LINEAR_TILES:
            name = f"linear-{shape}/{tile_id(linear_tile)}"
            checks[name] = functools.partial(check_linear, shape, linear_tile)
    return checks | {
        "token": check_token, "append": check_append, "expand": check_expand,
        "gqa-append": check_gqa_append,
    }  # fmt: skip


def run_check(name: str, device_name: str) -> dict[str, Any]:
    """Run one check in a worker process, which also leaves its cubin in triton's disk cache."""
    device = torch.device(device_name)
    torch.manual_seed(zlib.crc32(name.encode()))
    try:
        error = all_checks(device)[name](device)
    except Exception as problem:  # a compiler error is a red gate too, whatever its class
        return {"status": "failed", "error": f"{type(problem).__name__}: {problem}"[:400]}
    limit = TOLERANCE[sizes_of(device).dtype]
    return {"status": "ok" if error <= limit else "red", "relative_error": error, "limit": limit}


def gate(results: Results, device: torch.device) -> None:
    """Run every check that has no result yet, several processes at a time.

    A compiler that aborts and a kernel that faults take their process with them, and what was
    queued behind them; so what failed is tried once more, each check in a process of its own. Both
    times end with the checks' part of the budget.
    """

    def patience_s() -> float:
        if device.type != "cuda":
            return CHECK_S  # interpreted one after the other, and nothing worth timing follows
        return min(CHECK_S, max(0.0, results.left_s() - TIMED_SHARE * results.budget_s))

    checks: dict[str, Any] = results.data.setdefault("checks", {})
    names = [n for n in all_checks(device) if checks.get(n, {}).get("status") != "ok"]
    workers = WORKERS if device.type == "cuda" else 1
    for name, outcome in in_processes(names, device, workers, patience_s):
        checks[name] = outcome
        results.write()
        say(f"check {name}: {outcome['status']}")
    failed = [name for name in names if checks[name]["status"] == "failed"]
    with ThreadPoolExecutor(workers) as pool:
        again = failed if patience_s() else []
        alone = pool.map(lambda name: dict(in_processes([name], device, 1, patience_s)), again)
        for found in alone:
            checks.update(found)
    for name in names:
        if checks[name]["status"] != "ok":
            say(f"RED {name}: {checks[name]}")
    results.write()
    green = sum(c["status"] == "ok" for c in checks.values())
    say(f"correctness: {green} of {len(checks)} green")


def in_processes(
    names: Sequence[str], device: torch.device, workers: int, patience_s: Callable[[], float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of checks run by so many processes; how long one is waited for is asked each time."""
    spawned = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawned, initializer=end_with_parent) as pool:
        waiting = {name: pool.submit(run_check, name, str(device)) for name in names}
        for name, future in waiting.items():
            yield name, _outcome(future, pool, patience_s())


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, be it killed.

    A worker that outlived it would hold the card's memory, and run beside what is timed next.
    """
    parent = parent_process()
    assert parent is not None, "called in a process of a pool"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _outcome(
    future: Future[dict[str, Any]], pool: ProcessPoolExecutor, patience_s: float
) -> dict[str, Any]:
    try:
        return future.result(patience_s)
    except BrokenProcessPool:
        return {"status": "failed", "error": "its process died"}
    except TimeoutError:
        # A kernel that waits for ever; what was queued behind it is tried again alone.
        for process in pool._processes.values():
            process.kill()
        return {"status": "failed", "error": f"not done after {patience_s:.0f} s more"}


def is_green(results: Results, check: str) -> bool:
    """Whether a check passed; what did not pass is not timed."""
    return bool(results.data["checks"].get(check, {}).get("status") == "ok")


# --- speed -----------------------------------------------------------------------------------


def time_latent(
    kind: str, tile: latent.Tile, tokens: int, per_sm: float, parts: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Time absorbed decode (split and merge) of one sequence."""
    dtype, (width, value) = sizes_of(device).dtype, LATENT[kind]
    size = tokens * width * dtype.itemsize
    q = make_random(1, HEADS, width, like=dtype, device=device)
    lengths_B = torch.tensor([tokens], dtype=torch.int32, device=device)
    caches = [
        torch.empty(1, tokens, width, dtype=dtype, device=device).normal_()
        for _ in range(rotation(device, size))
    ]
    n_splits = max(1, int(multiprocessors(device) * per_sm))
    calls = [
        functools.partial(
            latent.latent_decode,
            q,
            rows,
            lengths_B,
            scale=width**-0.5,
            value_width=value,
            n_splits=n_splits,
            tile=tile,
            parts_dtype=parts,
        )
        for rows in caches
    ]
    timing = time_calls(calls, device)
    about = {"tokens": tokens, "n_splits": n_splits, "tile": tile_id(tile), "parts": str(parts)}
    return about | {"bytes": size, "bytes_per_s": size / timing.median_s} | timing_fields(timing)


def time_gqa(
    tile: gqa.Tile, tokens: int, per_sm: float, parts: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Time grouped-query decode (split and merge) of one sequence."""
    dtype = sizes_of(device).dtype
    size = 2 * tokens * KV_HEADS * HEAD_DIM * dtype.itemsize
    q = make_random(1, HEADS, HEAD_DIM, like=dtype, device=device)
    lengths_B = torch.tensor([tokens], dtype=torch.int32, device=device)
    caches = [
        torch.empty(2, 1, KV_HEADS, tokens, HEAD_DIM, dtype=dtype, device=device).normal_()
        for _ in range(rotation(device, size))
    ]
    n_splits = max(1, int(multiprocessors(device) * per_sm / KV_HEADS))
    calls = [
        functools.partial(
            gqa.gqa_decode,
            q,
            keys_values[0],
            keys_values[1],
            lengths_B,
            scale=HEAD_DIM**-0.5,
            n_splits=n_splits,
            tile=tile,
            parts_dtype=parts,
        )
        for keys_values in caches
    ]
    timing = time_calls(calls, device)
    about = {"tokens": tokens, "n_splits": n_splits, "tile": tile_id(tile), "parts": str(parts)}
    return about | {"bytes": size, "bytes_per_s": size / timing.median_s} | timing_fields(timing)


def fastest(results: Results, prefix: str) -> tuple[str, dict[str, Any]] | None:
    """The quickest measured point whose name starts with the prefix."""
    points = {
        key: point
        for key, point in results.data["points"].items()
        if key.startswith(prefix) and point["status"] == "ok"
    }
    if not points:
        return None
    key = min(points, key=lambda k: points[k]["median_s"])
    return key, points[key]


def report_share(results: Results, key: str, point: dict[str, Any] | None) -> None:
    """Say one decode point as microseconds and share of the copy bandwidth."""
    if point is None:
        say(f"{key}: not run, budget spent")
    elif point["status"] != "ok":
        say(f"{key}: {point['status']} {point.get('error', '')[:150]}")
    else:
        share = results.share(point, "bytes_per_s", "copy_bytes_per_s")
        say(f"{key}: {1e6 * point['median_s']:.1f} us, {share:.1%} of copy bandwidth")


def sweep_latent(results: Results, device: torch.device, kind: str) -> None:
    """Try tiles, split counts and partial dtypes at one length, then walk the lengths."""
    sizes = sizes_of(device)
    configurations: dict[str, tuple[latent.Tile, int, torch.dtype]] = {}
    for tile in LATENT_TILES[kind]:
        if not is_green(results, f"{kind}/{tile_id(tile)}"):
            continue
        for per_sm in (1,) if tile.num_warps == 8 else (2,):
            for parts in dict.fromkeys((sizes.dtype, torch.float32)):
                key = f"sweep/{kind}/{tile_id(tile)}/x{per_sm}/{str(parts)[6:]}"
                configurations[key] = (tile, per_sm, parts)
                measure = functools.partial(
                    time_latent, kind, tile, sizes.sweep_tokens, per_sm, parts, device
                )
                report_share(results, key, results.point(key, measure))
    best = fastest(results, f"sweep/{kind}/")
    if best is None:
        return
    tile, per_sm, parts = configurations[best[0]]
    for tokens in sizes.decode_tokens:
        key = f"decode/{kind}/{tokens}"
        measure = functools.partial(time_latent, kind, tile, tokens, per_sm, parts, device)
        report_share(results, key, results.point(key, measure))


def time_forms(results: Results, device: torch.device) -> None:
    """Time paged and fp8 rows of the released width at every length."""
    sizes, kind = sizes_of(device), "m2la-1024"
    for form in ("fp8", "paged", "paged-fp8"):
        if not is_green(results, f"rows-{form}/{kind}"):
            continue
        for tokens in sizes.decode_tokens:
            key = f"decode/{kind}-{form}/{tokens}"
            measure = functools.partial(
                row_forms.time_form, form, *LATENT[kind], tokens, sizes.dtype, device
            )
            report_share(results, key, results.point(key, measure))


def sweep_gqa(results: Results, device: torch.device) -> None:
    """Try tiles and split counts at one length, then walk the lengths."""
    sizes = sizes_of(device)
    configurations: dict[str, tuple[gqa.Tile, int]] = {}
    for tile in GQA_TILES:
        if not is_green(results, f"gqa/{tile_id(tile)}"):
            continue
        for per_sm in (1, 2, 3):
            key = f"sweep/gqa/{tile_id(tile)}/x{per_sm}"
            configurations[key] = (tile, per_sm)
            measure = functools.partial(
                time_gqa, tile, sizes.sweep_tokens, per_sm, sizes.dtype, device
            )
            report_share(results, key, results.point(key, measure))
    best = fastest(results, "sweep/gqa/")
    if best is None:
        return
    tile, per_sm = configurations[best[0]]
    for tokens in sizes.decode_tokens:
        key = f"decode/gqa/{tokens}"
        measure = functools.partial(time_gqa, tile, tokens, per_sm, sizes.dtype, device)
        report_share(results, key, results.point(key, measure))


def time_linear(shape: str, tile: linear.Tile | None, device: torch.device) -> dict[str, Any]:
    """Time one fused linear layer, or torch's plain one when no tile is given."""
    x, options = linear_inputs(shape, device)
    first = linear_weights(shape, device)
    size = first.nbytes
    weights = [first]
    if device.type == "cuda":
        weights += [torch.empty_like(first).normal_() for _ in range(rotation(device, size) - 1)]
    calls: list[Callable[[], Any]]
    if tile is None:
        calls = [functools.partial(torch.nn.functional.linear, x, w.flatten(0, 1)) for w in weights]
    else:
        calls = [
            functools.partial(
                linear.decode_linear,
                x,
                w[0],
                factor_NK=w[1] if LINEARS[shape].gated else None,
                tile=tile,
                **options,
            )
            for w in weights
        ]
    timing = time_calls(calls, device)
    return {"bytes": size, "bytes_per_s": size / timing.median_s} | timing_fields(timing)


def sweep_linear(results: Results, device: torch.device) -> None:
    """Time every linear shape with every tile, and torch beside them."""
    for shape in LINEARS:
        key = f"linear/{shape}/torch"
        report_share(
            results, key, results.point(key, functools.partial(time_linear, shape, None, device))
        )
        for tile in LINEAR_TILES:
            if is_green(results, f"linear-{shape}/{tile_id(tile)}"):
                key = f"linear/{shape}/{tile_id(tile)}"
                measure = functools.partial(time_linear, shape, tile, device)
                report_share(results, key, results.point(key, measure))


def prefill_inputs(width: int, tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of one causal square."""
    dtype, kv_heads = sizes_of(device).dtype, KV_HEADS
    return (
        make_random(1, tokens, HEADS, width, like=dtype, device=device),
        make_random(1, tokens, kv_heads, width, like=dtype, device=device),
        make_random(1, tokens, kv_heads, HEAD_DIM, like=dtype, device=device),
    )


def flops_of(width: int, tokens: int) -> float:
    """Useful FLOPs of a causal square: half of all scores, both products."""
    return HEADS * (width + HEAD_DIM) * tokens * (tokens + 1)


def time_prefill(
    width: int, tile: prefill.Tile, tokens: int, device: torch.device
) -> dict[str, Any]:
    """Time our flash attention on a causal square."""
    q, k, v = prefill_inputs(width, tokens, device)
    call = functools.partial(
        prefill.latent_prefill, q, k, v, scale=width**-0.5, offset=0, tile=tile
    )
    timing = time_calls([call], device, repeats=8)
    return {"flop_per_s": flops_of(width, tokens) / timing.median_s} | timing_fields(timing)


def time_cudnn(width: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Time cuDNN on the same square."""
    q, k, v = prefill_inputs(width, tokens, device)
    call = functools.partial(cudnn.latent_prefill, q, k, v, scale=width**-0.5, offset=0)
    timing = time_calls([call], device, repeats=8)
    return {"flop_per_s": flops_of(width, tokens) / timing.median_s} | timing_fields(timing)


def report_rate(results: Results, key: str, point: dict[str, Any] | None) -> None:
    """Say one prefill point as TFLOP/s and share of the matrix rate."""
    if point is None:
        say(f"{key}: not run, budget spent")
    elif point["status"] != "ok":
        say(f"{key}: {point['status']} {point.get('error', '')[:150]}")
    else:
        share = results.share(point, "flop_per_s", "matmul_flop_per_s")
        say(f"{key}: {point['flop_per_s'] / 1e12:.0f} TFLOP/s, {share:.1%} of the matrix rate")


def sweep_prefill(results: Results, device: torch.device, width: int, tokens: int) -> None:
    """Time our flash attention with every tile at one length, cuDNN beside it."""
    measures: dict[str, Callable[[], dict[str, Any]]] = {}
    for tile in PREFILL_TILES[width]:
        if is_green(results, f"prefill-{width}/{tile_id(tile)}"):
            measures[tile_id(tile)] = functools.partial(time_prefill, width, tile, tokens, device)
    if is_green(results, f"prefill-{width}/cudnn"):
        measures["cudnn"] = functools.partial(time_cudnn, width, tokens, device)
    for name, measure in measures.items():
        key = f"prefill/{width}/{tokens}/{name}"
        report_rate(results, key, results.point(key, measure))


def time_small(results: Results, device: torch.device) -> None:
    """Time the small kernels of a decode step, each alone in a graph of many."""
    dtype = sizes_of(device).dtype
    cos = torch.ones(1, 64, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    rows = torch.zeros(8, 1024, dtype=dtype, device=device)
    o = make_random(1, HEADS, 896, like=dtype, device=device)
    count = 40 if device.type == "cuda" else 1
    qkv, _ = token_inputs(device)
    maps = [token_inputs(device)[1] for _ in range(count)]
    ups = [make_random(HEADS, 128, 896, like=dtype, device=device) for _ in range(count)]
    lse = torch.randn(1, 132, HEADS, device=device)
    parts = [make_random(1, 132, 896, HEADS, like=dtype, device=device) for _ in range(count)]
    merge = functools.partial(lse_merge, log2_lse_BSH=lse, out_dtype=dtype)
    groups: dict[str, list[Callable[[], Any]]] = {
        "small/token": [
            functools.partial(token.latent_token, qkv, m, cos, cos, slots, rows) for m in maps
        ],
        "small/merge": [functools.partial(merge, p) for p in parts],
        "small/expand": [functools.partial(expand.expand_output, o, w) for w in ups],
        "small/expand-bmm": [functools.partial(torch.einsum, "bhr,hvr->bhv", o, w) for w in ups],
    }
    for key, calls in groups.items():
        point = results.point(key, lambda calls=calls: timing_fields(time_calls(calls, device)))  # type: ignore[misc]
        if point and point["status"] == "ok":
            say(f"{key}: {1e6 * point['median_s']:.1f} us")


def main() -> None:
    """Check, then measure; what is amiss with the file or the card is said in words."""
    with in_words(ResultsError):
        _main()


def _main() -> None:
    """Check, then measure in order of worth until the budget is spent."""
    parser = script_parser(__doc__, 150.0)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse (%(default)s)")
    arguments = parser.parse_args()
    device = device_given(arguments.device)
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit(
            "a rehearsal interprets the kernels, minutes for what a GPU does in seconds: set "
            "TRITON_INTERPRET=1 before this command."
        )
    results = Results(arguments.out, device, arguments.budget_s)
    say(f"device: {results.data['device']['name']}, torch {torch.__version__}")
    gate(results, device)
    ceilings = results.ceilings(device)
    say(
        f"ceilings: copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"matmul {ceilings['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s"
    )
    sweep_latent(results, device, "m2la-1024")
    sweep_gqa(results, device)
    time_small(results, device)
    sweep_linear(results, device)
    time_forms(results, device)
    for tokens in sizes_of(device).prefill_tokens:
        for width in PREFILL_TILES:
            sweep_prefill(results, device, width, tokens)
    sweep_latent(results, device, "m2la-512")
    sweep_latent(results, device, "m2la-576")
    results.close()
    say(f"wrote {arguments.out}, {results.left_s():.0f} s of the budget left")
    if not all(is_green(results, name) for name in all_checks(device)):
        raise SystemExit("a kernel is not near enough to float64, see RED above; it was not timed.")


if __name__ == "__main__":
    main()
