"""Tables 2, 3 and 4 of the paper with the rows of our runs beside the paper's, as data.

A cell of ours says whether it can be set beside the paper's number, and if not, why: another number
of questions, other frames, a control, or a column whose own meaning is not settled.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvideo3.reports.summary import Cell, Summary, System
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS

PAPER = Path(__file__).parent / "paper.json"
AVERAGE = "Short QA Avg."
"""A column of table 3 that is the mean of the others."""
OF_THE_PAPER = "InternVideo3"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperRow:
    """A model as the paper prints it."""

    model: str
    group: str
    """`proprietary` or `open-weight`."""
    scores: Mapping[str, float | None]
    """Percent, by column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OurCell:
    """One of our numbers in a column of the paper."""

    suite: str
    cell: Cell
    metric: str
    source: str
    """Where the settings under which it was measured are written down."""
    reasons: tuple[str, ...]
    """Why it cannot be set beside the paper's number; empty if it can."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OurRow:
    """One of our systems."""

    system: System
    cells: Mapping[str, OurCell]
    """By column; columns that were not run are absent."""
    average: float | None
    """The mean of the columns, where the table prints one and all were run; a fraction."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """One table of the paper."""

    number: int
    title: str
    columns: tuple[str, ...]
    paper: tuple[PaperRow, ...]
    ours: tuple[OurRow, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """All reasons in the table → their number in its foot, from 1."""
        cells = (cell for row in self.ours for cell in row.cells.values())
        every = dict.fromkeys(reason for cell in cells for reason in cell.reasons)
        return {reason: number for number, reason in enumerate(every, start=1)}

    def marks(self, one: OurCell) -> list[int]:
        """The numbers of a score's reasons, in order."""
        return sorted(self.reasons[why] for why in one.reasons)

    @property
    def name(self) -> str:
        """Its heading."""
        return f"Table {self.number}: {self.title}"


def tables(summary: Summary) -> list[Table]:
    """The paper's tables that any run has a column of, in order."""
    recorded = json.loads(PAPER.read_text(encoding="utf-8"))
    found = [_table(entry, summary) for entry in recorded["tables"]]
    return [table for table in found if table.ours]


def source() -> str:
    """Where the paper's rows are from."""
    return str(json.loads(PAPER.read_text(encoding="utf-8"))["source"])


def _table(entry: Mapping[str, Any], summary: Summary) -> Table:
    columns, number = tuple(entry["columns"]), int(entry["number"])
    rows = [_row(system, summary, number, columns) for system in summary.systems]
    return Table(
        number=number,
        title=str(entry["title"]),
        columns=columns,
        paper=tuple(
            PaperRow(model=row["model"], group=row["group"], scores=row["scores"])
            for row in entry["rows"]
        ),
        ours=tuple(row for row in rows if row.cells),
    )


def _row(system: System, summary: Summary, number: int, columns: Sequence[str]) -> OurRow:
    cells = dict(_cells(system, summary, number))
    single = [column for column in columns if column != AVERAGE]
    found = [cells[column].cell.value if column in cells else None for column in single]
    values = [value for value in found if value is not None]
    whole = AVERAGE in columns and len(values) == len(single)
    return OurRow(system=system, cells=cells, average=sum(values) / len(values) if whole else None)


def _cells(system: System, summary: Summary, number: int) -> Iterator[tuple[str, OurCell]]:
    for suite in summary.suites:
        benchmark = BENCHMARKS.get(suite.name)
        cell = suite.cells.get(system.name)
        if benchmark is None or cell is None or benchmark.column is None:
            continue
        table, column = benchmark.column
        if table == number:
            suites = system.run.meta.get("suites", {})
            yield (
                column,
                OurCell(
                    suite=suite.name,
                    cell=cell,
                    metric=suite.metric,
                    source=str(suites.get(suite.name, {}).get("protocol", {}).get("source", "")),
                    reasons=tuple(_reasons(system, suite.name, cell)),
                ),
            )


def _reasons(system: System, suite: str, cell: Cell) -> Iterator[str]:
    verdict = system.run.meta.get("comparable", {})
    recorded = verdict.get("suites", {}).get(suite)
    if recorded is not None:
        yield from recorded["reasons"]
    elif not verdict.get("paper"):
        yield str(verdict.get("reason") or "the run does not say that it is")
    if not cell.complete:
        yield f"{cell.n} of {cell.expected} questions are answered so far"
    if cell.caveat:
        yield cell.caveat
    if cell.no_value:
        yield f"{cell.no_value} answers are left out: only a judge or a hidden truth could tell"
    for judge in cell.judges:
        yield f"answers are judged by {judge}, which is not the official judge"
    if cell.errors:
        yield f"{cell.errors} samples failed and count as wrong"
