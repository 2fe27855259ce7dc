"""What a point needs of a device's memory, worked out before it runs.

An upper estimate from the shape alone; nothing is allocated. What a point really took is measured
and stands beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from internvideo3.harness.profile.subjects import class_of, config_of
from internvideo3.harness.profile.workload import Point, Workload, WorkloadError
from internvideo3.model.checkpoint import ITEM_BYTES, cache_bytes_per_token
from internvideo3.model.config import InternVideo3Config
from internvideo3.model.segments import BLOCK
from internvideo3.model.session import CHUNK

DEVICES: Mapping[str, int] = {
    # nvidia-smi's memory.total, in bytes.
    "h100": 81559 * 2**20,
    "h200": 143771 * 2**20,
}
RUNTIME_BYTES = 3 << 29
"""CUDA context, kernels' code, and libraries' workspaces."""
USABLE = 0.985
"""Share of a device's memory that the allocator gets before fragments stop it."""
ROUNDED = 64


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


def device_bytes(given: str) -> int:
    """Memory of a device by name (`h200`) or size (`80GB`, `141e9`, `79GiB`).

    Raises:
        WorkloadError: it is neither.
    """
    if given.lower() in DEVICES:
        return DEVICES[given.lower()]
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*(gib|gb|)", given.strip().lower())
    if found is None:
        raise WorkloadError(
            f"device memory {given!r} is neither one of {', '.join(DEVICES)} nor a size like 80GB."
        )
    return int(float(found[1]) * {"gb": 1e9, "gib": 2**30, "": 1}[found[2]])


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


def need_of(point: Point, config: Any, weights: int) -> Need:
    """What a point needs.

    Args:
        point: it.
        config: of its model.
        weights: bytes of the weights (`weights_of`).
    """
    tokens = point.depth + point.new_tokens + 1
    tokens = -(-tokens // ROUNDED) * ROUNDED
    bytes_of = fp8_bytes if point.cache == "fp8" else cache_bytes_per_token
    per_token = bytes_of(config, point.dtype)
    return Need(weights, point.batch * tokens * per_token, _scratch(point, config))


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
    """What a chunk's prefill holds at its fullest moment: in the MLP, or in attention."""
    text = config.text_config
    heads, kv, width = text.num_attention_heads, text.num_key_value_heads, text.head_dim
    chunk = point.batch * min(point.chunk or CHUNK["cuda"], point.context)
    block = point.batch * min(BLOCK, point.context)
    latent = isinstance(config, InternVideo3Config)
    key = width + (2 * max(text.slots(i) for i in range(text.num_hidden_layers)) if latent else 0)
    mlp = 3 * text.intermediate_size
    # Queries, two outputs that are merged, and their sum.
    attention = heads * (key + 3 * width)
    # Hidden states: the layer's input, its norm, the sum.
    per_query = 3 * text.hidden_size + max(mlp, attention)
    rebuilt = 2 * kv * (key + width) if latent else 0
    numbers: int = chunk * per_query + block * rebuilt + point.batch * text.vocab_size
    return numbers * ITEM_BYTES[point.dtype]


def refusal(point: Point, need: Need, memory: int) -> str | None:
    """Why a point cannot run on a device of this memory; None if it can."""
    usable = int(USABLE * memory)
    if need.total <= usable:
        return None
    return (
        f"needs {need.total / 1e9:.1f} GB (weights {need.weights / 1e9:.1f}, cache "
        f"{need.cache / 1e9:.1f}, scratch {need.scratch / 1e9:.1f}), the device has "
        f"{usable / 1e9:.1f} GB to give. Take a shorter context, a smaller batch or chunk."
    )


@dataclass(frozen=True)
class Planned:
    """A point, what it needs, and whether that is there."""

    point: Point
    need: Need
    refused: str | None
    largest_batch: int
    """0 if not even one sequence fits."""


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
        if kind not in weights:
            weights[kind] = weights_of(config, point.dtype)
        need = need_of(point, config, weights[kind])
        one = need_of(replace(point, batch=1), config, weights[kind])
        free = int(USABLE * memory) - one.weights - RUNTIME_BYTES
        largest = max(0, free // (one.cache + one.scratch))
        found.append(Planned(point, need, refusal(point, need, memory), largest))
    return found


def table(planned: Sequence[Planned], device: str) -> list[str]:
    """The plan in lines, gigabytes of 1e9 bytes."""
    memory = device_bytes(device)
    lines = [
        f"{device}: {memory / 1e9:.1f} GB, {USABLE * memory / 1e9:.1f} GB of it usable. In GB:",
        f"{'point':<66} weights   cache scratch   total headroom  largest batch",
    ]
    for one in planned:
        need, left = one.need, USABLE * memory - one.need.total
        lines.append(
            f"{one.point.key:<66} {need.weights / 1e9:>7.1f} {need.cache / 1e9:>7.1f} "
            f"{need.scratch / 1e9:>7.1f} {need.total / 1e9:>7.1f} {left / 1e9:>8.1f}  "
            + (f"{one.largest_batch}" if one.refused is None else "does not fit")
        )
    return lines
