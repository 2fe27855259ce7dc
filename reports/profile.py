"""What the profiler measured of the model's own engine, by system and context length.

A curve is of one way of running: one sequence in the engine with its native cache, and among those
the way (number format, chunk, fill ...) that was measured last. Other batches, runners and caches
are in the profiler's own figures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from internvideo3.reports.efficiency_rows import integrated
from internvideo3.reports.summary import Summary, System

Curve = dict[int, float]
"""context tokens → quantity."""
KINDS = ("prefill", "decode", "cache")
PLAIN = {"runner": "engine", "batch": 1, "cache": "native"}
WAY = ("device", "dtype", "threads", "chunk", "fill", "new_tokens")
"""What rows of one curve have in common."""
FILLS = {
    "random": "cache filled with random numbers",
    "last": "cache filled with random numbers up to the last chunk",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Speed and cache size of every system that was measured."""

    prefill: dict[str, Curve]
    """Tokens per second, by system name."""
    decode: dict[str, Curve]
    """Tokens per second, by system name."""
    cache: dict[str, Curve]
    """Allocated bytes, by system name."""
    conditions: tuple[str, ...]
    """Where and how it was measured: device, number format, threads, repeats ... One entry per
    setting."""
    of_a_cpu: bool
    """Whether M²LA was decoded beside GQA, and all on a CPU, which is no measure of it."""

    @property
    def systems(self) -> tuple[str, ...]:
        """The systems that were measured, in the report's order."""
        return tuple(dict.fromkeys([*self.prefill, *self.decode, *self.cache]))

    @property
    def lengths(self) -> tuple[int, ...]:
        """All context lengths, shortest first."""
        curves = [*self.prefill.values(), *self.decode.values(), *self.cache.values()]
        return tuple(sorted({tokens for curve in curves for tokens in curve}))


@dataclass(slots=True)
class _Measured:
    """Rows of one way of running one system, by kind and context; the last row of each."""

    rows: dict[tuple[str, int], Mapping[str, Any]] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a row in; one that says why nothing was measured takes back what was before."""
        kind, tokens = str(row.get("kind")), int(row["context_tokens"])
        if row.get("status", "ok") != "ok":
            for one in KINDS:
                self.rows.pop((one, tokens), None)
        elif kind in KINDS and row.get(_quantity(kind)) is not None:
            self.rows[kind, tokens] = row


def collect(summary: Summary) -> Profile:
    """Gather the measurements of all runs; the last row of a point counts."""
    tables: dict[str, dict[str, Curve]] = {kind: {} for kind in KINDS}
    conditions: dict[str, None] = {}
    devices = set()
    for name, measured in _last_ways(summary).items():
        for (kind, tokens), row in measured.rows.items():
            tables[kind].setdefault(name, {})[tokens] = float(row[_quantity(kind)])
            conditions[_condition(row)] = None
            devices.add(row.get("device"))
    processors = {system.run.meta.get("hardware", {}).get("cpu") for system in summary.systems}
    compared = {one.attention for one in summary.systems if one.name in tables["decode"]}
    of_a_cpu = compared >= {"gqa", "m2la"} and devices <= processors - {None}
    return Profile(conditions=tuple(conditions), of_a_cpu=of_a_cpu, **tables)


def _last_ways(summary: Summary) -> dict[str, _Measured]:
    """By system, the measurements of the plain way of running that was measured last."""
    ways: dict[tuple[str, tuple[Any, ...]], _Measured] = {}
    for system in summary.systems:
        for row in system.run.measurements:
            if row.get("context_tokens") is None or not _is_plain(row):
                continue
            way = (integrated(row), *(row.get(one) for one in WAY))
            key = _series(system, row, summary), way
            # Moves to the end, so that of a system's ways the last one in the files wins below.
            ways[key] = ways.pop(key, _Measured())
            ways[key].add(row)
    found = {name: measured for (name, _), measured in ways.items() if measured.rows}
    return {system.name: found[system.name] for system in summary.systems if system.name in found}


def _is_plain(row: Mapping[str, Any]) -> bool:
    """Whether a row is of one sequence in the model's own engine, as one is that says nothing."""
    return all(row.get(name, value) == value for name, value in PLAIN.items())


def _quantity(kind: str) -> str:
    return "cache_bytes" if kind == "cache" else "tokens_per_s"


def _series(system: System, row: Mapping[str, Any], summary: Summary) -> str:
    """Return the system that a row measured: its run's, unless it says another attention."""
    attention = row.get("attention")
    if attention is None or attention == system.attention:
        return system.name
    same = (s.name for s in summary.systems if s.attention == attention and not s.is_control)
    return next(same, system.name)


def _condition(row: Mapping[str, Any]) -> str:
    reply = integrated(row)
    parts = [
        str(row.get("device") or "device not recorded"),
        str(row.get("dtype") or ""),
        f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}" if "threads" in row else "",
        "one sequence in the model's own engine" if "runner" in row else "",
        FILLS.get(str(row.get("fill")), ""),
        f"decoded in the middle of a reply of {reply} tokens" if reply else "",
        f"median of {row['repeats']}" if "repeats" in row else "",
    ]
    return ", ".join(part for part in parts if part)
