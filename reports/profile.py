"""What the profiler measured, by system and context length."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvideo3.reports.summary import Summary, System

Curve = dict[int, float]
"""context tokens → quantity."""


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
    """Where it was measured: device, number format, threads, repeats. One entry per setting."""

    @property
    def systems(self) -> tuple[str, ...]:
        """The systems that were measured, in the report's order."""
        return tuple(dict.fromkeys([*self.prefill, *self.decode, *self.cache]))

    @property
    def lengths(self) -> tuple[int, ...]:
        """All context lengths, shortest first."""
        curves = [*self.prefill.values(), *self.decode.values(), *self.cache.values()]
        return tuple(sorted({tokens for curve in curves for tokens in curve}))


def collect(summary: Summary) -> Profile:
    """Gather the measurements of all runs; the last one of a length counts."""
    tables: dict[str, dict[str, Curve]] = {"prefill": {}, "decode": {}, "cache": {}}
    conditions: dict[str, None] = {}
    for system in summary.systems:
        for row in system.run.measurements:
            kind = str(row.get("kind"))
            value = row.get("cache_bytes" if kind == "cache" else "tokens_per_s")
            tokens = row.get("context_tokens")
            if kind in tables and value is not None and tokens is not None:
                name = _series(system, row, summary)
                tables[kind].setdefault(name, {})[int(tokens)] = float(value)
                conditions[_condition(row)] = None
    return Profile(conditions=tuple(conditions), **tables)


def _series(system: System, row: Mapping[str, Any], summary: Summary) -> str:
    """Return the system that a row measured: its run's, unless it says another attention."""
    attention = row.get("attention")
    if attention is None or attention == system.attention:
        return system.name
    same = (s.name for s in summary.systems if s.attention == attention and not s.is_control)
    return next(same, system.name)


def _condition(row: Mapping[str, Any]) -> str:
    parts = [
        str(row.get("device") or "device not recorded"),
        str(row.get("dtype") or ""),
        f"{row['threads']} thread{'s' if row['threads'] != 1 else ''}" if "threads" in row else "",
        f"median of {row['repeats']}" if "repeats" in row else "",
    ]
    return ", ".join(part for part in parts if part)
