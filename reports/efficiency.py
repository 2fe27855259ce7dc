"""Figure 6: decoding speed, end-to-end latency and cache bytes over the context's length.

Drawn from `measurements.jsonl` of the profiler alone, as SVG and PNG with a table of the same
numbers. The paper's published points are overlaid as what they are: hollow, labelled, of an H200,
and only beside models of their size. A reply's time that was extrapolated is called integrated.
What two rows differ in (device, chunk ...) keeps them apart, in the figures as in the table. What
is computed and not measured, the ratio of bytes, is dashed and labelled.
"""

import contextlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

PAPER = Path(__file__).parent / "efficiency_paper.json"
COLOURS = ("#2f6db5", "#cf5a1f", "#15836f", "#a2478f", "#8f6a00", "#4d5a96")
HATCHES = ("", "///", "...", "xxx")
MARKERS = ("o", "D", "s", "^", "v", "P")
PAPER_STYLE = {"gqa": ("#656a72", "o"), "m2la": ("#1c1e21", "D")}
ATTENTION = {"gqa": "GQA", "m2la": "M²LA"}
PNG_DPI = 160
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
RED = "gate red"
REQUIRED = ("kind", "model", "device", "status")
"""What every row of the profiler has."""
PAPER_SIZE = 7e9, 10e9
"""Parameters of models that the paper's may stand beside."""
MARGIN = 1.2
"""Of the lengths' axis, as a factor."""
LEAST_STEP = 1.15
"""Factor between two lengths that both get a label on the axis."""
CROWD = 3
"""More series than this, and the legend goes below the figure."""


class EfficiencyError(ValueError):
    """Measurements that no figure can be made of."""


@dataclass(frozen=True, slots=True)
class Series:
    """One way of running one model, by context length."""

    name: str
    attention: str
    way: tuple[Any, ...]
    """How and on what it was run: what must be equal for a fair ratio."""
    decode: dict[int, Mapping[str, Any]]
    """Rows of decoding."""
    prefill: dict[int, Mapping[str, Any]]
    last_chunk: dict[int, Mapping[str, Any]]
    """Prefills of the last chunk alone."""
    cache: dict[int, Mapping[str, Any]]
    absent: dict[int, str]
    """Why a length has no figures: "out of memory", "does not fit" ..."""

    @property
    def reply_tokens(self) -> set[int]:
        """How long the replies are whose seconds are told."""
        return {
            int((row.get("integrated") or {}).get("tokens", row["new_tokens"]))
            for row in self.decode.values()
        }

    def reply_s(self, context: int) -> float | None:
        """Seconds of a whole reply."""
        row = self.decode.get(context)
        if row is None:
            return None
        integrated = row.get("integrated")
        return float(integrated["seconds"] if integrated else row["median_s"])


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


def read(runs: Iterable[Path]) -> Efficiency:
    """Gather the measurements of run directories; the last row of a point counts.

    Raises:
        EfficiencyError: there are none.
    """
    rows = [row for run in runs for row in _rows(run / "measurements.jsonl")]
    found: dict[str, Series] = {}
    points = [row for row in rows if "point" in row]
    for row in points:
        row.setdefault("integrate", _integrated(row))
    differ = [one for one in APART if len({row.get(one) for row in points}) > 1]
    for row in points:
        name = _name(row, differ)
        way = tuple(row.get(one) for one in ("runner", "batch", "dtype", "cache", *APART))
        made = found.setdefault(name, Series(name, row["attention"], way, {}, {}, {}, {}, {}))
        _sort_in(made, row)
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
    lines = file.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise EfficiencyError(f"{file}: line {number} is not JSON; remove it.") from error
            # A process that was killed while it wrote; the profiler measures that point again.
            continue
        lacking = [name for name in REQUIRED if not isinstance(row, dict) or name not in row]
        if lacking:
            raise EfficiencyError(
                f"{file}: line {number} is no measurement ({', '.join(lacking)} missing); "
                "remove it."
            )
        found.append(row)
    return found


def _integrated(row: Mapping[str, Any]) -> int:
    """Tokens of the reply in whose middle a point was timed; of rows that say it in its name."""
    told = re.search(r" of (\d+)$", str(row["point"]))
    return int(told[1]) if told else 0


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


def _sort_in(series: Series, row: Mapping[str, Any]) -> None:
    tables = {
        "decode": series.decode,
        "prefill": series.prefill,
        "last_chunk": series.last_chunk,
        "cache": series.cache,
    }
    context = int(row["context_tokens"])
    if row["status"] == "ok":
        tables[row["kind"]][context] = row
        series.absent.pop(context, None)
    elif row["status"] == RED:
        # Whatever was measured before is no more to be trusted.
        for table in tables.values():
            table.pop(context, None)
        series.absent[context] = RED
    elif context not in series.decode:
        series.absent[context] = row["status"]


def draw(runs: Iterable[Path], out: Path) -> list[Path]:
    """Draw Figure 6a, 6b, the cache and the ratio of M²LA to GQA, and write the table.

    The ratio is drawn where both were measured in the same way.

    Returns:
        The files written.

    Raises:
        EfficiencyError: there is nothing to draw.
    """
    data = read(runs)
    table = out / "efficiency.md"
    _write(table, "\n".join(markdown(data)) + "\n")
    written = [table]
    for name, figure in (
        ("figure6a-decode", decode_figure(data)),
        ("figure6b-latency", latency_figure(data)),
        ("cache-bytes", cache_figure(data)),
        ("m2la-over-gqa", ratio_figure(data)),
    ):
        for ending in ("svg", "png"):
            file = out / f"{name}.{ending}"
            if figure is None:
                file.unlink(missing_ok=True)  # of rows that are not drawn any more
                continue
            _write(file, _drawn(figure, name, ending))
            written.append(file)
    return written


def _drawn(figure: Figure, name: str, ending: str) -> bytes:
    made = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            made, format=ending, dpi=PNG_DPI, bbox_inches="tight", metadata=_undated(ending)
        )
    return made.getvalue()


def _write(file: Path, content: str | bytes) -> None:
    """Replaces a file, all or nothing.

    Raises:
        EfficiencyError: no space, or no permission.
    """
    new = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content.encode() if isinstance(content, str) else content)
        new.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise EfficiencyError(
            f"cannot write {file}: {error.strerror}. The measurements are as they were; the same "
            "command draws them when this is settled."
        ) from error


def _undated(ending: str) -> dict[str, Any]:
    """Equal data give equal files (ids within an SVG by `svg.hashsalt`)."""
    return {"Date": None} if ending == "svg" else {"Software": None}


def decode_figure(data: Efficiency) -> Figure:
    """Figure 6a: tokens a second of one step's rate, all sequences together."""
    figure, axes = _canvas(data, "Decode, tokens per second")
    for series, style in _styled(data):
        points = [(n, row["tokens_per_s"]) for n, row in sorted(series.decode.items())]
        _line(axes, points, series.name, style)
        _mark_absent(axes, series, style)
    if _is_full_size(data):
        _overlay(axes)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _legend(axes)
    return figure


def latency_figure(data: Efficiency) -> Figure:
    """Figure 6b: seconds of prefill and reply, stacked.

    Where replies are as long as the paper's, its own are marked: their tokens over its rate, since
    it publishes no seconds and, of end to end, ratios only.
    """
    timed = any(series.prefill for series in data.series)
    title = "Prefill (pale) and reply, seconds" if timed else "Reply, seconds; prefill not timed"
    figure, axes = _canvas(data, title)
    numbered = enumerate(_styled(data))
    styled = [(series, colour, n) for n, (series, (colour, _)) in numbered if series.decode]
    width = 0.8 / max(1, len(styled))
    for index, (series, colour, number) in enumerate(styled):
        hatch = HATCHES[number // len(COLOURS) % len(HATCHES)]
        for place, context in enumerate(data.contexts):
            reply, prefill = series.reply_s(context), series.prefill.get(context)
            if reply is None:
                continue
            x = place + (index - (len(styled) - 1) / 2) * width
            before = float(prefill["median_s"]) if prefill else 0.0
            axes.bar(x, before, width, color=colour, alpha=0.4, hatch=hatch)
            axes.bar(x, reply, width, bottom=before, color=colour, hatch=hatch)
        axes.bar(0, 0, color=colour, label=_plain(series.name), hatch=hatch)
    if _is_full_size(data):
        _overlay_replies(axes, data)
    axes.set_xscale("linear")
    axes.set_xticks(range(len(data.contexts)), [_tokens(n) for n in data.contexts])
    axes.set_xlim(-0.6, len(data.contexts) - 0.4)
    _legend(axes, "below")
    return figure


def cache_figure(data: Efficiency) -> Figure:
    """Cache bytes that were allocated."""
    middle = ", in the middle of the reply" if "integrated" in data.labels else ""
    figure, axes = _canvas(data, f"Cache, bytes allocated{middle}")
    for series, style in _styled(data):
        points = [(n, row["cache_bytes"]) for n, row in sorted(series.cache.items())]
        _line(axes, points, series.name, style)
    axes.set_yscale("log")
    _legend(axes)
    return figure


def ratio_figure(data: Efficiency) -> Figure | None:
    """How many times as fast M²LA decodes as GQA run in the same way; None without such a pair.

    Beside it, dashed, what the bytes that a step reads would give: weights and cache of GQA over
    those of M²LA. The paper's ratios lie far above it.
    """
    pairs = list(_pairs(data))
    if not pairs:
        return None
    figure, axes = _canvas(data, "M²LA over GQA, ratio of decoded tokens per second")
    for m2la, gqa, style in pairs:
        both = sorted(m2la.decode.keys() & gqa.decode.keys())
        measured = [(n, _ratio(m2la, gqa, n, "tokens_per_s")) for n in both]
        read = [(n, _ratio(gqa, m2la, n, "moved_bytes_per_step")) for n in both]
        _line(axes, measured, m2la.name, style)
        label = "bytes that a step reads, GQA over M²LA (computed)"
        # A line of one length is none: a dash stands for it.
        line = "--" if len(read) > 1 else "_"
        axes.plot(*zip(*read, strict=True), line, color=style[0], linewidth=1, label=label)
    axes.axhline(1, color="#656a72", linewidth=0.8)
    if _is_full_size(data):
        _hollow(axes, _paper()["decode_speedup"], "m2la", "paper (H200)")
    axes.set_ylim(bottom=0)
    _legend(axes, "below")
    return figure


def _pairs(data: Efficiency) -> Iterable[tuple[Series, Series, tuple[str, str]]]:
    """Each series of M²LA with the GQA that was run in the same way, if they share a length."""
    grouped = {series.way: series for series in reversed(data.series) if series.attention == "gqa"}
    for series, style in _styled(data):
        other = grouped.get(series.way)
        if series.attention == "m2la" and other and series.decode.keys() & other.decode.keys():
            yield series, other, style


def _ratio(one: Series, other: Series, context: int, name: str) -> float:
    return float(one.decode[context][name]) / float(other.decode[context][name])


def _legend(axes: Axes, place: str = "best") -> None:
    """A legend, below the figure where it would cover much of it or is asked to be there."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    many = len(labels) > CROWD
    options: dict[str, Any] = {"loc": place}
    if many or place == "below":
        options = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.16), "ncols": 2}
    axes.legend(fontsize=7, frameon=False, **options)


def _canvas(data: Efficiency, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.4))
    axes = figure.subplots()
    labels = f" ({', '.join(data.labels)})" if data.labels else ""
    about = _plain(f"{', '.join(data.devices)}{labels}")
    axes.set_title(f"{title}\n{about}", fontsize=8, loc="left")
    axes.set_xlabel("context, tokens", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(_apart_by(data.contexts, LEAST_STEP))
    # Crosses at the foot have no height, and a single length no width: matplotlib's own choice of
    # limits then leaves nothing to see.
    shown = [*data.contexts, *(_paper_contexts() if _is_full_size(data) else ())]
    axes.set_xlim(min(shown) / MARGIN, max(shown) * MARGIN)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _tokens(n)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(which="both", labelsize=7)
    axes.grid(visible=True, axis="y", color="#e3e4e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _styled(data: Efficiency) -> Iterable[tuple[Series, tuple[str, str]]]:
    for index, series in enumerate(data.series):
        turn = index // len(COLOURS)
        yield series, (COLOURS[index % len(COLOURS)], MARKERS[(index + turn) % len(MARKERS)])


def _line(
    axes: Axes, points: Sequence[tuple[int, float]], name: str, style: tuple[str, str]
) -> None:
    if not points:
        return
    colour, marker = style
    x, y = [n for n, _ in points], [value for _, value in points]
    axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.2, label=_plain(name))


def _plain(text: str) -> str:
    """Text as it stands: no line breaks, and no formulas between dollars."""
    return " ".join(text.split()).replace("$", r"\$")


def _apart_by(values: Sequence[int], factor: float) -> list[int]:
    """Those of ascending values that are far enough from the one before."""
    found: list[int] = []
    for value in values:
        if not found or value >= factor * found[-1]:
            found.append(value)
    return found


def _mark_absent(axes: Axes, series: Series, style: tuple[str, str]) -> None:
    """A cross at the foot of the figure for each length that could not be run, and why."""
    foot: dict[str, Any] = {"color": style[0], "transform": axes.get_xaxis_transform()}
    by_reason: dict[str, list[int]] = {}
    for context, reason in sorted(series.absent.items()):
        by_reason.setdefault(reason, []).append(context)
    for reason, contexts in by_reason.items():
        label = _plain(f"{series.name}: {reason}")
        axes.plot(contexts, [0.03] * len(contexts), "x", markersize=5, label=label, **foot)


def _is_full_size(data: Efficiency) -> bool:
    """Whether the paper's points are of the same model's size, so that they can stand beside."""
    low, high = PAPER_SIZE
    of_its_size = bool(data.sizes) and all(low <= size <= high for size in data.sizes)
    return of_its_size and max(data.contexts, default=0) >= min(_paper_contexts())


def _paper_contexts() -> list[int]:
    """The lengths that the paper's points are at."""
    points = _paper()["decode_tokens_per_s"].values()
    return [int(n) for rates in points for n in rates] + [_paper()["gqa_out_of_memory_from"]]


def _overlay(axes: Axes) -> None:
    """The paper's points, hollow, and from where on it ran out of memory."""
    for attention, points in _paper()["decode_tokens_per_s"].items():
        _hollow(axes, points, attention, f"paper, {ATTENTION[attention]} (H200)")
    start = _paper()["gqa_out_of_memory_from"]
    label = f"paper, GQA: out of memory from {_tokens(start)}"
    at_foot: dict[str, Any] = {
        "transform": axes.get_xaxis_transform(),
        "color": PAPER_STYLE["gqa"][0],
    }
    axes.plot([start], [0.08], "x", markersize=7, label=label, **at_foot)


def _overlay_replies(axes: Axes, data: Efficiency) -> None:
    """Seconds of the paper's replies, hollow, beside replies of their length."""
    paper = _paper()
    if {n for series in data.series for n in series.reply_tokens} != {paper["reply_tokens"]}:
        return
    for attention, points in paper["decode_tokens_per_s"].items():
        known = {
            data.contexts.index(int(n)): paper["reply_tokens"] / rate
            for n, rate in points.items()
            if int(n) in data.contexts
        }
        _hollow(axes, known, attention, f"paper, {ATTENTION[attention]} (H200), reply alone")
    ratio = paper["end_to_end_speedup"]["32768"]
    axes.plot([], [], " ", label=f"paper, prefill and reply: M²LA {ratio} times as fast at 32K")


def _hollow(axes: Axes, points: Mapping[Any, float], attention: str, label: str) -> None:
    colour, marker = PAPER_STYLE[attention]
    contexts, values = [int(n) for n in points], list(points.values())
    axes.plot(contexts, values, marker, markerfacecolor="none", color=colour, label=label)


def _paper() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PAPER.read_text(encoding="utf-8"))
    return found


def _tokens(count: float) -> str:
    """A length in words: in K where that is exact."""
    return f"{count // 1024:.0f}K" if count and count % 1024 == 0 else f"{count:.0f}"


COLUMNS = (
    "model",
    "context",
    "time to first token, s",
    "prefill, tok/s",
    "its last chunk, tok/s",
    "decode, tok/s",
    "reply, s",
    "median step, of the roofline",
    "cache, MiB",
    "peak memory, GiB",
    "J/token",
)


def markdown(data: Efficiency) -> list[str]:
    """The table in Markdown lines; what was not measured is a dash."""
    conditions = ", ".join([*data.devices, *data.labels])
    lines = [f"Measured on: {conditions}.", "", f"| {' | '.join(COLUMNS)} |"]
    lines.append(f"|{'---|' * len(COLUMNS)}")
    for series in data.series:
        for context in data.contexts:
            if context in series.absent:
                cells = [series.name, _tokens(context), series.absent[context]]
                cells += ["–"] * (len(COLUMNS) - len(cells))
            else:
                cells = _cells(series, context)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    if any("peak_resident_bytes" in row for one in data.series for row in one.cache.values()):
        lines += ["", "Peak memory on a CPU is the whole process's, up to then."]
    return lines + [line for row in data.stages for line in ("", _stage_line(row))]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def _stage_line(row: Mapping[str, Any]) -> str:
    """A stage before the language model in a sentence."""
    if row["kind"] == "video_decoding":
        size = f" ({row['fps']:g}/s, {row['width']}x{row['height']})" if "fps" in row else ""
        what = f"{row['frames']} frames of {row['video']}{size} are read in {row['median_s']:.3f} s"
    elif row["kind"] == "vision_encoding":
        what = f"its frames are encoded at {row['tokens_per_s']:.0f} vision tokens/s"
    else:
        what = f"{row['video']}: {row['status']}: {str(row['reason']).rstrip('.')}"
    return _cell(f"{row['model']} ({row['device']}, {row['dtype']}): {what}.")


def _cells(series: Series, context: int) -> list[str]:
    prefill, decode = series.prefill.get(context, {}), series.decode.get(context, {})
    cache = series.cache.get(context, {})
    peak = cache.get("peak_allocated_bytes") or cache.get("peak_resident_bytes")
    return [
        series.name,
        _tokens(context),
        _number(prefill.get("median_s"), ".3f"),
        _number(prefill.get("tokens_per_s"), ".0f"),
        _number(series.last_chunk.get(context, {}).get("tokens_per_s"), ".0f"),
        _number(decode.get("tokens_per_s"), ".1f"),
        _number(series.reply_s(context), ".3f"),
        _number(decode.get("roofline_share"), ".0%"),
        _number(cache["cache_bytes"] / 2**20 if cache else None, ".2f"),
        _number(peak / 2**30 if peak else None, ".2f"),
        _number(decode.get("energy_j_per_token"), ".3f"),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
