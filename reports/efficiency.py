"""Figure 6: decoding speed, end-to-end latency and cache bytes over the context's length.

Drawn from `measurements.jsonl` of the profiler alone, as SVG and PNG with a table of the same
numbers. The paper's published points are overlaid as what they are: hollow, labelled, of an H200,
and only beside models of their size. A reply's time that was extrapolated is called integrated.
What is computed and not measured (the ratio of bytes, the paper's seconds) is labelled so. A length
that could not be run is a cross; what no device could run is in the table alone.
"""

import contextlib
import io
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from internvideo3.reports.efficiency_rows import Efficiency, EfficiencyError, Series, read

__all__ = ["EfficiencyError", "draw", "markdown", "read"]

PAPER = Path(__file__).parent / "efficiency_paper.json"
COLOURS = ("#2f6db5", "#cf5a1f", "#15836f", "#a2478f", "#8f6a00", "#4d5a96")
HATCHES = ("", "///", "...", "xxx")
MARKERS = ("o", "D", "s", "^", "v", "P")
PAPER_STYLE = {"gqa": ("#656a72", "o"), "m2la": ("#1c1e21", "D")}
ATTENTION = {"gqa": "GQA", "m2la": "M²LA"}
PNG_DPI = 160
PAPER_SIZE = 7e9, 10e9
"""Parameters of models that the paper's may stand beside."""
MARGIN = 1.2
"""Of the lengths' axis, as a factor."""
LEAST_STEP = 1.15
"""Factor between two lengths that both get a label on the axis."""
SIZE_SPREAD = 4
"""How many times the parameters of the other a model may have whose ratio is drawn: the shapes of
tests differ by three, and models of different sizes by more."""
CROWD = 3
"""More series than this, and the legend goes below the figure."""
LONG = 44
"""So does one with a longer name than this."""
WIDE, WIDEST = 64, 72
"""Characters of two columns of a legend, and of one, that are about as wide as the figure."""
REPLIES = "figure6b-latency"
MOVED = "moved_bytes_per_step"
NOT_POSSIBLE = "not possible"
"""Status of what is impossible on any device."""
FOOT, STEP, CROSSES = 0.03, 0.035, 0.3
"""Heights as shares of a figure: of the lowest crosses, between rows of them, and of all rows."""


def draw(runs: Iterable[Path], out: Path) -> list[Path]:
    """Draw Figure 6a, 6b, the cache and the ratio of M²LA to GQA, and write the table.

    There is a 6b for each length of reply. The ratio is drawn where both were measured in the same
    way. Figures of rows that are not there any more are removed.

    Returns:
        The files written.

    Raises:
        EfficiencyError: there is nothing to draw.
    """
    data = read(runs)
    table = out / "efficiency.md"
    _write(table, "\n".join(markdown(data)) + "\n")
    written = [table]
    for name, figure in _figures(data):
        for ending in ("svg", "png"):
            file = out / f"{name}.{ending}"
            _write(file, _drawn(figure, name, ending))
            written.append(file)
    for file in sorted(out.iterdir()):
        ours = re.fullmatch(rf"(m2la-over-gqa|{REPLIES}-\d+)\.(svg|png)", file.name)
        if ours and file not in written:
            file.unlink()
    return written


def _figures(data: Efficiency) -> Iterator[tuple[str, Figure]]:
    """Every figure by its file's name."""
    yield "figure6a-decode", decode_figure(data)
    for name, part in _by_reply(data).items():
        yield name, latency_figure(part)
    yield "cache-bytes", cache_figure(data)
    ratio = ratio_figure(data)
    if ratio is not None:
        yield "m2la-over-gqa", ratio


def _by_reply(data: Efficiency) -> dict[str, Efficiency]:
    """What each Figure 6b is of: replies of one length. The paper's or the longest have no suffix.

    On one axis a short reply's bars would be nothing beside a long one's.
    """
    lengths = {one.reply_tokens for one in data.series if one.decode or _told_absent(one)}
    timed = {one.reply_tokens for one in data.series if one.decode} or lengths
    paper = _paper()["reply_tokens"]
    first = paper if paper in timed and _is_full_size(data) else max(timed, default=None)
    if first is None:
        return {REPLIES: data}
    found = {}
    for length in (first, *sorted(lengths - {first})):
        name = REPLIES if length == first else f"{REPLIES}-{length}"
        alike = tuple(one for one in data.series if one.reply_tokens == length)
        found[name] = replace(data, series=alike)
    return found


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
    beside = _paper_contexts() if _is_full_size(data) else []
    figure, axes = _canvas(data, "Decode, tokens per second", beside)
    for series, style in _styled(data):
        points = [(n, row["tokens_per_s"]) for n, row in sorted(series.decode.items())]
        _line(axes, points, series.name, style)
    axes.set_yscale("log")
    if _is_full_size(data):
        _overlay(axes)
    crosses = _absences(data)
    if _is_full_size(data):
        crosses.append(_overlaid_absence())
    _mark_absences(axes, crosses)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _show_two_ticks(axes)
    _legend(axes)
    return figure


def _show_two_ticks(axes: Axes) -> None:
    """Makes room for the next ticks of a log axis where values that are close show one or none."""
    low, high = axes.get_ylim()
    ticks = axes.yaxis.get_major_locator().tick_values(low, high)
    if sum(low <= tick <= high for tick in ticks) < 2:
        below = [tick for tick in ticks if tick <= low]
        above = [tick for tick in ticks if tick >= high]
        axes.set_ylim(min(low, 0.97 * max(below)), max(high, 1.03 * min(above)))


def latency_figure(data: Efficiency) -> Figure:
    """Figure 6b: seconds of prefill and reply, stacked, of replies of one length.

    Where that is the paper's, its own are marked: their tokens over its rate, since it publishes no
    seconds and, of end to end, ratios only.
    """
    shown = [one for one in _styled(data) if one[0].decode or _told_absent(one[0])]
    timed = any(series.prefill for series, _ in shown)
    lengths = {series.reply_tokens for series, _ in shown}
    of = f" of {_tokens(min(lengths))} tokens" if len(lengths) == 1 else ""
    title = f"Prefill (pale) and reply{of}, seconds"
    figure, axes = _canvas(data, title if timed else f"Reply{of}, seconds; prefill not timed")
    width = 0.8 / max(1, len(shown))
    for index, (series, (colour, _)) in enumerate(shown):
        beside = (index - (len(shown) - 1) / 2) * width
        places = {n: place + beside for place, n in enumerate(data.contexts)}
        _bars(axes, series, places, width, colour)
        untimed = "; prefill not timed" if timed and not series.prefill else ""
        if series.decode:
            look: dict[str, Any] = {"color": colour, "hatch": _hatch(series)}
            axes.bar(0, 0, label=_plain(f"{series.name}{untimed}"), **look)
        for reason, contexts in _told_absent(series).items():
            at = [places[n] for n in contexts]
            _crosses(axes, at, FOOT, _plain(f"{series.name}: {reason}"), colour)
    if _is_full_size(data):
        _overlay_replies(axes, data)
    axes.set_xscale("linear")
    axes.set_xticks(range(len(data.contexts)), [_tokens(n) for n in data.contexts])
    axes.set_xlim(-0.6, len(data.contexts) - 0.4)
    _legend(axes, "below")
    return figure


def _bars(
    axes: Axes, series: Series, places: Mapping[int, float], width: float, colour: str
) -> None:
    """Prefill and, on top of it, reply at each length's place."""
    look: dict[str, Any] = {"color": colour, "hatch": _hatch(series)}
    for context, x in places.items():
        reply, prefill = series.reply_s(context), series.prefill.get(context)
        if reply is None:
            continue
        before = float(prefill["median_s"]) if prefill else 0.0
        axes.bar(x, before, width, alpha=0.4, **look)
        axes.bar(x, reply, width, bottom=before, **look)


def _hatch(series: Series) -> str:
    """What keeps bars of one colour apart."""
    return HATCHES[series.number // len(COLOURS) % len(HATCHES)]


def cache_figure(data: Efficiency) -> Figure:
    """Cache bytes that were allocated."""
    middle = ", in the middle of the reply" if "integrated" in data.labels else ""
    figure, axes = _canvas(data, f"Cache, bytes allocated{middle}")
    for series, style in _styled(data):
        points = [(n, row["cache_bytes"]) for n, row in sorted(series.cache.items())]
        _line(axes, points, series.name, style)
    axes.set_yscale("log")
    _mark_absences(axes, _absences(data))
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
    ratios = _paper()["decode_speedup"] if _is_full_size(data) else {}
    title = "M²LA over GQA, ratio of decoded tokens per second"
    figure, axes = _canvas(data, title, [int(n) for n in ratios])
    several = len({gqa.number for _, gqa, _ in pairs}) > 1
    for m2la, gqa, style in pairs:
        both = sorted(m2la.decode.keys() & gqa.decode.keys())
        measured = [(n, _ratio(m2la, gqa, n, "tokens_per_s")) for n in both]
        beside = f" over {gqa.name}" if several else ""
        _line(axes, measured, f"{m2la.name}{beside}", style)
        told = [n for n in both if all(MOVED in one.decode[n] for one in (m2la, gqa))]
        if told:
            moved = [_ratio(gqa, m2la, n, MOVED) for n in told]
            label = "bytes that a step reads, GQA over M²LA (computed)"
            # A line of one length is none: a dash stands for it.
            line = "--" if len(told) > 1 else "_"
            axes.plot(told, moved, line, color=style[0], linewidth=1, label=label)
    axes.axhline(1, color="#656a72", linewidth=0.8)
    if ratios:
        _hollow(axes, ratios, "m2la", "paper (H200)")
    axes.set_ylim(bottom=0)
    _legend(axes, "below")
    return figure


def _pairs(data: Efficiency) -> Iterable[tuple[Series, Series, tuple[str, str]]]:
    """Each series of M²LA with that GQA of its size, run alike, of most lengths in common."""
    grouped = [series for series in data.series if series.attention == "gqa"]
    for series, style in _styled(data):
        if series.attention != "m2la":
            continue
        alike = [one for one in grouped if one.way == series.way and _is_alike(one, series)]
        common = [len(one.decode.keys() & series.decode.keys()) for one in alike]
        if any(common):
            yield series, alike[common.index(max(common))], style


def _is_alike(one: Series, other: Series) -> bool:
    """Whether two models are of one size, as far as they say."""
    small, large = sorted((one.parameters, other.parameters))
    return not small or large <= SIZE_SPREAD * small


def _ratio(one: Series, other: Series, context: int, name: str) -> float:
    return float(one.decode[context][name]) / float(other.decode[context][name])


def _legend(axes: Axes, place: str = "best") -> None:
    """A legend, below the figure where it would cover much of it or is asked to be there."""
    named = zip(*axes.get_legend_handles_labels(), strict=True)
    # Bars before what is marked beside them; matplotlib has them last.
    ordered = sorted(named, key=lambda one: not isinstance(one[0], BarContainer))
    if not ordered:
        return
    handles = [handle for handle, _ in ordered]
    labels = [textwrap.fill(told, WIDEST, subsequent_indent="    ") for _, told in ordered]
    half = (len(labels) + 1) // 2
    columns = (labels[:half], labels[half:])
    width = sum(max(map(len, column), default=0) for column in columns)
    options: dict[str, Any] = {"loc": place}
    if len(labels) > CROWD or max(map(len, labels)) > LONG or place == "below":
        options = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.16)}
        options["ncols"] = 2 if width <= WIDE else 1
    axes.legend(handles, labels, fontsize=7, frameon=False, **options)


def _canvas(data: Efficiency, title: str, beside: Iterable[int] = ()) -> tuple[Figure, Axes]:
    """An empty figure over all lengths, and those of the paper's points beside ours."""
    figure = Figure(figsize=(5.2, 3.4))
    axes = figure.subplots()
    labels = f" ({', '.join(data.labels)})" if data.labels else ""
    about = _plain(f"{', '.join(data.devices)}{labels}")
    axes.set_title(f"{title}\n{about}", fontsize=8, loc="left")
    axes.set_xlabel("context, tokens", fontsize=8)
    axes.set_xscale("log", base=2)
    shown = sorted({*data.contexts, *beside})
    axes.set_xticks(_apart_by(shown, LEAST_STEP))
    # Crosses at the foot have no height, and a single length no width: matplotlib's own choice of
    # limits then leaves nothing to see.
    axes.set_xlim(shown[0] / MARGIN, shown[-1] * MARGIN)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _tokens(n)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(which="both", labelsize=7)
    axes.grid(visible=True, axis="y", color="#e3e4e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _styled(data: Efficiency) -> Iterable[tuple[Series, tuple[str, str]]]:
    for series in data.series:
        turn, colour = divmod(series.number, len(COLOURS))
        yield series, (COLOURS[colour], MARKERS[(series.number + turn) % len(MARKERS)])


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
    told = " ".join(text.split()).replace("$", r"\$")
    # What begins with an underscore has no place in a legend of matplotlib's.
    return f" {told}" if told.startswith("_") else told


def _apart_by(values: Sequence[int], factor: float) -> list[int]:
    """Those of ascending values that are far enough from the one before."""
    found: list[int] = []
    for value in values:
        if not found or value >= factor * found[-1]:
            found.append(value)
    return found


Crosses = tuple[list[int], str, str]
"""Lengths that could not be run, whose and why, and a colour."""


def _told_absent(series: Series) -> dict[str, list[int]]:
    """Lengths that a device could not run, by reason."""
    by_reason: dict[str, list[int]] = {}
    for context, reason in sorted(series.absent.items()):
        if reason != NOT_POSSIBLE:
            by_reason.setdefault(reason, []).append(context)
    return by_reason


def _absences(data: Efficiency) -> list[Crosses]:
    return [
        (contexts, f"{series.name}: {reason}", colour)
        for series, (colour, _) in _styled(data)
        for reason, contexts in _told_absent(series).items()
    ]


def _mark_absences(axes: Axes, crosses: Sequence[Crosses]) -> None:
    """Crosses at the foot of a figure with a log axis, each series' above the one before."""
    if not crosses:
        return
    step = min(STEP, CROSSES / len(crosses))
    for row, (contexts, label, colour) in enumerate(crosses):
        _crosses(axes, contexts, FOOT + row * step, _plain(label), colour)
    # Room for them below what was measured.
    low, high = axes.get_ylim()
    axes.set_ylim(bottom=high * (low / high) ** (1 / (1 - len(crosses) * step)))


def _crosses(axes: Axes, places: Sequence[float], height: float, label: str, colour: str) -> None:
    at_foot: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "color": colour}
    axes.plot(places, [height] * len(places), "x", markersize=5, label=label, **at_foot)


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
    """The paper's points, hollow."""
    for attention, points in _paper()["decode_tokens_per_s"].items():
        _hollow(axes, points, attention, f"paper, {ATTENTION[attention]} (H200)")


def _overlaid_absence() -> Crosses:
    """From where on the paper ran out of memory."""
    start = _paper()["gqa_out_of_memory_from"]
    label = f"paper, GQA: out of memory from {_tokens(start)}"
    return [start], label, PAPER_STYLE["gqa"][0]


def _overlay_replies(axes: Axes, data: Efficiency) -> None:
    """Seconds of the paper's replies, hollow, beside replies of their length."""
    paper = _paper()
    if {one.reply_tokens for one in data.series if one.decode} != {paper["reply_tokens"]}:
        return
    computed = f"H200, computed: {_tokens(paper['reply_tokens'])} over its tok/s"
    for attention, points in paper["decode_tokens_per_s"].items():
        known = {
            data.contexts.index(int(n)): paper["reply_tokens"] / rate
            for n, rate in points.items()
            if int(n) in data.contexts
        }
        label = f"paper, {ATTENTION[attention]} ({computed}), reply alone"
        _hollow(axes, known, attention, label)
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
            elif context in series.decode:
                cells = _cells(series, context)
            else:
                continue  # a length of other series
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    if any("peak_resident_bytes" in row for one in data.series for row in one.cache.values()):
        lines += ["", "Peak memory on a CPU is the whole process's, up to then."]
    if data.codes > 1:
        lines += [
            "",
            f"By {data.codes} versions of the code or its packages; "
            "each row of measurements.jsonl says which.",
        ]
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
