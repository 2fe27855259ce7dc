"""Measuring one point: time to first token, rates, memory, energy, share of the roofline.

Axes: B sequences.
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from internvideo3.harness.gpu.measure import card_of
from internvideo3.harness.profile.depth import Depth, DepthError, check_depth
from internvideo3.harness.profile.plan import fp8_bytes
from internvideo3.harness.profile.runners import (
    Clock,
    EngineRunner,
    Runner,
    make_runner,
    random_ids,
)
from internvideo3.harness.profile.subjects import Subject
from internvideo3.harness.profile.workload import Point
from internvideo3.model.cache import SegmentedCache
from internvideo3.model.config import InternVideo3Config
from internvideo3.model.engine import Engine
from internvideo3.model.session import CHUNK

Row = dict[str, Any]
MEMORY_NAMES = ("peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes")
ENERGY_WINDOW_S = 1.0
"""The card counts energy some ten times a second: of shorter runs the edges weigh too much."""
ENERGY_IN_ALL_S = 2.0
"""Of all runs of a point together."""
WARM_CHUNKS = 2
"""Of a prefill that warms up: the second one sees a past, as all later ones do."""


@dataclass(frozen=True)
class Ceilings:
    """What the device can do, measured in the same run."""

    copy_bytes_per_s: float
    matmul_flop_per_s: float


@dataclass(frozen=True)
class Run:
    """One run of a point."""

    prefill_s: float | None
    """Until the first token is chosen; None where the cache was filled with random numbers."""
    prefilled: int
    """Tokens of each sequence that this took."""
    steps_s: tuple[float, ...]
    """Of each decode step."""
    cache_bytes: int
    step_bytes: int
    """Bytes of weights that a step reads."""
    energy_j: float | None
    """Of the decode; None where the device does not count it."""
    memory: Row
    energy_s: float = 0.0
    """Seconds in which that energy was used."""
    depth: Depth | None = None
    """What a step was found to be worth at this depth; None where that was not looked at."""


def run_once(subject: Subject, point: Point, *, first: bool = True) -> Run:
    """Run a point once.

    Args:
        subject: the model.
        point: it.
        first: whether this is its first run, in which the engine's step is checked at the point's
            depth.

    Raises:
        MissingPackageError: the runner's package is not installed.
        DepthError: the engine's step is not right there.
        torch.OutOfMemoryError: the device is too small.
    """
    # The allocator keeps the cache that an earlier run had: this one needs the same, and the
    # driver's handing it out would be timed. (A capture gives all that is free back.)
    gc.collect()
    device = subject.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    runner = make_runner(
        subject, point.runner, batch=point.batch, chunk=point.chunk, cache=point.cache
    )
    look = Look(device, asks=first)
    if isinstance(runner, EngineRunner):
        runner.before_timing = look
    prefill_s, prefilled = None, point.prefilled(runner.chunk)
    if prefilled < point.depth:
        logits_BY = runner.fill(point.depth - prefilled, point.new_tokens + prefilled)
    if prefilled:
        ids_BT = random_ids(subject, point.batch, prefilled)
        _wait(device)
        started = time.perf_counter()
        logits_BY = runner.prefill(ids_BT, point.new_tokens)
        logits_BY.argmax(-1)
        _wait(device)
        prefill_s = time.perf_counter() - started
    found = _decoded(runner, point, logits_BY)
    return replace(
        found,
        prefill_s=prefill_s,
        prefilled=prefilled,
        depth=look.found,
        memory=_largest(look.memory, found.memory),
    )


def warm_up(subject: Subject, point: Point) -> int:
    """Prefill the first chunks of a point, untimed; returns how many tokens of a sequence.

    Kernels are compiled, and memory of the whole point's size is taken from the driver.
    """
    runner = make_runner(
        subject, point.runner, batch=point.batch, chunk=point.chunk, cache=point.cache
    )
    prefilled = point.prefilled(runner.chunk)
    tokens = min(prefilled, WARM_CHUNKS * runner.chunk)
    if tokens:
        # A last chunk has a past, and its kernels that of the past.
        past = min(point.depth - prefilled, runner.chunk)
        # Of a cache in fp8 only what is prefilled is there in full.
        left = (prefilled if point.cache == "fp8" else point.depth - past) + point.new_tokens
        if past:
            runner.fill(past, left)
        ids_BT = random_ids(subject, point.batch, tokens)
        runner.prefill(ids_BT, left - tokens)
        _wait(subject.model.device)
    return tokens


@dataclass
class Look:
    """Checks an engine's step before it is timed; what that takes is not the point's."""

    device: torch.device
    asks: bool
    found: Depth | None = None
    memory: Row = field(default_factory=dict)
    """Peaks until then."""

    def __call__(self, engine: Engine, cache: SegmentedCache) -> None:
        """Look.

        Raises:
            DepthError: the step is not right.
        """
        if not self.asks:
            return
        self.memory = memory_of(self.device)
        self.found = check_depth(engine, cache)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if not self.found.is_green:
            raise DepthError(str(self.found))


def _largest(before: Row, after: Row) -> Row:
    """Peaks of both times; what is used of the device is no peak."""
    return after | {
        name: max(before[name], after[name])
        for name in MEMORY_NAMES[:2]
        if before.get(name) is not None
    }


def _decoded(runner: Runner, point: Point, logits_BY: torch.Tensor) -> Run:
    clock = Clock(runner.device, lambda: energy_j(runner.device))
    runner.decode(logits_BY, point.new_tokens, clock)
    spent, window_s = clock.counted_in_all()
    memory = memory_of(runner.device)
    return Run(
        None,
        0,
        tuple(clock.seconds()),
        runner.cache_bytes(),
        runner.step_bytes(),
        spent,
        memory,
        window_s,
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def energy_j(device: torch.device) -> float | None:
    """Joules that the card has used since its driver was loaded; None without such a counter."""
    counted = _nvml(device, "nvmlDeviceGetTotalEnergyConsumption")
    return None if counted is None else counted / 1e3


def power_w(device: torch.device) -> float | None:
    """Watts that the card draws now; None without such a counter."""
    drawn = _nvml(device, "nvmlDeviceGetPowerUsage")
    return None if drawn is None else drawn / 1e3


def memory_of(device: torch.device) -> Row:
    """Peak bytes: of the allocator's tensors, of what it reserved, and in use on the device.

    On a CPU there is one figure, the process's largest resident size.
    """
    if device.type != "cuda":
        factor = 1 if sys.platform == "darwin" else 1024
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * factor
        return dict.fromkeys(MEMORY_NAMES) | {"peak_resident_bytes": resident}
    used = _nvml(device, "nvmlDeviceGetMemoryInfo")
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return dict(zip(MEMORY_NAMES, (*peaks, getattr(used, "used", None)), strict=True))


def _nvml(device: torch.device, question: str) -> Any:
    """What the driver answers about the card; None without a card or the driver's library."""
    if device.type != "cuda":
        return None
    with suppress(ImportError):
        import pynvml

        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            return getattr(pynvml, question)(_nvml_handle(pynvml, device))
    return None


def _nvml_handle(nvml: Any, device: torch.device) -> Any:
    """The card to the driver, which numbers cards otherwise than torch may."""
    if nvml.nvmlDeviceGetCount() == 1:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    return nvml.nvmlDeviceGetHandleByUUID(card_of(device))


def rows_of(subject: Subject, point: Point, runs: Sequence[Run], ceilings: Ceilings) -> list[Row]:
    """The rows of a point: prefill (if timed), decode, cache."""
    last = runs[-1]
    rows: list[Row] = []
    prefill = [run.prefill_s for run in runs if run.prefill_s is not None]
    if prefill:
        tokens = point.batch * last.prefilled
        before = point.context - last.prefilled
        flops = prefill_flops(subject, point, before)
        median = statistics.median(prefill)
        share = flops / median / ceilings.matmul_flop_per_s
        rows.append(
            {
                "kind": "last_chunk" if before else "prefill",
                **spread(prefill, tokens),
                "flops": flops,
                "flop_share": share,
            }
        )
    steps = [step for run in runs for step in run.steps_s]
    rates = [sum(run.steps_s) for run in runs]
    # Decoding step i reads the weights and i tokens more than the context.
    own = point.batch * (point.new_tokens + 1) / 2 * subject.bytes_per_token
    cached = own + point.batch * point.depth * _bytes_per_token(subject, point)
    moved = last.step_bytes + cached
    decode: Row = {
        "kind": "decode",
        **spread(rates, point.batch * point.new_tokens),
        "step_median_s": statistics.median(steps),
        "step_p90_s": _quantile(steps, 0.9),
        "weight_bytes": last.step_bytes,
        "moved_bytes_per_step": moved,
        "roofline_share": moved / statistics.median(steps) / ceilings.copy_bytes_per_s,
    }
    decode |= _energy(runs, point.batch * point.new_tokens)
    if point.integrate:
        # Of all steps, slow ones too: a reply has its share of them.
        decode["integrated"] = {
            "tokens": point.integrate,
            "seconds": point.integrate * decode["median_s"] / point.new_tokens,
            "note": "a reply's length times the seconds of a token in its middle, not measured as "
            "a whole",
        }
    rows.append(decode)
    nothing = {"median_s": None, "iqr_s": None, "tokens_per_s": None}
    cache = {"cache_bytes_per_token": _bytes_per_token(subject, point)} | last.memory
    rows.append({"kind": "cache", **nothing, **cache})
    looked = next((run.depth for run in runs if run.depth is not None), None)
    common = {
        "cache_bytes": last.cache_bytes,
        "depth_error": looked and looked.error,
        "depth_tokens": looked and looked.tokens,
    }
    return [row | common for row in rows]


def _energy(runs: Sequence[Run], tokens: int) -> Row:
    """Joules of a token over the runs that took long enough to tell; and how long all took."""
    told = [run for run in runs if run.energy_j is not None and run.energy_s >= ENERGY_WINDOW_S]
    joules = sum(run.energy_j for run in told if run.energy_j is not None)
    enough = sum(run.energy_s for run in told) >= ENERGY_IN_ALL_S
    return {
        "energy_j_per_token": joules / tokens / len(told) if enough else None,
        "energy_window_s": sum(run.energy_s for run in runs),
    }


def _bytes_per_token(subject: Subject, point: Point) -> int:
    """Cache bytes of a token of the context."""
    if point.cache == "fp8":
        return fp8_bytes(subject.model.config, point.dtype)
    return subject.bytes_per_token


def spread(seconds: Sequence[float], tokens: int) -> Row:
    """Median, interquartile range and rate of runs that took so many tokens each."""
    low, high = _quantile(seconds, 0.25), _quantile(seconds, 0.75)
    median = statistics.median(seconds)
    return {
        "median_s": median,
        "iqr_s": high - low,
        "tokens_per_s": tokens / median,
        "runs_s": list(seconds),
    }


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def prefill_flops(subject: Subject, point: Point, before: int = 0) -> float:
    """Multiplications and additions that a prefill needs, each counted as one operation.

    Of the tokens after so many that were there before.

    Linear layers on every token, causal attention (half the square), and for M²LA the keys and
    values rebuilt for every chunk.
    """
    text, tokens = subject.model.config.text_config, point.context
    heads, kv, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    layers = subject.model.model.language_model.layers
    linear = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
    chunk = point.chunk or CHUNK.get(subject.model.device.type, CHUNK["cpu"])
    rebuilt_tokens = sum(min(tokens, start + chunk) for start in range(before, tokens, chunk))
    attention = rebuild = 0.0
    for index in range(text.num_hidden_layers):
        key = width
        if isinstance(subject.model.config, InternVideo3Config):
            key += 2 * text.slots(index)
            up = 2 * kv * width * text.rank(index)
            linear -= up
            rebuild += 2.0 * up * rebuilt_tokens
        attention += heads * (key + width) * (tokens**2 - before**2)
    head = 2.0 * subject.model.lm_head.weight.numel()
    operations: float = 2.0 * linear * (tokens - before) + attention + rebuild + head
    return point.batch * operations
