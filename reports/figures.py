"""Which figures a report has, made from its summary."""

import re
from collections.abc import Callable, Iterator, Sequence

from internvideo3.reports import wording
from internvideo3.reports.plots import (
    Group,
    Plot,
    Point,
    Style,
    curves,
    dots,
    forest,
    lines,
    styles,
)
from internvideo3.reports.profile import Profile
from internvideo3.reports.stats import Interval
from internvideo3.reports.summary import (
    TOLERATED_LOSS,
    Cell,
    Cells,
    SuiteSummary,
    Summary,
)

NAMES = re.compile("family-.+|length-.+|differences|profile-(?:prefill|decode|cache)")
"""What the figures below are called."""


def looks(summary: Summary) -> dict[str, Style]:
    """Return how each system is drawn, the same in every figure and legend."""
    controls = [s.name for s in summary.systems if s.is_control]
    return styles([s.name for s in summary.systems], controls)


def families(summary: Summary) -> list[Plot]:
    """Return one figure per suite: score by question family."""
    given = looks(summary)
    return [
        dots(
            f"family-{suite.name}",
            _title(suite),
            _groups(summary, suite.families, suite.by_family, wording.family, suite.family_chance),
            given,
        )
        for suite in summary.suites
        if suite.scored
    ]


def lengths(summary: Summary) -> list[Plot]:
    """Return one figure per suite with more than one length band: score by video length."""
    given = looks(summary)
    return [
        lines(
            f"length-{suite.name}",
            _title(suite),
            _groups(summary, suite.bands, suite.by_length, wording.length, {}),
            given,
        )
        for suite in summary.suites
        if suite.scored and len(suite.bands) > 1
    ]


def differences(summary: Summary) -> Plot | None:
    """Return the forest of paired differences, or `None` where nothing is compared."""
    given = pair_looks(summary)
    if not given:
        return None
    groups = [
        Group(
            wording.suite_title(suite.name),
            tuple(_difference_point(c.name, c.difference.interval) for c in suite.comparisons),
        )
        for suite in summary.suites
        if suite.comparisons
    ]
    title = "Difference, percentage points"
    return forest("differences", title, groups, given, tolerance=100 * TOLERATED_LOSS)


def pair_looks(summary: Summary) -> dict[str, Style]:
    """Return how each compared pair is drawn: the colour of one, the marker of the other."""
    given = looks(summary)
    return {
        c.name: Style(given[c.b].colour, given[c.a].marker)
        for suite in summary.suites
        for c in suite.comparisons
    }


def efficiency(profile: Profile, given: dict[str, Style]) -> list[Plot]:
    """Return speed and cache over context length for the systems that were measured."""
    wanted = (
        ("prefill", "Prefill, tokens per second", profile.prefill),
        ("decode", "Decode, tokens per second", profile.decode),
        ("cache", "Cache, bytes", profile.cache),
    )
    return [
        curves(f"profile-{name}", title, {k: list(v.items()) for k, v in data.items()}, given,
               log=name == "cache")
        for name, title, data in wanted
        if data
    ]  # fmt: skip


def _title(suite: SuiteSummary) -> str:
    return f"{wording.suite_title(suite.name)}, {suite.metric}"


def _groups(
    summary: Summary,
    names: Sequence[str],
    cells: Cells,
    label: Callable[[str], str],
    chance: dict[str, float | None],
) -> list[Group]:
    groups = []
    for name in names:
        found = [(s.name, cells.get((s.name, name))) for s in summary.systems]
        points = tuple(point for series, cell in found for point in _point(series, cell))
        floor = chance.get(name)
        groups.append(Group(label(name), points, None if floor is None else 100 * floor))
    return groups


def _point(series: str, cell: Cell | None) -> Iterator[Point]:
    if cell is not None and cell.value is not None:
        low, high = (cell.interval.low, cell.interval.high) if cell.interval else (None, None)
        ends = (None if end is None else 100 * end for end in (low, high))
        yield Point(series, 100 * cell.value, *ends)


def _difference_point(series: str, interval: Interval) -> Point:
    return Point(series, 100 * interval.mean, 100 * interval.low, 100 * interval.high)
