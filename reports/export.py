"""The report as CSV: one row per system, suite and group, with every number unrounded."""

import csv
import io
from collections.abc import Iterator

from internvideo3.reports.summary import Cell, SuiteSummary, Summary, System

COLUMNS = (
    *("system", "model", "label", "control", "run", "suite", "metric", "group", "name"),
    *(
        "value",
        "low",
        "high",
        "se",
        "n",
        "scored",
        "videos",
        "unreadable",
        "errors",
        "plain",
        "chance",
    ),
)
_OF_THE_SUITE = (
    *("system", "model", "label", "control", "run", "suite", "group", "name", "n", "videos"),
)
"""Columns that a further number of a benchmark has too."""


def render(summary: Summary) -> str:
    """Return the whole file; values are fractions, empty where there is none."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for suite in summary.suites:
        for system in summary.systems:
            writer.writerows(_rows(suite, system))
    return out.getvalue()


def _rows(suite: SuiteSummary, system: System) -> Iterator[dict[str, object]]:
    whole = suite.cells.get(system.name)
    if whole is not None:
        yield _row(suite, system, "suite", suite.name, whole, suite.chance)
    for group, names, cells in (
        ("family", suite.families, suite.by_family),
        ("length_s", suite.bands, suite.by_length),
    ):
        for name in names:
            cell = cells.get((system.name, name))
            if cell is not None:
                yield _row(suite, system, group, name, cell, suite.family_chance.get(name))
    if whole is not None:
        for name, number in whole.further.items():
            shared = {key: "" for key in COLUMNS if key not in _OF_THE_SUITE}
            yield _row(suite, system, "further", name, whole, None) | shared | {"value": number}


def _row(
    suite: SuiteSummary, system: System, group: str, name: str, cell: Cell, chance: float | None
) -> dict[str, object]:
    return {
        "system": inert(system.name),
        "model": inert(system.model),
        "label": system.label or "",
        "control": system.control or "",
        "run": inert(system.run.id),
        "suite": inert(suite.name),
        "metric": suite.metric,
        "group": group,
        "name": inert(name),
        "value": cell.value,
        "low": cell.interval.low if cell.interval else None,
        "high": cell.interval.high if cell.interval else None,
        "se": cell.interval.se if cell.interval else None,
        "n": cell.n,
        "scored": cell.scored,
        "videos": cell.videos,
        "unreadable": cell.unreadable,
        "errors": cell.errors,
        "plain": cell.plain,
        "chance": chance,
    }


def inert(text: str) -> str:
    """Return text so that it keeps spreadsheets from reading a name as a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
