"""What a point needs of a device's memory, worked out before it runs.

An upper estimate from the shape alone; nothing is allocated. What a point really took is measured
and stands beside it: the bytes allocated for the points recorded on an H200 were 98 to 100 % of it,
the runtime's own left out.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from internvideo3.harness.profile.subjects import class_of, config_of, form_of
from internvideo3.harness.profile.workload import Point, Workload, WorkloadError, why_not
from internvideo3.model.cache import COMPRESSED_TOKENS
from internvideo3.model.checkpoint import ITEM_BYTES, cache_bytes_per_token
from internvideo3.model.config import InternVideo3Config
from internvideo3.model.segments import BLOCK
from internvideo3.model.session import CHUNK

DEVICES: Mapping[str, int] = {
    # What torch reports as total, which is less than nvidia-smi's memory.total (81559 and 143771
    # MiB): measured of the H200, as much less of the H100.
    "h100": 81559 * 2**20 - 644 * 10**6,
    "h200": 150_109_880_320,
}
RUNTIME_BYTES = 3 << 29
"""CUDA context, kernels' code, and libraries' workspaces."""
USABLE = 0.985
"""Share of a device's memory that the allocator gets before fragments stop it."""
ROUNDED = 64
FLOAT32_COPIES = 3
"""Of rows that are compressed: themselves, their sizes, what they are divided to."""
STEP_BYTES = 1 << 28
"""What a captured step keeps for itself; 0.12 and 0.16 GB of the 8B shape on an H200."""
MOST_SEQUENCES = 1 << 20
LEAST_BYTES, MOST_BYTES = 10**6, 10**15
PIECES, NEW_TOKENS = (32, 64, 1037), 8
"""Tokens that a gate prefills, piece by piece, and that it decodes. Kernels deal the rows of the
last piece out to several programs, as they do those of the contexts that are timed."""
GATE_BYTES = 1 << 30
"""What any gate may take beside the weights; in float32 a part of the model takes more."""
MOST_GATED = 32
"""Sequences that a gate takes together; each of them is passed through the model by itself."""


@dataclass(frozen=True)
class Need:
    """Bytes that a point needs, by what for."""

    weights: int
    cache: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it, the runtime included."""
        return self.weights + self.cache + self.scratch + RUNTIME_BYTES

    def fits(self, memory: int) -> bool:
        """Whether a device of this memory can give so much."""
        return self.total <= int(USABLE * memory)


def device_bytes(given: str) -> int:
    """Memory of a device by name (`h200`) or size (`80GB`, `141e9`, `79GiB`).

    Raises:
        WorkloadError: it is neither.
    """
    if given.lower() in DEVICES:
        return DEVICES[given.lower()]
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d{1,2})?)\s*(gib|gb|)", given.strip().lower())
    size = float(found[1]) * {"gb": 1e9, "gib": 2**30, "": 1}[found[2]] if found else 0.0
    if not LEAST_BYTES <= size <= MOST_BYTES:
        raise WorkloadError(
            f"device memory {given!r} is neither one of {', '.join(DEVICES)} nor a size like 80GB."
        )
    return int(size)


def weights_of(config: Any, dtype: str) -> int:
    """Bytes of a model's weights, and of those that the engine keeps beside them."""
    with torch.device("meta"):
        model = class_of(config)(config)
    parameters: dict[int, int] = {id(p): p.numel() for p in model.parameters()}
    return sum(parameters.values()) * ITEM_BYTES[dtype] + folded_bytes(config, dtype)


def folded_bytes(config: Any, dtype: str) -> int:
    """Bytes of the multiplied-out weights of all layers (`model.folding`)."""
    text: Any = config.text_config
    if not isinstance(config, InternVideo3Config) or text.row_form != "latent":
        return 0
    heads, kv, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    maps = 2 if text.modality_adapters else 1
    numbers: int = sum(
        text.row_width(i) * (maps * 2 * kv * width + heads * width)
        for i in range(text.num_hidden_layers)
    )
    return numbers * ITEM_BYTES[dtype]


def need_of(point: Point, config: Any, weights: int, step: int = STEP_BYTES) -> Need:
    """What a point needs.

    Args:
        point: it.
        config: of its model.
        weights: bytes of the weights (`weights_of`).
        step: bytes that a decode step keeps for itself.
    """
    # In fp8 is only what was there before the prefill; what is prefilled is so when all of it is
    # there, and the reply is cached in full.
    compressed = _synthetic(point) if point.cache == "fp8" else 0
    in_full = point.depth - compressed + point.new_tokens + 1
    cached = -(-in_full // ROUNDED) * ROUNDED * cache_bytes_per_token(config, point.dtype)
    if compressed:
        cached += compressed * fp8_bytes(config, point.dtype)
    working = max(step, _scratch(point, config)) + _masks_and_copies(point, config)
    scratch = max(working, _compressing(point, config), _filling(point, config))
    return Need(weights, point.batch * cached, scratch)


def _synthetic(point: Point) -> int:
    """Tokens of a sequence that are cached as random numbers."""
    return point.depth - point.prefilled(point.chunk or CHUNK["cuda"])


def _compressing(point: Point, config: Any) -> int:
    """What a cache holds beside itself while a layer of it is compressed.

    Float32 copies of a stretch of rows; and that layer's rows in both forms: of a synthetic cache
    those in full come on top, of what was prefilled those in fp8, which are smaller.
    """
    if point.cache != "fp8":
        return 0
    text: Any = config.text_config
    width = max(text.row_width(i) for i in range(text.num_hidden_layers))
    synthetic = _synthetic(point)
    most = max(synthetic, point.depth - synthetic)
    stretch = min(COMPRESSED_TOKENS, most) * FLOAT32_COPIES * 4
    return int(point.batch * width * (most * ITEM_BYTES[point.dtype] + stretch))


def _filling(point: Point, config: Any) -> int:
    """One layer's random keys and values, which transformers' caches copy."""
    if point.runner == "engine" or not _synthetic(point):
        return 0
    text = config.text_config
    row = 2 * text.num_key_value_heads * text.head_dim * ITEM_BYTES[point.dtype]
    return int(point.batch * point.depth * row)


def fp8_bytes(config: Any, dtype: str) -> int:
    """Cache bytes of a token whose latent is in fp8, with a float32 scale; the rotary key stays.

    Raises:
        WorkloadError: the model caches keys and values.
    """
    if not isinstance(config, InternVideo3Config):
        raise WorkloadError("only a latent cache has an fp8 form; this model is GQA.")
    text: Any = config.text_config
    layers = range(text.num_hidden_layers)
    return sum(text.rank(i) + 4 + 2 * text.slots(i) * ITEM_BYTES[dtype] for i in layers)


def _scratch(point: Point, config: Any) -> int:
    """What a chunk's prefill, or a step, holds at its fullest moment: in the MLP or attention."""
    text = config.text_config
    heads, kv, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    at_once = min(point.chunk or CHUNK["cuda"], point.context)
    chunk = point.batch * (1 if point.fill == "random" else at_once)
    block = 0 if point.fill == "random" else point.batch * min(BLOCK, point.context)
    latent = isinstance(config, InternVideo3Config)
    key = width + (2 * max(text.slots(i) for i in range(text.num_hidden_layers)) if latent else 0)
    # Gate, its activation, up and their product: torch frees the first when the last is there.
    mlp = 4 * text.intermediate_size
    # Queries, two outputs that are merged, and their sum.
    attention = heads * (key + 3 * width)
    # Hidden states: the layer's input, its norm, the sum.
    per_query = 3 * text.hidden_size + max(mlp, attention)
    rebuilt = 2 * kv * (key + width) if latent else 0
    numbers: int = chunk * per_query + block * rebuilt + point.batch * text.vocab_size
    return numbers * ITEM_BYTES[point.dtype]


def _masks_and_copies(point: Point, config: Any) -> int:
    """What transformers' sdpa holds beside the cache where it attends under a mask.

    That is on a static cache, and from a prefill's second chunk on: the mask, also in the number
    format that the kernel wants, and one layer's keys and values repeated for every query head.
    """
    chunk = point.chunk or CHUNK["cuda"]
    several = point.prefilled(chunk) and point.depth > chunk
    if point.runner != "static" and not (point.runner == "sdpa" and several):
        return 0
    text, item = config.text_config, ITEM_BYTES[point.dtype]
    queries = min(chunk, point.context) if point.prefilled(chunk) else 1
    cached = point.depth + point.new_tokens + 1
    repeated = 2 * text.num_attention_heads * text.head_dim * item
    return int(point.batch * cached * (queries * (1 + item) + repeated))


def refusal(point: Point, need: Need, memory: int) -> str | None:
    """Why a point cannot run on a device of this memory; None if it can."""
    if need.fits(memory):
        return None
    return (
        f"needs {size_told(need.total)} (weights {size_told(need.weights)}, cache "
        f"{size_told(need.cache)}, scratch {size_told(need.scratch)}), the device has "
        f"{size_told(int(USABLE * memory))} to give. Take a shorter context, a smaller batch or "
        "chunk."
    )


def size_told(size: float) -> str:
    """Bytes in the largest unit of which there is at least one; of 1000, not 1024."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((one for one in units if size >= one[0]), (1.0, "bytes"))
    return f"{size / unit:.0f} {name}" if unit == 1 else f"{size / unit:.1f} {name}"


def gate_batch(point: Point, config: Any) -> int:
    """How many of a point's sequences its gate takes together.

    As many as there are, if that takes no more memory than the point itself, or than every gate
    may; and no more than are needed to see them cross.
    """
    most = min(point.batch, MOST_GATED)
    own = _without_weights(point, config)
    gated = replace(
        point, context=sum(PIECES), chunk=max(PIECES), fill="prefill", integrate=0,
        new_tokens=NEW_TOKENS,
    )  # fmt: skip

    def is_too_much(batch: int) -> bool:
        return _without_weights(replace(gated, batch=batch), config) > max(own, GATE_BYTES)

    fitting = bisect.bisect_left(range(1, most + 1), True, key=is_too_much)
    return max(fitting, min(point.batch, 2))


def _without_weights(point: Point, config: Any) -> int:
    need = need_of(point, config, 0)
    return need.cache + need.scratch


@dataclass(frozen=True)
class Planned:
    """A point, what it needs, and whether that is there."""

    point: Point
    need: Need
    refused: str | None
    """Why it cannot run on the device."""
    largest_batch: int
    """0 if not even one sequence fits."""
    impossible: str | None = None
    """Why it can run on none."""


def plan(workload: Workload, memory: int) -> list[Planned]:
    """What every point of a workload needs of a device.

    Raises:
        WorkloadError: a model that there is not.
        CheckpointError: the same, of a checkpoint.
    """
    configs = {name: config_of(name) for name in workload.models}
    found = []
    weights: dict[tuple[str, str], int] = {}
    for point in workload.points():
        config, kind = configs[point.model], (point.model, point.dtype)
        impossible = why_not(point, form_of(config))
        if impossible is not None:
            found.append(Planned(point, Need(0, 0, 0), None, 0, impossible))
            continue
        if kind not in weights:
            weights[kind] = weights_of(config, point.dtype)
        need = need_of(point, config, weights[kind])
        largest = _largest_batch(point, config, weights[kind], memory)
        found.append(Planned(point, need, refusal(point, need, memory), largest))
    return found


def _largest_batch(point: Point, config: Any, weights: int, memory: int) -> int:
    """Most sequences of this point's lengths that fit a device together; 0 if not even one."""

    def is_too_large(batch: int) -> bool:
        one = replace(point, batch=batch)
        return refusal(one, need_of(one, config, weights), memory) is not None

    return bisect.bisect_left(range(1, MOST_SEQUENCES), True, key=is_too_large)


def table(planned: Sequence[Planned], device: str) -> list[str]:
    """The plan in lines, gigabytes of 1e9 bytes."""
    memory = device_bytes(device)
    width = max((len(one.point.key) for one in planned), default=0)
    lines = [
        f"{device}: {memory / 1e9:.1f} GB, {USABLE * memory / 1e9:.1f} GB of it usable. In GB:",
        f"{'point':<{width}} weights   cache scratch   total headroom  largest batch",
    ]
    for one in planned:
        if one.impossible is not None:
            lines.append(f"{one.point.key:<{width}} not possible: {one.impossible}")
            continue
        need, left = one.need, USABLE * memory - one.need.total
        lines.append(
            f"{one.point.key:<{width}} {need.weights / 1e9:>7.1f} {need.cache / 1e9:>7.1f} "
            f"{need.scratch / 1e9:>7.1f} {need.total / 1e9:>7.1f} {left / 1e9:>8.1f}  "
            f"{one.largest_batch}" + ("" if one.refused is None else ": does not fit")
        )
    return lines
