"""What the profiler measured, by way of running and context length: rows of `measurements.jsonl`.

The newest row of a point rules, whatever code measured it: a failure takes back an earlier rate.
What two rows differ in (device, chunk ...) keeps them apart.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

APART = {
    "device": "",
    "chunk": "chunk",
    "new_tokens": "new tokens",
    "threads": "threads",
    "fill": "fill",
    "integrate": "integrated reply of",
}
"""What keeps rows of one model apart where they differ in it, and how that is said."""
STAGES = ("video_decoding", "vision_encoding")
REQUIRED = ("kind", "model", "device", "status")
"""What every row of the profiler has."""
OF_POINT = ("attention", "runner", "batch", "dtype", "cache", "context_tokens")
OF_KIND = {
    "decode": ("tokens_per_s", "median_s"),
    "prefill": ("tokens_per_s", "median_s"),
    "last_chunk": ("tokens_per_s",),
    "cache": ("cache_bytes",),
    "video_decoding": ("frames", "median_s"),
    "vision_encoding": ("tokens_per_s",),
}
"""What a row of something measured has besides."""


class EfficiencyError(ValueError):
    """Measurements that no figure can be made of."""


@dataclass(frozen=True, slots=True)
class Series:
    """One way of running one model, by context length."""

    name: str
    number: int
    """Among all series of the measurements; its colour."""
    attention: str
    way: tuple[Any, ...]
    """How and on what it was run: what must be equal for a fair ratio."""
    reply_tokens: int
    """How long the replies are whose seconds are told."""
    decode: dict[int, Mapping[str, Any]]
    """Rows of decoding."""
    prefill: dict[int, Mapping[str, Any]]
    last_chunk: dict[int, Mapping[str, Any]]
    """Prefills of the last chunk alone."""
    cache: dict[int, Mapping[str, Any]]
    absent: dict[int, str]
    """Why a length has no figures: "out of memory", "does not fit" ..."""

    @property
    def parameters(self) -> int:
        """Of the model, as its newest row says; 0 where none does."""
        told = [row["parameters"] for row in self.decode.values() if row.get("parameters")]
        return int(told[-1]) if told else 0

    def reply_s(self, context: int) -> float | None:
        """Seconds of a whole reply; of one that was not timed whole, its length over the rate."""
        row = self.decode.get(context)
        if row is None:
            return None
        if not row["integrate"]:
            return float(row["median_s"])
        # Some rows also hold seconds by the median step. At long contexts the mean step is longer,
        # and the reply's seconds have to agree with the rate beside them.
        return float(row["batch"] * row["integrate"] / row["tokens_per_s"])


@dataclass(frozen=True, slots=True)
class Efficiency:
    """All that one profile measured."""

    series: tuple[Series, ...]
    devices: tuple[str, ...]
    labels: tuple[str, ...]
    """What the numbers are not: "scale", "random weights", "integrated"."""
    stages: tuple[Mapping[str, Any], ...] = ()
    """Rows of what comes before the language model."""
    sizes: tuple[int, ...] = ()
    """Parameters of the models."""

    @property
    def contexts(self) -> tuple[int, ...]:
        """All lengths, shortest first."""
        found = {n for s in self.series for part in (s.decode, s.absent) for n in part}
        return tuple(sorted(found))

    @property
    def codes(self) -> int:
        """How many versions of the code, with its packages, measured what counts."""
        rows = [row for one in self.series for row in one.decode.values()]
        return len({json.dumps([row.get("code"), row.get("versions")]) for row in rows})


def read(runs: Iterable[Path]) -> Efficiency:
    """Gather the measurements of run directories; the last row of a point counts.

    Raises:
        EfficiencyError: there are none.
    """
    rows = [row for run in runs for row in _rows(run / "measurements.jsonl")]
    found: dict[str, Series] = {}
    points = [row for row in rows if "point" in row]
    for row in points:
        row["integrate"] = integrated(row)
    differ = [one for one in APART if len({row.get(one) for row in points}) > 1]
    for row in points:
        name = _name(row, differ)
        if name not in found:
            found[name] = _series(name, len(found), row)
        _sort_in(found[name], row)
    if not any(s.decode or s.absent for s in found.values()):
        raise EfficiencyError(
            "no measurements of the profiler in these directories; run `internvideo3 profile`."
        )
    labels = {row["label"] for row in rows if row.get("label")}
    # Where some replies were timed whole, the names of the others say that they are integrated.
    if all(row["integrate"] for row in points):
        labels.add("integrated")
    devices = dict.fromkeys(str(row["device"]) for row in rows)
    stages = tuple(_last_of_each(row for row in rows if "video" in row))
    sizes = {row.get("parameters", _size_told(row)) for row in points}
    return Efficiency(
        tuple(found.values()), tuple(devices), tuple(sorted(labels)), stages, tuple(sorted(sizes))
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    # By line feeds alone: names may hold other characters at which `splitlines` would break.
    lines = file.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", errors="replace"))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise EfficiencyError(f"{file}: line {number} is not JSON; remove it.") from error
            # A process that was killed while it wrote; the profiler measures that point again.
            continue
        lacking = _lacking(row)
        if lacking:
            raise EfficiencyError(
                f"{file}: line {number} is no measurement ({', '.join(lacking)} missing); "
                "remove it."
            )
        found.append(row)
    return found


def _lacking(row: object) -> list[str]:
    """What a row would need to be one of the profiler's."""
    if not isinstance(row, dict):
        return list(REQUIRED)
    wanted: tuple[str, ...] = REQUIRED
    if "point" in row:
        wanted += OF_POINT
    elif "video" in row:
        wanted += ("dtype",) if row.get("status") == "ok" else ("dtype", "reason")
    if row.get("status") == "ok" and ("point" in row or "video" in row):
        wanted += OF_KIND.get(str(row.get("kind")), ())
    return [name for name in wanted if row.get(name) is None]


def integrated(row: Mapping[str, Any]) -> int:
    """Tokens of the reply in whose middle a point was timed; 0 where a reply was timed whole."""
    # Of earlier rows the point's name alone says it.
    told = re.search(r" of (\d+)$", str(row.get("point", "")))
    return int(row.get("integrate", told[1] if told else 0))


def _last_of_each(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last row of each stage; a failure only where nothing was measured."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for row in rows:
        about = tuple(row.get(one) for one in ("model", "device", "dtype", "video", "video_bytes"))
        if row["kind"] in STAGES:
            found[*about, row["kind"]] = row
            found.pop((*about, "none"), None)
        elif not any((*about, kind) in found for kind in STAGES[1:]):
            found[*about, "none"] = row
    return list(found.values())


def _size_told(row: Mapping[str, Any]) -> int:
    """Parameters of a model whose row does not say them: those written before rows did."""
    return 8 * 10**9 if str(row["model"]).startswith("random:8b") else 0


def _name(row: Mapping[str, Any], differ: Sequence[str]) -> str:
    """Model and, where it is not the plain case or rows differ in it, how it was run."""
    extra = [row["runner"]] if row["runner"] != "engine" else []
    extra += [f"batch {row['batch']}"] if row["batch"] != 1 else []
    extra += [f"{row['cache']} cache"] if row["cache"] != "native" else []
    extra += [row["dtype"]] if row["dtype"] == "float32" else []
    extra += [
        "whole reply" if (one, row.get(one)) == ("integrate", 0) else f"{APART[one]} {row.get(one)}"
        for one in differ
    ]
    extra = [one.strip() for one in extra]
    return f"{row['model']}" + (f" ({', '.join(extra)})" if extra else "")


def _series(name: str, number: int, row: Mapping[str, Any]) -> Series:
    """A series of rows like this one, without any yet."""
    way = tuple(row.get(one) for one in ("runner", "batch", "dtype", "cache", *APART))
    reply = int(row["integrate"] or row.get("new_tokens") or 0)
    return Series(name, number, row["attention"], way, reply, {}, {}, {}, {}, {})


def _sort_in(series: Series, row: Mapping[str, Any]) -> None:
    tables = {
        "decode": series.decode,
        "prefill": series.prefill,
        "last_chunk": series.last_chunk,
        "cache": series.cache,
    }
    context = int(row["context_tokens"])
    if row["status"] != "ok":
        # Whatever was measured before, perhaps by other code, does not hold any more.
        for table in tables.values():
            table.pop(context, None)
        series.absent[context] = row["status"]
    elif row["kind"] in tables:
        tables[row["kind"]][context] = row
        series.absent.pop(context, None)
