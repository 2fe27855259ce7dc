"""The paper's tables with our rows as Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence

from internvideo3.reports import wording
from internvideo3.reports.export import inert
from internvideo3.reports.leaderboard import AVERAGE, OurCell, OurRow, Table, source
from internvideo3.reports.markdown import escape
from internvideo3.reports.markdown import table as markdown_table

COLUMNS = (
    *("table", "column", "system", "from", "label", "run", "suite", "metric", "value", "low"),
    *("high", "n", "unreadable", "errors", "without_value", "plain", "instead", "comparable"),
    *("reasons", "settings"),
)
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "²": r"\textsuperscript{2}", "−": "$-$", "–": "--", "≤": r"$\le$", "≥": r"$\ge$",
    "→": r"$\to$", "↔": r"$\leftrightarrow$", "…": r"\ldots{}", "≈": r"$\approx$", "\u2009": r"\,",
}  # fmt: skip
_LATEX_PATTERN = re.compile("|".join(map(re.escape, _LATEX)))
_NOTE = (
    "Intervals: 95 %, bootstrap over videos. Numbers in the foot say why a score is not comparable."
)


def markdown(tables: Sequence[Table]) -> str:
    """The tables, each with a foot and with all counts of our cells."""
    parts = ["# Beside the paper", f"Rows of the paper: {source()}. {_NOTE}"]
    for table in tables:
        parts += [f"## {table.name}", markdown_table(_head(table), _markdown_rows(table))]
        parts.append("\n".join(f"{n}. {escape(why)}" for why, n in table.reasons.items()))
        parts.append(_details(table))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(table: Table) -> list[str]:
    return ["model", *table.columns]


def _markdown_rows(table: Table) -> Iterator[list[str]]:
    for row in table.paper:
        yield [escape(row.model), *(number(row.scores[column]) for column in table.columns)]
    for ours in table.ours:
        label = f" *{ours.system.label}*" if ours.system.label else ""
        cells = [_marked(table, ours, c, "<sup>{}</sup>") for c in table.columns]
        yield [f"**{escape(ours.system.name)}**{label} (ours)", *cells]


def _details(table: Table) -> str:
    head = ("our score", "value", "95 % interval", "n", "unreadable", "failed", "no value", "plain",
            "further", "comparable", "settings from")  # fmt: skip
    rows = [
        [
            f"{escape(row.system.name)}, {column}",
            one.cell.instead or wording.percent(one.cell.value),
            interval(one),
            wording.count(one.cell.n),
            str(one.cell.unreadable),
            str(one.cell.errors),
            str(one.cell.no_value),
            wording.percent(one.cell.plain),
            escape("; ".join(wording.further(one.cell.further))),
            "no" if one.reasons else "yes",
            escape(one.source),
        ]
        for row in table.ours
        for column, one in row.cells.items()
    ]
    return markdown_table(head, rows)


FIT = r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%"
"""Before a tabular: as it is, or as wide as the text; a brace ends it."""


def latex(tables: Sequence[Table]) -> str:
    """The tables for a document that loads booktabs and graphicx; our rows below the paper's."""
    return "\n".join(line for table in tables for line in _latex_table(table))


def _latex_table(table: Table) -> Iterator[str]:
    yield f"% Rows of the paper: {source()}."
    yield r"\begin{table}\centering"
    yield rf"\caption{{{tex(table.title)} (the paper's table {table.number}, and ours)}}"
    yield FIT
    yield rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}"
    yield r"\toprule"
    yield " & ".join(map(tex, _head(table))) + r" \\"
    yield r"\midrule"
    for row in table.paper:
        scores = [number(row.scores[column]) for column in table.columns]
        yield " & ".join(map(tex, [row.model, *scores])) + r" \\"
    yield r"\midrule"
    for ours in table.ours:
        label = f" ({ours.system.label})" if ours.system.label else ""
        name = rf"\textbf{{{tex(ours.system.name)}}}{tex(label)}"
        cells = [
            _marked(table, ours, column, r"\textsuperscript{{{}}}", tex) for column in table.columns
        ]
        yield " & ".join([name, *cells]) + r" \\"
    yield r"\bottomrule"
    yield r"\end{tabular}}"
    if table.reasons:
        foot = "; ".join(f"({n}) {tex(why)}" for why, n in table.reasons.items())
        yield rf"\par\footnotesize Not comparable with the paper: {foot}."
    yield r"\end{table}"
    yield ""


def tex(text: str) -> str:
    """Text with what LaTeX would read as commands made plain."""
    return _LATEX_PATTERN.sub(lambda found: _LATEX[found.group()], text)


def _marked(
    table: Table, row: OurRow, column: str, mark: str, quote: Callable[[str], str] = str
) -> str:
    """A score of ours with its interval, and the numbers of the reasons in the foot."""
    one = row.cells.get(column)
    if one is None:
        return quote(not_run(row, column))
    numbers = ",".join(map(str, table.marks(one)))
    # A count of answers would read as one number with the marks of reasons that follow it.
    value = f"{wording.percent(one.cell.value)} ({interval(one)})"
    value = f"{one.cell.instead} " if one.cell.instead else value
    return quote(value).strip() if not numbers else quote(value) + mark.format(numbers)


def not_run(row: OurRow, column: str) -> str:
    """What stands in a column that is no benchmark of ours: the average, or nothing."""
    return wording.percent(row.average if column == AVERAGE else None)


def number(percent: float | None) -> str:
    """A score of the paper."""
    return "–" if percent is None else f"{percent:.1f}"


def interval(one: OurCell) -> str:
    """The interval of our score, if there is one."""
    return wording.span(one.cell.interval) if one.cell.interval else "no interval"


def as_csv(tables: Sequence[Table]) -> str:
    """Every score, the paper's and ours, one a row; fractions, unrounded."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        writer.writerows(_csv_rows(table))
    return out.getvalue()


FORMS: dict[str, Callable[[Sequence[Table]], str]] = {
    "md": markdown,
    "tex": latex,
    "csv": as_csv,
}
"""File ending → what writes it."""


def _csv_rows(table: Table) -> Iterator[dict[str, object]]:
    for row in table.paper:
        for column, score in row.scores.items():
            if score is not None:
                shared = {"table": table.number, "column": column, "from": "paper"}
                yield shared | {"system": inert(row.model), "value": round(score / 100, 4)}
    for ours in table.ours:
        yield from (_csv_row(table, ours, column, one) for column, one in ours.cells.items())


def _csv_row(table: Table, row: OurRow, column: str, one: OurCell) -> dict[str, object]:
    cell = one.cell
    return {
        "table": table.number,
        "column": column,
        "system": inert(row.system.name),
        "from": "run",
        "label": row.system.label or "",
        "run": inert(row.system.run.id),
        "suite": one.suite,
        "metric": one.metric,
        "value": cell.value,
        "low": cell.interval.low if cell.interval else None,
        "high": cell.interval.high if cell.interval else None,
        "n": cell.n,
        "unreadable": cell.unreadable,
        "errors": cell.errors,
        "without_value": cell.no_value,
        "plain": cell.plain,
        "instead": cell.instead,
        "comparable": not one.reasons,
        "reasons": inert("; ".join(one.reasons)),
        "settings": one.source,
    }
