"""One self-contained HTML page: no network, no style attributes, scripts by their hash only."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from internvideo3.reports import (
    browser,
    export,
    figures,
    leaderboard,
    leaderboard_formats,
    markdown,
    profile,
    wording,
)
from internvideo3.reports.load import RunError
from internvideo3.reports.plots import SERIES, Plot, Style, inline
from internvideo3.reports.summary import (
    TOLERATED_LOSS,
    Summary,
    System,
    pairs,
    readings,
    summarise_paths,
)

TEMPLATES = Path(__file__).parent / "templates"
PLOTS = "plots"
PAGE = "report.html"
BESIDE = (
    *("report.md", "leaderboard.csv"),
    *(f"tables.{name}" for name in leaderboard_formats.FORMS),
)
"""Files of a report beside its page; `plots/` has the figures."""
_OURS = b"default-src 'none'; img-src data:; style-src "
"""In every page that this room made, of any version."""


def build_report(runs: Sequence[Path], out: Path, *, title: str) -> Path:
    """Write report.html, report.md, leaderboard.csv and plots/*.svg from runs.

    Where runs have columns of the paper's tables, also tables.md, tables.tex and tables.csv. Of a
    former report there, what this one does not have is taken away.

    Args:
        runs: Run folders, the reference first.
        out: Folder to write to; made if missing.
        title: Title of the report.

    Returns:
        Path of report.html.

    Raises:
        RunError: A folder that cannot be read as a run, or a file of others where one of the
            report's would be.
    """
    check_place(out)
    summary = summarise_paths(runs)
    plots = _Plots(summary)
    beside = leaderboard.tables(summary)
    files = {f"{PLOTS}/{plot.name}.svg": plot.svg for plot in plots.all}
    files |= {"report.md": markdown.render(summary, title)}
    files |= {"leaderboard.csv": export.render(summary)}
    if beside:
        files |= {f"tables.{n}": form(beside) for n, form in leaderboard_formats.FORMS.items()}
    check_place(out, files)
    # The page first: by it the next report knows that the other files are ours.
    files = {PAGE: render(summary, plots, title), **files}
    (out / PLOTS).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        _write(out / name, text)
    for name in _former(out) - files.keys():
        (out / name).unlink()
    return out / PAGE


def check_place(out: Path, names: Iterable[str] = BESIDE) -> None:
    """Raise if a report in this folder would overwrite what is no report.

    Args:
        out: The folder; it need not be there.
        names: Files that would be written beside the page.

    Raises:
        RunError: With the files.
    """
    page = out / PAGE
    if page.is_file() and _OURS in page.read_bytes():
        return
    others = [name for name in (PAGE, *names) if (out / name).exists()]
    if others:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise RunError(
            f"{out} holds {shown}, which no report of ours wrote and which would be overwritten. "
            "Give another --out, or move them away."
        )


def _write(path: Path, text: str) -> None:
    """Write a file, all or nothing."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8", errors="replace")
    aside.replace(path)


def _former(out: Path) -> set[str]:
    """What a report of other runs may have left in a folder; a file of another kind is not in it.

    A drawing is a report's if it has the name of one, and an id that begins with it.
    """
    tables = {f"tables.{name}" for name in leaderboard_formats.FORMS}
    drawn = {
        f"{PLOTS}/{path.name}"
        for path in (out / PLOTS).glob("*.svg")
        if figures.NAMES.fullmatch(path.stem)
        and f'id="{path.stem}-' in path.read_text(encoding="utf-8", errors="replace")
    }
    return {name for name in tables if (out / name).is_file()} | drawn


class _Plots:
    """All figures of a report."""

    def __init__(self, summary: Summary):
        self.looks = figures.looks(summary)
        self.pair_looks = figures.pair_looks(summary)
        self.profile = profile.collect(summary)
        self.families = figures.families(summary)
        self.lengths = figures.lengths(summary)
        self.differences = figures.differences(summary)
        self.efficiency = figures.efficiency(self.profile, self.looks)

    @property
    def all(self) -> list[Plot]:
        one = [self.differences] if self.differences else []
        return [*self.families, *self.lengths, *one, *self.efficiency]


def render(summary: Summary, plots: _Plots, title: str) -> str:
    """Return the page."""
    classes: dict[str, str] = {}

    def draw(plot: Plot) -> Markup:
        return Markup(inline(plot, classes))

    shown = browser.collect(summary)
    drawn = {
        "families": [draw(p) for p in plots.families],
        "lengths": [draw(p) for p in plots.lengths],
        "differences": draw(plots.differences) if plots.differences else None,
        "efficiency": [draw(p) for p in plots.efficiency],
    }
    style = _file("report.css") + _plot_rules(classes)
    script = _file("report.js")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(w=wording, marker=_marker, f=leaderboard_formats)
    return environment.get_template("report.html.jinja").render(
        title=title,
        summary=summary,
        plots=drawn,
        looks=plots.looks,
        pair_looks=plots.pair_looks,
        profile=plots.profile,
        browser=shown,
        agentic=any(s.run.meta.get("mode") == "agentic" for s in summary.systems),
        tables=leaderboard.tables(summary),
        paper_source=leaderboard.source(),
        data=_json(shown.payload),
        facts=[(system, _facts(system)) for system in summary.systems],
        comparable=_comparable(summary),
        lede=_lede(summary),
        reading=readings(summary),
        profile_looks={k: v for k, v in plots.looks.items() if k in plots.profile.systems},
        tolerance=TOLERATED_LOSS,
        style=Markup(style),
        script=Markup(script),
        style_hash=_source_hash(style),
        script_hash=_source_hash(script),
    )


def _file(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _plot_rules(classes: Mapping[str, str]) -> str:
    return "".join(f".{name}{{{rules}}}\n" for rules, name in classes.items())


def _source_hash(text: str) -> str:
    """Return the content-policy source of an inline block."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _json(payload: Mapping[str, Any]) -> Markup:
    """Return JSON that cannot end its script element, whatever text it holds."""
    text = json.dumps(payload, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _marker(look: Style) -> Markup:
    """Return the legend's glyph for a style."""
    shapes = {
        "o": '<circle cx="6" cy="6" r="4.2"/>',
        "D": '<path d="M6 1 11 6 6 11 1 6z"/>',
        "s": '<path d="M2 2h8v8H2z"/>',
        "^": '<path d="M6 1.5 11 10.5H1z"/>',
        "v": '<path d="M6 10.5 1 1.5H11z"/>',
        "P": '<path d="M4.3 1h3.4v3.3H11v3.4H7.7V11H4.3V7.7H1V4.3h3.3z"/>',
    }
    name = "control" if look.hollow else f"s{SERIES.index(look.colour)}"
    return Markup(
        f'<svg class="glyph glyph-{name}" viewBox="0 0 12 12" aria-hidden="true">'
        f"{shapes[look.marker]}</svg>"
    )


def _lede(summary: Summary) -> str:
    """Return the report in two sentences: what was done, and what the conversion cost."""
    real = [s for s in summary.systems if not s.is_control]
    controls = len(summary.systems) - len(real)
    questions = sum(suite.questions for suite in summary.suites)
    videos = sum(suite.videos for suite in summary.suites)
    who = _plural(len(real), "system") + (
        f" and {_plural(controls, 'control')}" if controls else ""
    )
    first = (
        f"{who} answered {_plural(questions, 'question')} about {_plural(videos, 'video')} "
        f"in {_plural(len(summary.suites), 'suite')}."
    )
    return " ".join(filter(None, (first, _uneven(summary, real), _headline(summary))))


def _uneven(summary: Summary, systems: Sequence[System]) -> str:
    """How many questions each system answered, where they are not as many."""
    cells = {
        s.name: [t.cells[s.name] for t in summary.suites if s.name in t.cells] for s in systems
    }
    counts = {name: sum(cell.n - cell.errors for cell in own) for name, own in cells.items()}
    if len(set(counts.values())) < 2:
        return ""
    told = ", ".join(f"{name} {wording.count(count)}" for name, count in counts.items())
    return f"Not all of them: {told}; only paired differences are of the same questions."


def _headline(summary: Summary) -> str:
    for a, b in pairs(summary.systems)[:1]:
        left, right = summary.mean(a.name), summary.mean(b.name)
        if left and right:
            score = f"{b.name} scores {wording.percent(right.mean)} on average"
            against = f"{a.name} scores {wording.percent(left.mean)}"
            before, after = a.cache_bytes_per_token, b.cache_bytes_per_token
            share = ""
            if before and after and before != after:
                share = f" with {wording.percent(after / before, 0)} % of the cache"
            difference = summary.mean_difference(f"{b.name} − {a.name}")
            sure = (
                f" The paired difference is {wording.points(difference.mean)} points "
                f"(95 % interval {wording.signed_span(difference)})."
                if difference
                else ""
            )
            return f"{score}{share}; {against}.{sure}"
    return ""


def _plural(number: int, noun: str) -> str:
    return f"{wording.count(number)} {noun}{'' if number == 1 else 's'}"


def _comparable(summary: Summary) -> list[tuple[str, str]]:
    """Return why numbers cannot be set beside the paper's, as (reason, of which suites).

    No suites are named where it holds for everything.
    """
    found: dict[str, set[str]] = {}
    ran: set[str] = set()
    for system in summary.systems:
        meta = system.run.meta
        verdict = meta.get("comparable", {})
        suites = verdict.get("suites") or {}
        names = set(suites) or set(system.run.samples)
        ran |= names
        for name in sorted(names):
            own = suites.get(name, {}).get("reasons", ()) if suites else ()
            whole = () if suites or verdict.get("paper") else (_verdict(verdict),)
            for reason in (*own, *whole):
                found.setdefault(reason, set()).add(name)
        if not names and not verdict.get("paper"):
            found.setdefault(_verdict(verdict), set())
    return [(reason, _of_suites(names, ran)) for reason, names in found.items()]


def _verdict(verdict: Mapping[str, Any]) -> str:
    return str(verdict.get("reason") or "the run does not say that it is")


def _of_suites(names: set[str], ran: set[str]) -> str:
    return "" if names == ran else ", ".join(sorted(map(wording.suite_title, names)))


def _facts(system: System) -> list[tuple[str, str]]:
    """Return the provenance of a run as (name, value), in reading order."""
    meta, model = system.run.meta, system.run.model
    verdict = meta.get("comparable", {})
    dirty = {True: ", with uncommitted changes", False: ", clean", None: ""}[meta.get("dirty")]
    facts = [
        ("Run", system.run.id),
        ("Started", meta.get("created")),
        ("Command", " ".join(map(str, meta.get("command", [])))),
        ("Commit", f"{meta['commit']}{dirty}" if meta.get("commit") else None),
        ("Checkpoint", f"{model.get('name')} ({model.get('path')})"),
        ("Weights", model.get("digest")),
        ("Parameters", wording.count(system.parameters)),
        ("Attention", system.attention),
        ("Cache", _per_token(system)),
        ("Settings", _flat(system.run.config)),
        ("Data", _flat({k: v.get("data_digest") for k, v in meta.get("suites", {}).items()})),
        ("Packages", _flat(meta.get("packages", {}))),
        ("Hardware", _flat(meta.get("hardware", {}))),
        ("Comparable with the paper", "yes" if verdict.get("paper")
         else f"no: {verdict.get('reason') or 'not stated'}"),
    ]  # fmt: skip
    return [(name, str(value)) for name, value in facts if value not in (None, "", "–")]


def _per_token(system: System) -> str | None:
    size = system.cache_bytes_per_token
    return None if size is None else f"{wording.count(size)} bytes per token{system.in_dtype}"


def _flat(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, []))
