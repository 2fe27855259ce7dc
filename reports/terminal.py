"""The leaderboard, and reports written in Markdown, in the terminal."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markdown import Markdown
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from internvideo3.reports import wording
from internvideo3.reports.summary import (
    Cell,
    Comparison,
    Reading,
    Summary,
    System,
    readings,
    summarise_paths,
)

_LEAST_NAME, _WIDTH, _CHANCE_WIDTH = 18, len("unreadable:"), len("chance")
"""Fewest characters of suites' names, of one system's scores, of chance."""
_NOWHERE, _SPACE, _BRACKET = r"(?!)", " ", r" (?=[(\[{])"
"""Where texts are broken; the last is before an interval."""
_FRAME = 3
"""Characters between two columns."""


def print_report(runs: Sequence[Path], *, console: Console | None = None) -> None:
    """Print the leaderboard and the paired differences of runs.

    Raises:
        RunError: A folder that cannot be read as a run.
    """
    show(summarise_paths(runs), console or Console())


def show(summary: Summary, console: Console) -> None:
    """Print a summary; the leaderboard in the form that fits the terminal."""
    wide = leaderboard(summary)
    unbounded = console.options.update(max_width=10_000)
    fits = Measurement.get(console, unbounded, wide).maximum <= console.width
    if fits:
        console.print(wide)
    else:
        # As many systems side by side as have room for their numbers.
        titles = [len(wording.suite_title(suite.name)) for suite in summary.suites]
        names = min(max(titles, default=0), max(_LEAST_NAME, console.width // 4))
        room = console.width - names - _CHANCE_WIDTH - 3 * _FRAME
        for systems in _batches(summary.systems, room // (_WIDTH + _FRAME)):
            console.print(by_suite(summary, systems, names))
    if any(suite.comparisons for suite in summary.suites):
        console.print(differences(summary))
    for line in footnotes(summary):
        console.print(Text(wording.printable(line), style="dim"))


def _batches(systems: Sequence[System], size: int) -> Iterator[Sequence[System]]:
    """Systems in groups of about equal size, none larger than `size`."""
    count = -(-len(systems) // max(1, size))
    each = -(-len(systems) // count)
    yield from (systems[at : at + each] for at in range(0, len(systems), each))


def leaderboard(summary: Summary) -> Table:
    """Return the table of systems by suites; scores in percent with 95 % intervals."""
    table = Table(title=_title(summary), title_justify="left")
    table.add_column("system", no_wrap=True)
    for suite in summary.suites:
        table.add_column(f"{wording.suite_title(suite.name)}\n{suite.metric}", justify="right")
    table.add_column("Mean\nof suites", justify="right")
    for system in summary.systems:
        cells = [_cell(suite.cells.get(system.name)) for suite in summary.suites]
        table.add_row(_name(system), *cells, _mean(summary, system))
    chances = [Text(wording.percent(suite.chance), style="dim") for suite in summary.suites]
    table.add_row(Text("chance", style="dim"), *chances, "")
    return table


def by_suite(summary: Summary, systems: Sequence[System], names: int) -> Table:
    """Return the same table with a row for each suite, for terminals of 80 columns.

    Args:
        summary: what to show.
        systems: its columns.
        names: characters of the first column.
    """
    table = Table(title=_title(summary), title_justify="left")
    table.add_column("suite", width=names, overflow="fold")
    for system in systems:
        table.add_column(_name(system), justify="right", overflow="fold")
    table.add_column(Text("chance", style="dim"), justify="right", no_wrap=True)
    for suite in summary.suites:
        cells = [_cell(suite.cells.get(system.name)) for system in systems]
        chance = Text(wording.percent(suite.chance), style="dim")
        name = Text(wording.suite_title(suite.name)).append(f"\n{suite.metric}", style="dim")
        table.add_row(name, *cells, chance)
    means = [_mean(summary, system) for system in systems]
    table.add_row("Mean of suites", *means, "", style="bold")
    return table


def differences(summary: Summary) -> Table:
    """Return the table of paired differences, a block for each pair and a row for each suite."""
    label = " · ".join(summary.labels)
    title = "Paired differences, percentage points" + (f" ({label})" if label else "")
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for name in ("difference", "95 % interval", "won", "lost", "McNemar p", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in dict.fromkeys(c.name for suite in summary.suites for c in suite.comparisons):
        table.add_section()
        table.add_row(Text(wording.printable(pair), style="bold"))
        for suite, c in _of_pair(summary, pair):
            table.add_row(f" {wording.suite_title(suite)}", *_difference(c))
        mean = summary.mean_difference(pair)
        if mean:
            numbers = wording.points(mean.mean), wording.signed_span(mean)
            table.add_row(" Mean of suites", *numbers, "", "", "", str(mean.n), style="bold")
    return table


def _of_pair(summary: Summary, pair: str) -> list[tuple[str, Comparison]]:
    return [(s.name, c) for s in summary.suites for c in s.comparisons if c.name == pair]


def _difference(comparison: Comparison) -> list[str]:
    d = comparison.difference
    return [
        wording.points(d.interval.mean),
        wording.signed_span(d.interval),
        str(d.wins),
        str(d.losses),
        wording.p_value(d),
        str(d.interval.n),
    ]


def footnotes(summary: Summary) -> list[str]:
    """Return what a reader must know beside the tables: counts, labels, damage."""
    lines = [
        "Intervals: 95 %, bootstrap over videos. "
        "≈: not above chance and the controls that hide the video."
        + (" †: see the notes." if summary.caveats else "")
    ]
    for one in readings(summary):
        line = f"{one.system.name}: {one.n} answers, {one.unreadable} unreadable"
        line += f", {one.errors} failed"
        judge = f"; judge needed: {one.judge_needed} (`internvideo3 judge`)"
        line += judge if one.judge_needed else ""
        lines.append(line + _unanswered(one))
    return lines + list(summary.notes)


def _unanswered(reading: Reading) -> str:
    """What of a command is left, e.g. "; 1 suite incomplete, 5 not begun"."""
    count, kinds = reading.incomplete, []
    if count:
        kinds.append(f"{count} suite{'s' * (count > 1)} incomplete")
    if reading.not_begun:
        kinds.append(f"{reading.not_begun} not begun")
    return f"; {', '.join(kinds)}" if kinds else ""


def _title(summary: Summary) -> str:
    label = " · ".join(summary.labels)
    return f"Leaderboard ({label})" if label else "Leaderboard"


def _name(system: System) -> Text:
    name = Text(wording.printable(system.name), style="dim" if system.is_control else "bold")
    return name.append(f" {system.label}", style="yellow") if system.label else name


def _cell(cell: Cell | None) -> Text:
    if cell is None:
        return Text("–", style="dim")
    text = Text(wording.marked(cell), style="dim" if cell.above_floor is False else "")
    note = wording.span(cell.interval) if cell.interval else cell.instead or "no interval"
    return text.append(f"\n{note}", style="dim").append("" if cell.complete else "\nincomplete")


def _mean(summary: Summary, system: System) -> Text:
    mean = summary.mean(system.name)
    if mean is None:
        return Text("–", style="dim")
    return Text(wording.percent(mean.mean)).append(f"\n{wording.span(mean)}", style="dim")


def print_markdown(text: str, *, console: Console | None = None) -> None:
    """Print a report; as it stands where nobody reads it in a terminal, so that it can be piped.

    Tables are drawn. One that is too wide, even with intervals below their values, becomes a
    list: a cell cut short is worth nothing.
    """
    console = console or Console()
    if not console.is_terminal:
        console.file.write(text if text.endswith("\n") else f"{text}\n")
        return
    text = "\n".join(map(wording.printable, text.splitlines()))
    lines, done = text.splitlines(), 0
    tokens = MarkdownIt().enable("table").parse(text)
    for at, token in enumerate(tokens):
        if token.type == "table_open" and token.map:
            first, last = token.map
            console.print(Markdown("\n".join(lines[done:first])))
            _print_table(_cells(tokens[at:]), console)
            done = last
    console.print(Markdown("\n".join(lines[done:])))


def _cells(tokens: Sequence[Token]) -> list[list[str]]:
    """Rows of the table with which tokens begin, its header's first; without marks."""
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "table_close":
            break
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            rows[-1].append("".join(child.content for child in token.children or ()))
    return rows


def _drawn(rows: Sequence[Sequence[str]], width: int, heads: str, cells: str) -> Table | None:
    """A table whose first column is folded between words and whose others are not.

    Args:
        rows: header and body.
        width: characters of a line.
        heads: pattern of the spaces at which the header of the others is broken.
        cells: of those at which their numbers are.

    Returns:
        The table, or None if a cell would have to be cut.
    """
    broken = [
        [first, *(re.sub(cells if at else heads, "\n", cell) for cell in rest)]
        for at, (first, *rest) in enumerate(rows)
    ]
    columns = list(zip(*broken, strict=True))
    needed = [_width(cell for text in column for cell in text.split("\n")) for column in columns]
    room = width - sum(needed[1:]) - 2 * len(columns)
    if room < _width(word for cell in columns[0] for word in cell.split()):
        return None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(Text(columns[0][0]), width=min(room, needed[0]))
    for column, fixed in zip(columns[1:], needed[1:], strict=True):
        table.add_column(Text(column[0]), width=fixed, justify="right")
    for row in broken[1:]:
        table.add_row(*map(Text, row))
    return table


def _width(texts: Iterable[str]) -> int:
    """Cells of the terminal that the widest of these takes; some characters take two."""
    return max(map(cell_len, texts), default=0)


def _print_table(rows: Sequence[Sequence[str]], console: Console) -> None:
    for breaks in ((_NOWHERE, _NOWHERE), (_SPACE, _NOWHERE), (_SPACE, _BRACKET)):
        table = _drawn(rows, console.width, *breaks)
        if table is not None:
            console.print(table)
            return
    names, *body = rows
    width = _width(names)
    for first, *rest in body:
        console.print(Text(f"\n{first}", style="bold"))
        for name, cell in zip(names[1:], rest, strict=True):
            if cell != "–":
                console.print(Text(f"  {set_cell_size(name, width)}  {cell}"))
    console.print()
