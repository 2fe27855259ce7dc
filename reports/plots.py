"""Figures as SVG that follows the page: its colours, its font, light and dark.

Matplotlib draws with placeholder colours; they become CSS variables with the light palette as the
fallback, so that the same picture is right inside the page and as a file of its own. Series differ
by marker shape as well as by colour. The palette is distinguishable with red-green blindness
(after Okabe and Ito, "Color Universal Design", 2008).
"""

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from internvideo3.reports import wording

INK, MUTED, GRID, SURFACE, CONTROL = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = ("#0a0001", "#0a0002", "#0a0003", "#0a0004", "#0a0005", "#0a0006")
CSS = {
    INK: "var(--ink, #1c1e21)",
    MUTED: "var(--muted, #656a72)",
    GRID: "var(--grid, #e3e4e6)",
    SURFACE: "var(--surface, #ffffff)",
    CONTROL: "var(--control, #8b9098)",
    SERIES[0]: "var(--s0, #2f6db5)",
    SERIES[1]: "var(--s1, #cf5a1f)",
    SERIES[2]: "var(--s2, #15836f)",
    SERIES[3]: "var(--s3, #a2478f)",
    SERIES[4]: "var(--s4, #8f6a00)",
    SERIES[5]: "var(--s5, #4d5a96)",
}
MARKERS = ("o", "D", "s", "^", "v", "P")
WIDTH_IN = 3.7
LABEL_IN = 1.2
LABEL_CHARACTERS = 18
"""Widest line of a row's label; longer ones are broken, at most to `LABEL_LINES`."""
LABEL_LINES = 3
TITLE_CHARACTERS = 42
"""Longest title in full size; longer ones are set smaller."""


@dataclass(frozen=True, slots=True)
class Style:
    """How one series looks."""

    colour: str
    """A placeholder colour of this file."""
    marker: str
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Point:
    """One estimate with its interval, in percent or points; `low` is `None` without one."""

    series: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """The points that share a row (or a column) of a figure."""

    label: str
    points: tuple[Point, ...]
    chance: float | None = None


@dataclass(frozen=True, slots=True)
class Plot:
    """A finished figure."""

    name: str
    """File name without ending, unique in a report."""
    title: str
    svg: str
    """A stand-alone SVG document."""


def styles(names: Sequence[str], controls: Sequence[str]) -> dict[str, Style]:
    """Give every system a style; controls are grey and hollow, each of a shape of its own."""
    given: dict[str, Style] = {}
    for name in names:
        index = sum(s.hollow == (name in controls) for s in given.values()) % len(SERIES)
        if name in controls:
            given[name] = Style(CONTROL, MARKERS[index], hollow=True)
        else:
            given[name] = Style(SERIES[index], MARKERS[index])
    return given


def dots(name: str, title: str, groups: Sequence[Group], looks: dict[str, Style]) -> Plot:
    """Draw one row per group: estimates with whiskers from 0 to 100, chance as a tick."""
    with _canvas(0.6 + 0.4 * len(groups), label_in=LABEL_IN) as (figure, axes):
        for row, group in enumerate(groups):
            y = len(groups) - 1 - row
            _points(axes, group.points, y, looks, horizontal=True)
            if group.chance is not None:
                axes.plot([group.chance] * 2, [y - 0.36, y + 0.36], color=MUTED, lw=1.1, ls=":")
        axes.set_yticks(range(len(groups)), [_broken(g.label) for g in reversed(groups)])
        axes.set_ylim(-0.6, len(groups) - 0.4)
        axes.set_xlim(-2, 102)
        axes.set_xticks(range(0, 101, 25))
        axes.grid(axis="x", color=GRID, lw=0.8)
        _left_title(figure, title)
        return _finish(figure, name, title)


def lines(
    name: str, title: str, groups: Sequence[Group], looks: dict[str, Style], y_label: str = ""
) -> Plot:
    """Draw one column per group, each series joined by a line, from 0 to 100."""
    with _canvas(2.15) as (figure, axes):
        for column, group in enumerate(groups):
            _points(axes, group.points, column, looks, horizontal=False)
            if group.chance is not None:
                axes.plot([column - 0.4, column + 0.4], [group.chance] * 2, color=MUTED, lw=1.1,
                          ls=":")  # fmt: skip
        for series, look in looks.items():
            xy = [
                (column + _offset(i, len(group.points)), point.value)
                for column, group in enumerate(groups)
                for i, point in enumerate(group.points)
                if point.series == series
            ]
            axes.plot(*zip(*xy, strict=True), color=look.colour, lw=1.1, alpha=0.55) if xy else None
        axes.set_xticks(range(len(groups)), [g.label for g in groups])
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylim(-2, 102)
        axes.set_yticks(range(0, 101, 25))
        axes.grid(axis="y", color=GRID, lw=0.8)
        _left_title(figure, title)
        return _finish(figure, name, title)


def forest(
    name: str,
    title: str,
    groups: Sequence[Group],
    looks: dict[str, Style],
    tolerance: float | None = None,
) -> Plot:
    """Draw differences in points around 0, one row per group, a dashed line at the tolerance."""
    with _canvas(0.6 + 0.45 * len(groups), label_in=LABEL_IN) as (figure, axes):
        for row, group in enumerate(groups):
            _points(axes, group.points, len(groups) - 1 - row, looks, horizontal=True)
        ends = [
            v for g in groups for p in g.points for v in (p.value, p.low, p.high) if v is not None
        ]
        reach = max([5.0, *(abs(v) for v in ends)]) * 1.08
        axes.axvline(0, color=INK, lw=0.9)
        if tolerance is not None:
            axes.axvline(-tolerance, color=MUTED, lw=0.9, ls=(0, (3, 3)))
        axes.set_xlim(-reach, reach)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g}".replace("-", "−")
                                                     if v else "0"))  # fmt: skip
        axes.set_yticks(range(len(groups)), [_broken(g.label) for g in reversed(groups)])
        axes.set_ylim(-0.6, len(groups) - 0.4)
        axes.grid(axis="x", color=GRID, lw=0.8)
        _left_title(figure, title)
        return _finish(figure, name, title)


def curves(
    name: str,
    title: str,
    series: dict[str, Sequence[tuple[float, float]]],
    looks: dict[str, Style],
    *,
    log: bool,
) -> Plot:
    """Draw quantities over the context length; `log` makes the quantity's axis logarithmic."""
    with _canvas(2.15, label_in=0.5, foot_in=0.42) as (figure, axes):
        for label, xy in series.items():
            look = looks[label]
            axes.plot(*zip(*sorted(xy), strict=True), color=look.colour, marker=look.marker, lw=1.3,
                      markersize=4.8, markeredgewidth=0)  # fmt: skip
        axes.set_xscale("log", base=2)
        ticks = sorted({x for xy in series.values() for x, _ in xy})
        axes.set_xticks(ticks, [_tokens(t) for t in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        top = max(y for xy in series.values() for _, y in xy)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(0, top * 1.12)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: wording.quantity(v)))
        axes.set_xlabel("context, tokens", color=MUTED, fontsize=8)
        axes.grid(color=GRID, lw=0.8)
        _left_title(figure, title)
        return _finish(figure, name, title)


def profiles(
    name: str, title: str, series: dict[str, Sequence[float]], *, x_label: str, whole: bool = False
) -> Plot:
    """Draw quantities over layers or frequencies, 0 at the left, with a legend of its own.

    Args:
        name: file name of the figure.
        title: its title.
        series: label to values.
        x_label: what is counted along the x axis.
        whole: whether the y axis ends at 1.
    """
    looks = styles([*series], [])
    with _canvas(2.4, label_in=0.5, foot_in=0.42) as (figure, axes):
        for label, values in series.items():
            look = looks[label]
            axes.plot(range(len(values)), values, color=look.colour, marker=look.marker, lw=1.3,
                      markersize=3.6, markeredgewidth=0, label=label)  # fmt: skip
        top = 1.0 if whole else max(max(values) for values in series.values())
        # Above the curves there is room for the legend, a tenth for each line.
        axes.set_ylim(0, 1.05 * top / (1 - 0.1 * len(series)) or 1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_label, color=MUTED, fontsize=8)
        axes.grid(color=GRID, lw=0.8)
        axes.legend(loc="upper left", frameon=False, fontsize=8, labelcolor=MUTED, borderpad=0.1)
        _left_title(figure, title)
        return _finish(figure, name, title)


def inline(plot: Plot, classes: dict[str, str]) -> str:
    """Return the figure for a page whose content policy forbids style attributes.

    Every style attribute becomes a class; `classes` (declarations → class name) collects them.
    """

    def to_class(match: re.Match[str]) -> str:
        name = classes.setdefault(match.group(1).strip().rstrip(";"), f"p{len(classes)}")
        return f'class="{name}"'

    body = plot.svg[plot.svg.index("<svg") :]
    body = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    return re.sub(r'style="([^"]*)"', to_class, body)


@contextmanager
def _canvas(
    height_in: float, *, label_in: float = 0.42, foot_in: float = 0.22
) -> Iterator[tuple[Figure, Axes]]:
    """Yield a bare figure; margins are fixed in inches so that neighbouring figures line up."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "internvideo3",
        "font.size": 8.5,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH_IN, height_in))
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        figure.subplots_adjust(
            left=label_in / WIDTH_IN,
            right=1 - 0.12 / WIDTH_IN,
            top=1 - 0.3 / height_in,
            bottom=foot_in / height_in,
        )
        axes.patch.set_visible(False)
        axes.spines[:].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, colors=MUTED, labelsize=8.5)
        axes.tick_params(axis="y", labelsize=8)
        yield figure, axes


def _offset(index: int, count: int) -> float:
    """Return where the index-th of several points sits beside their common position."""
    return (index - (count - 1) / 2) * min(0.2, 0.7 / max(1, count))


def _points(
    axes: Axes, points: Sequence[Point], at: float, looks: dict[str, Style], *, horizontal: bool
) -> None:
    """Draw the points of a group beside one another, around position `at`."""
    for i, point in enumerate(points):
        offset = _offset(i, len(points)) * (-1 if horizontal else 1)
        look = looks[point.series]
        place = [at + offset] * 2
        if point.low is not None and point.high is not None:
            ends = [point.low, point.high]
            xy = (ends, place) if horizontal else (place, ends)
            axes.plot(*xy, color=look.colour, lw=1.6, alpha=0.5, solid_capstyle="round")
        where = (point.value, place[0]) if horizontal else (place[0], point.value)
        axes.plot(*where, marker=look.marker, color=look.colour, markersize=4.8,
                  markerfacecolor=SURFACE if look.hollow else look.colour,
                  markeredgewidth=1.1 if look.hollow else 0)  # fmt: skip


def _broken(label: str) -> str:
    """Return a row's label in lines that the margin holds; what is too long ends in an ellipsis."""
    lines = textwrap.wrap(label, LABEL_CHARACTERS, max_lines=LABEL_LINES, placeholder=" …")
    return "\n".join(lines)


def _left_title(figure: Figure, title: str) -> None:
    size = 9.5 * min(1.0, TITLE_CHARACTERS / max(1, len(title)))
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=size, fontweight="bold")


def _tokens(count: float) -> str:
    return f"{count / 1024:g}k" if count >= 1024 and count % 1024 == 0 else f"{count:g}"


def _finish(figure: Figure, name: str, title: str) -> Plot:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: ui-sans-serif, system-ui, sans-serif", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<g/>|<g>\s*</g>", "", svg)
    for placeholder, css in CSS.items():
        svg = svg.replace(placeholder, css)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\1#{name}-", svg)
    opening = f'<svg role="img" aria-label="{escape(title)}" '
    svg = re.sub(
        r"<svg (?P<rest>[^>]*)>", lambda m: opening + _unsized(m["rest"]) + ">", svg, count=1
    )
    return Plot(name, title, svg)


def _unsized(attributes: str) -> str:
    return re.sub(r'\b(?:width|height)="[^"]*"', "", attributes)
