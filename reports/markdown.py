"""The report as Markdown: leaderboard, paired differences, families, lengths, provenance."""

import re
from collections.abc import Iterable, Sequence

from internvideo3.reports import wording
from internvideo3.reports.summary import Cell, Cells, SuiteSummary, Summary, System
from internvideo3.reports.terminal import footnotes

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!])")


def render(summary: Summary, title: str) -> str:
    """Return the whole document."""
    label = " · ".join(summary.labels)
    parts = [f"# {escape(title)}"]
    if label:
        parts.append(f"**{label}**: every number below is of this kind.")
    parts += [_leaderboard(summary), _comparisons(summary)]
    for suite in summary.suites:
        parts.append(f"## {wording.suite_title(suite.name)}")
        parts.append(_further(suite))
        parts.append(_groups(suite, summary, suite.families, suite.by_family, "family"))
        parts.append(_groups(suite, summary, suite.bands, suite.by_length, "video length"))
    parts += [_provenance(summary.systems), _notes(footnotes(summary))]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """Return text that Markdown and the HTML in it show literally, on one line."""
    shown = wording.printable(" ".join(text.split()))
    return _SPECIAL.sub(r"\\\1", shown).replace("&", "&amp;")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """Return a Markdown table; the first columns are left-aligned, the others right."""
    lines = [head, [*["---"] * words, *["---:"] * (len(head) - words)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _leaderboard(summary: Summary) -> str:
    head = ["system", *(f"{wording.suite_title(s.name)} ({s.metric})" for s in summary.suites)]
    rows = []
    for system in summary.systems:
        cells = [_cell(s.cells.get(system.name)) for s in summary.suites]
        mean = summary.mean(system.name)
        total = "–" if mean is None else f"{wording.percent(mean.mean)} ({wording.span(mean)})"
        rows.append([_name(system), *cells, total])
    rows.append(["chance", *(wording.percent(s.chance) for s in summary.suites), ""])
    return "## Leaderboard\n\n" + table([*head, "mean of suites"], rows)


def _comparisons(summary: Summary) -> str:
    rows = [
        [
            escape(c.name),
            wording.suite_title(suite.name),
            wording.points(c.difference.interval.mean),
            wording.signed_span(c.difference.interval),
            str(c.difference.wins),
            str(c.difference.losses),
            wording.p_value(c.difference),
            str(c.difference.interval.n),
        ]
        for suite in summary.suites
        for c in suite.comparisons
    ]
    head = ["systems", "suite", "difference", "95 % interval", "won", "lost", "McNemar p", "n"]
    title = "## Paired differences, percentage points\n\n"
    for pair in dict.fromkeys(c.name for suite in summary.suites for c in suite.comparisons):
        if mean := summary.mean_difference(pair):
            numbers = wording.points(mean.mean), wording.signed_span(mean)
            rows.append([escape(pair), "**mean of suites**", *numbers, "", "", "", str(mean.n)])
    return title + table(head, rows, words=2) if rows else ""


def _groups(
    suite: SuiteSummary, summary: Summary, names: Sequence[str], cells: Cells, what: str
) -> str:
    systems = [s for s in summary.systems if s.name in suite.cells]
    rows = []
    for name in names:
        told = wording.length(name) if what == "video length" else wording.family(name)
        shown = escape(told)
        chance = suite.family_chance.get(name)
        rows.append(
            [shown, *(_cell(cells.get((s.name, name))) for s in systems), wording.percent(chance)]
        )
    return table([what, *map(_name, systems), "chance"], rows) if rows else ""


def _further(suite: SuiteSummary) -> str:
    lines = [
        f"- {escape(system)}: {escape('; '.join(wording.further(cell.further)))}"
        for system, cell in suite.cells.items()
        if cell.further
    ]
    return "\n".join(lines)


def _provenance(systems: Sequence[System]) -> str:
    parts = ["## Provenance"]
    for system in systems:
        meta = system.run.meta
        comparable = meta.get("comparable", {})
        verdict = "yes" if comparable.get("paper") else f"no, {comparable.get('reason')}"
        facts = {
            "run": system.run.id,
            "command": " ".join(map(str, meta.get("command", []))),
            "commit": f"{meta.get('commit')}{' (changed files)' if meta.get('dirty') else ''}",
            "weights": system.run.model.get("digest"),
            "comparable with the paper": verdict,
        }
        lines = [f"- {key}: {escape(str(value))}" for key, value in facts.items()]
        parts.append(f"**{_name(system)}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _notes(lines: Sequence[str]) -> str:
    return "## Notes\n\n" + "\n".join(f"- {escape(line)}" for line in lines)


def _name(system: System) -> str:
    return escape(system.name) + (f" *{system.label}*" if system.label else "")


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    note = f" ({wording.span(cell.interval)})" if cell.interval else ""
    value = escape(cell.instead) or f"{wording.marked(cell)}{note}"
    return value + ("" if cell.complete else " incomplete")
