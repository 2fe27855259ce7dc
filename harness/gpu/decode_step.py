"""Decode speed of the whole 8B language model with random weights, at synthetic depths, on a GPU.

    python -m internvideo3.harness.gpu.decode_step --out decode.json --budget-s 200

Both attention kinds run the same stack: static cache, one captured CUDA graph for every depth
(lengths live on the device), fused matrix-vector kernels, split-KV attention, argmax on the
device, no host synchronisation per token. The cache is filled with random values, so a point says
what decoding at that depth costs, not what a prefill of that length costs. ``--device cpu`` under
``TRITON_INTERPRET=1`` rehearses the script on a tiny shape.

Axes: H query heads, K key/value heads, T cache capacity, R latent row width, D head width,
S rotary slots.
"""

import argparse
import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internvideo3.harness.gpu.measure import Results, release, say, summarize, timing_fields
from internvideo3.kernels.decode_linear.dispatch import decode_linear
from internvideo3.kernels.gqa_append.dispatch import gqa_append
from internvideo3.kernels.gqa_decode.dispatch import decode_runs as gqa_decode
from internvideo3.kernels.gqa_decode.naive import KeysValues
from internvideo3.kernels.latent_absorb.dispatch import absorb_query, expand_output
from internvideo3.kernels.latent_append.dispatch import latent_append
from internvideo3.kernels.latent_decode.dispatch import decode_runs as latent_decode
from internvideo3.kernels.latent_decode.rows import Rows

LABEL = "random weights, integrated at synthetic depth"
DEPTHS = (32768, 65536, 131072, 262144, 393216, 524288, 786432)
STEPS, REPETITIONS = 64, 3
SPARE_BYTES = 2 * 2**30
LOGITS_TOLERANCE = 3e-2
ROPE_BASE = 5e6
PROFILED_DEPTHS = (32768, 262144)


@dataclass(frozen=True)
class Shape:
    """The language model's dimensions (Qwen3-VL-8B; the latent's as InternVideo3-8B released)."""

    layers: int = 36
    hidden: int = 4096
    intermediate: int = 12288
    vocabulary: int = 151936
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    rank: int = 896
    rotary: int = 128
    """Columns of the shared rotary key, 2 per slot."""


TINY = Shape(1, hidden=64, intermediate=32, vocabulary=40, heads=2, kv_heads=1)
GATE = Shape(2, hidden=512, intermediate=768, vocabulary=160)


class Engine(ABC):
    """A decoder with a static cache that advances one token per ``step``."""

    name: str

    def __init__(
        self, shape: Shape, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Draw random weights and a random cache of ``capacity`` tokens."""
        self.shape = shape
        self.capacity = capacity
        self.device = device
        self.dtype = dtype
        self.embedding = self.draw(shape.vocabulary, shape.hidden)
        self.lm_head = self.draw(shape.vocabulary, shape.hidden)
        self.final_norm = self.gains(shape.hidden)
        self.layers = [
            {
                "norm_in": self.gains(shape.hidden),
                "norm_mid": self.gains(shape.hidden),
                "out": self.draw(shape.hidden, shape.heads * shape.head_dim),
                "gate": self.draw(shape.intermediate, shape.hidden),
                "up": self.draw(shape.intermediate, shape.hidden),
                "down": self.draw(shape.hidden, shape.intermediate),
            }
            | self.attention_weights()
            for _ in range(shape.layers)
        ]
        self.cache = [t.normal_() for t in self.allocate_cache()]
        slots = self.rotary_slots()
        self.inverse_frequency_S = ROPE_BASE ** (
            -torch.arange(slots, dtype=torch.float32, device=device) / slots
        )
        self.token = torch.zeros(1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.lengths_B = torch.zeros(1, dtype=torch.int32, device=device)

    def draw(self, *size: int) -> torch.Tensor:
        """A random weight that keeps activations near one."""
        weight = torch.empty(*size, dtype=self.dtype, device=self.device)
        return weight.normal_(std=size[-1] ** -0.5)

    def gains(self, size: int) -> torch.Tensor:
        """Random norm gains around one."""
        return torch.empty(size, dtype=self.dtype, device=self.device).uniform_(0.5, 1.5)

    @abstractmethod
    def attention_weights(self) -> dict[str, torch.Tensor]:
        """Weights of one layer's attention, without the output projection."""

    @abstractmethod
    def allocate_cache(self) -> list[torch.Tensor]:
        """Cache tensors, layer first."""

    @abstractmethod
    def rotary_slots(self) -> int:
        """Rotary pairs."""

    @abstractmethod
    def attend(
        self, index: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Append one token to a layer's cache and attend: ``[1, hidden] -> [1, H * D]``."""

    def rewind(self, depth: int, token: int = 1) -> None:
        """Pretend that ``depth`` tokens are cached."""
        self.token.fill_(token)
        self.position.fill_(depth)
        self.lengths_B.fill_(depth)

    def step(self) -> torch.Tensor:
        """Advance by one token, the argmax, without touching the host; return the logits."""
        self.lengths_B.add_(1)
        x = self.embedding.index_select(0, self.token)
        angle = self.position[:, None].to(torch.float32) * self.inverse_frequency_S
        cos, sin = angle.cos(), angle.sin()
        for index, layer in enumerate(self.layers):
            attended = self.attend(index, x, cos, sin)
            x = decode_linear(attended, layer["out"], residual_BN=x)
            middle = decode_linear(
                x, layer["gate"], factor_NK=layer["up"], norm_weight_K=layer["norm_mid"]
            )
            x = decode_linear(middle, layer["down"], residual_BN=x)
        logits = decode_linear(x, self.lm_head, norm_weight_K=self.final_norm)
        self.token.copy_(logits.argmax().view(1))
        self.position.add_(1)
        return logits

    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads: all but the embedding table."""
        tensors = [t for layer in self.layers for t in layer.values()]
        return sum(t.nbytes for t in [*tensors, self.lm_head, self.final_norm])

    def cache_bytes_per_token(self) -> int:
        """Cache bytes of one token over all layers."""
        return sum(t.nbytes for t in self.cache) // self.capacity

    def copy_from(self, other: "Engine") -> None:
        """Take another engine's weights and cache, in this one's dtype."""
        for mine, its in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(its)

    def tensors(self) -> list[torch.Tensor]:
        """Weights and cache in a fixed order."""
        weights = [layer[name] for layer in self.layers for name in sorted(layer)]
        return [self.embedding, self.lm_head, self.final_norm, *weights, *self.cache]


class LatentEngine(Engine):
    """M²LA, absorbed: one latent row per token and layer."""

    name = "m2la"

    def rotary_slots(self) -> int:
        """Pairs of the shared rotary key."""
        return self.shape.rotary // 2

    def attention_weights(self) -> dict[str, torch.Tensor]:
        """Merged query and latent projection, and the two up-projections per head."""
        s = self.shape
        width = s.heads * (s.head_dim + s.rotary) + s.rank + s.rotary
        return {
            "in": self.draw(width, s.hidden),
            "up_key": self.draw(s.heads, s.head_dim, s.rank),
            "up_value": self.draw(s.heads, s.head_dim, s.rank),
        }

    def allocate_cache(self) -> list[torch.Tensor]:
        """Rows ``[1, T, R]`` of each layer."""
        shape = (self.shape.layers, 1, self.capacity, self.shape.rank + self.shape.rotary)
        return list(torch.empty(*shape, dtype=self.dtype, device=self.device))

    def attend(
        self, index: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Absorb the query, append the row, attend over the rows, expand the output."""
        s, layer, rows_1TR = self.shape, self.layers[index], self.cache[index]
        qk_width = s.head_dim + s.rotary
        merged = decode_linear(x, layer["in"], norm_weight_K=layer["norm_in"])
        q_1HW = merged[:, : s.heads * qk_width].unflatten(1, (s.heads, qk_width))
        row_1R = merged[:, s.heads * qk_width :]
        latent_append(row_1R, cos, sin, self.position, rows_1TR[0])
        q_1HR = absorb_query(q_1HW, layer["up_key"], cos, sin)
        cached = Rows(rows_bTW=rows_1TR, lengths_B=self.lengths_B, rank=s.rank)
        latent_1HV, _ = latent_decode(q_1HR, [cached], scale=qk_width**-0.5, value_width=s.rank)
        return expand_output(latent_1HV, layer["up_value"]).flatten(1)


class GqaEngine(Engine):
    """Grouped-query attention with QK-norm: the control."""

    name = "gqa"

    def rotary_slots(self) -> int:
        """Pairs of a head."""
        return self.shape.head_dim // 2

    def attention_weights(self) -> dict[str, torch.Tensor]:
        """Merged query, key and value projection, and the QK-norm gains."""
        s = self.shape
        return {
            "qkv": self.draw((s.heads + 2 * s.kv_heads) * s.head_dim, s.hidden),
            "q_norm": self.gains(s.head_dim),
            "k_norm": self.gains(s.head_dim),
        }

    def allocate_cache(self) -> list[torch.Tensor]:
        """Keys and values ``[2, 1, K, T, D]`` of each layer."""
        s = self.shape
        shape = (s.layers, 2, 1, s.kv_heads, self.capacity, s.head_dim)
        return list(torch.empty(*shape, dtype=self.dtype, device=self.device))

    def attend(
        self, index: int, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """Append key and value, attend over the cache."""
        layer, (keys, values) = self.layers[index], self.cache[index]
        qkv = decode_linear(x, layer["qkv"], norm_weight_K=layer["norm_in"])
        q_1HD = gqa_append(
            qkv, layer["q_norm"], layer["k_norm"], cos, sin, self.position, keys, values
        )
        cached = KeysValues(keys_bKTD=keys, values_bKTD=values, lengths_B=self.lengths_B)
        out_1HD, _ = gqa_decode(q_1HD, [cached], scale=self.shape.head_dim**-0.5)
        return out_1HD.flatten(1)


ENGINES: dict[str, type[Engine]] = {"m2la": LatentEngine, "gqa": GqaEngine}


@torch.no_grad()
def check_engine(kind: type[Engine], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Compare three steps of a small model with the same steps in float64 plain torch."""
    shape = GATE if device.type == "cuda" else TINY
    depth = 900 if device.type == "cuda" else 33
    engine = kind(shape, depth + 8, device, dtype)
    reference = kind(shape, depth + 8, device, torch.float64)
    reference.copy_from(engine)
    engine.rewind(depth)
    reference.rewind(depth)
    errors = []
    for _ in range(3):
        logits, expected = engine.step(), reference.step()
        errors.append(float((logits.double() - expected).norm() / expected.norm()))
        engine.token.copy_(reference.token)
    worst = max(errors, key=lambda e: float("inf") if e != e else e)
    green = worst <= LOGITS_TOLERANCE
    return {"relative_error": worst, "limit": LOGITS_TOLERANCE, "gate": "ok" if green else "red"}


def bytes_needed(kind: type[Engine], shape: Shape, capacity: int) -> int:
    """Bytes of weights and cache in bfloat16, counted on the meta device."""
    with torch.device("meta"):
        engine = kind(shape, capacity, torch.device("meta"), torch.bfloat16)
    return sum(t.nbytes for t in engine.tensors())


def fitting_depths(kind: type[Engine], shape: Shape, device: torch.device) -> list[int]:
    """Depths whose weights and cache fit in the device's free memory."""
    if device.type != "cuda":
        return [40]
    free, _ = torch.cuda.mem_get_info(device)
    return [d for d in DEPTHS if bytes_needed(kind, shape, d + 512) + SPARE_BYTES <= free]


def capture(engine: Engine) -> Any:
    """A callable that replays one captured step; on a CPU the step itself."""
    if engine.device.type != "cuda":
        return engine.step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            engine.step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        engine.step()
    return graph.replay


def time_steps(engine: Engine, replay: Any, depth: int) -> list[float]:
    """Seconds of every step of a few runs from the same depth."""
    if engine.device.type != "cuda":
        engine.rewind(depth)
        replay()
        return [1.0]
    seconds = []
    for repetition in range(REPETITIONS + 1):
        engine.rewind(depth)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
        events[0].record()
        for event in events[1:]:
            replay()
            event.record()
        events[-1].synchronize()
        if repetition:
            pairs = zip(events, events[1:], strict=False)
            seconds += [a.elapsed_time(b) / 1e3 for a, b in pairs]
    return seconds


def measure_depth(engine: Engine, replay: Any, depth: int, bandwidth: float) -> dict[str, Any]:
    """Tokens per second and share of the roofline at one depth."""
    timing = summarize(time_steps(engine, replay, depth), 1)
    mean_length = depth + (STEPS + 1) / 2
    moved = engine.weight_bytes() + engine.cache_bytes_per_token() * mean_length
    return {
        "label": LABEL,
        "attention": engine.name,
        "depth": depth,
        "tokens_per_s": 1 / timing.median_s,
        "weight_bytes": engine.weight_bytes(),
        "cache_bytes": int(engine.cache_bytes_per_token() * mean_length),
        "share_of_roofline": moved / (bandwidth * timing.median_s),
    } | timing_fields(timing)


def kernel_times(engine: Engine, replay: Any, depth: int) -> dict[str, Any]:
    """Microseconds per step by kernel name, as torch's profiler sees a few replays."""
    steps = 4
    engine.rewind(depth)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            replay()
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.device_time_total)
    kernels = {
        row.key[:80]: {"us": row.device_time_total / steps, "launches": row.count / steps}
        for row in rows[:25]
    }
    return {"kernels": kernels, "sum_us": sum(row.device_time_total for row in rows) / steps}


def say_depth(key: str, point: dict[str, Any] | None) -> None:
    """Say one point."""
    if point is None:
        say(f"{key}: not run, budget spent")
    elif point["status"] != "ok":
        say(f"{key}: {point['status']} {point.get('error', '')[:200]}")
    else:
        say(
            f"{key}: {point['tokens_per_s']:.1f} tok/s, {1e3 * point['median_s']:.3f} ms, "
            f"{point['share_of_roofline']:.1%} of the roofline"
        )


@torch.no_grad()
def run_engine(results: Results, kind: type[Engine], shape: Shape, device: torch.device) -> None:
    """Gate one engine, then walk the depths that fit, all with one captured graph."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    gate = results.point(f"gate/{kind.name}", lambda: check_engine(kind, device, dtype))
    say(f"gate/{kind.name}: {gate}")
    if gate is None or gate.get("gate") != "ok":
        return
    depths = fitting_depths(kind, shape, device)
    wanted = DEPTHS if device.type == "cuda" else depths
    for depth in sorted(set(wanted) - set(depths)):
        found: dict[str, Any] = {"status": "out of memory", "planned": True, "depth": depth}
        results.data["points"][f"{kind.name}/{depth}"] = found
        say(f"{kind.name}/{depth}: weights and cache do not fit in free memory")
    missing = [d for d in depths if f"{kind.name}/{d}" not in results.data["points"]]
    if not missing or results.left_s() <= 0:
        return
    engine = kind(shape, max(missing) + 512, device, dtype)
    engine.rewind(depths[0])
    replay = capture(engine)
    say(f"{kind.name}: {engine.weight_bytes() / 1e9:.2f} GB of weights per step, captured")
    bandwidth = results.ceilings(device)["copy_bytes_per_s"]
    for depth in missing:
        key = f"{kind.name}/{depth}"
        measure = functools.partial(measure_depth, engine, replay, depth, bandwidth)
        say_depth(key, results.point(key, measure))
    for depth in set(PROFILED_DEPTHS) & set(depths):
        key = f"profile/{kind.name}/{depth}"
        results.point(key, functools.partial(kernel_times, engine, replay, depth))


def main() -> None:
    """Measure the control and M²LA."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget-s", type=float, default=200.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--engines", default="m2la,gqa")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    shape = Shape() if device.type == "cuda" else TINY
    results = Results(arguments.out, device, arguments.budget_s)
    say(f"device: {results.data['device']['name']}, torch {torch.__version__}")
    bandwidth = results.ceilings(device)["copy_bytes_per_s"]
    say(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    for name in arguments.engines.split(","):
        run_engine(results, ENGINES[name], shape, device)
        release()
    results.close()
    say(f"wrote {arguments.out}, {results.left_s():.0f} s of the budget left")


if __name__ == "__main__":
    main()
