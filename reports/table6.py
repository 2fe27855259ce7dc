"""Table 6 of the paper for any suite: direct answers beside agentic ones, and what both cost.

Every agentic run is paired with the direct run, and with the one whose looks are at random if there
is one, on the samples that both answered; intervals are those of `stats`, over videos. What
verification changed is scored anew from the answers that were proposed before it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from internvideo3.reports import wording
from internvideo3.reports.export import inert
from internvideo3.reports.leaderboard_formats import FIT, tex
from internvideo3.reports.load import Run, Sample
from internvideo3.reports.markdown import escape
from internvideo3.reports.markdown import table as markdown_table
from internvideo3.reports.stats import Difference
from internvideo3.reports.summary import Standing, difference_of, same_data, standing
from internvideo3.tasks.scoring import score

TEMPLATES = Path(__file__).parent / "templates"
PAPER = ("Video-MME", 73.1, 75.8)
"""The paper's only row: benchmark, direct QA, agentic MCR (table 6)."""
NOTE = (
    "Differences are paired, intervals 95 %, bootstrap over videos. Tokens are of the context and "
    "of what was weighed aside; calls count looks and tools. The paper gives no cost."
)
SETTINGS = (
    "fps", "max_frames", "min_pixels", "max_pixels", "video_pixels", "thinking", "preset",
    "subtitles",
)  # fmt: skip
"""Of the first look and the reply, which a line names where they are not the direct run's."""
HEAD = (
    "system", "score", "− direct", "95 % interval", "− random looks", "n", "tokens", "seconds",
    "calls", "without tools", "right → wrong", "wrong → right",
)  # fmt: skip


class Table6Error(ValueError):
    """Runs that cannot be set beside each other."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One system on one suite."""

    name: str
    suite: str
    label: str
    """`scale` for the scale model, `open-web` where the web was searched."""
    score: Standing
    """By the benchmark's own rule."""
    n: int
    failed: int
    """Questions of these without an answer; they are in the score, and in no cost."""
    videos: int
    difference: Difference | None
    """To the direct run; None for that run itself."""
    over_random: Difference | None
    """To the run whose looks are at random; None for that run, the direct one, and without it."""
    tokens: float | None
    """Mean of a question that was answered; None where none was."""
    seconds: float | None
    calls: float | None
    without_tools: float | None
    """Share of rollouts that ended without a call."""
    spoilt: float | None
    """Share of answers that verification made wrong."""
    mended: float | None
    """Share that it made right."""
    run: str
    model: str


def lines(direct: Run, agentic: Sequence[Run], *, other_models: bool = False) -> list[Line]:
    """The table's lines, suite by suite, the direct run first.

    Args:
        direct: the run that all others are set beside.
        agentic: the others. Looks at random are those of the same model, if there are any.
        other_models: whether agentic runs may be of other models; then every line names its model.

    Raises:
        Table6Error: a run is of the wrong mode or model, of other data, a control, or shares no
            sample with the direct run.
    """
    _check(direct, agentic, other_models)
    _check_data(direct, agentic)
    several = len({_model(run) for run in (direct, *agentic)}) > 1
    found: list[Line] = []
    for suite, samples in direct.samples.items():
        others = [run for run in agentic if suite in run.samples]
        if others:
            found.append(_line(direct, suite, samples, None))
            for run in others:
                chance = _at_random(run, others, suite)
                line = _line(run, suite, run.samples[suite], samples, chance)
                name = ", ".join([line.name, *_apart(direct, run)])
                found.append(replace(line, name=name))
    if not found:
        raise Table6Error("the runs share no suite; give runs of the same suites.")
    if not several:
        return found
    return [replace(line, name=f"{line.model}: {line.name}") for line in found]


def _at_random(run: Run, others: Sequence[Run], suite: str) -> Sequence[Sample] | None:
    """The samples of the run whose looks are at random that `run` is to be set beside."""
    if _looks(run) == "random":
        return None
    found = sorted((one for one in others if _looks(one) == "random"),
                   key=lambda one: _model(one) != _model(run))  # fmt: skip
    return found[0].samples[suite] if found else None


def _model(run: Run) -> Any:
    return run.model.get("digest")


def _check(direct: Run, agentic: Sequence[Run], other_models: bool) -> None:
    if direct.meta.get("mode") != "direct":
        raise Table6Error(f"{direct.path} is not a direct run; give that one first.")
    for run in agentic:
        if run.meta.get("mode") != "agentic":
            raise Table6Error(
                f"{run.path} is not an agentic run; `internvideo3 eval --mode agentic` makes one."
            )
        if _model(run) != _model(direct) and not other_models:
            raise Table6Error(
                f"{run.path} and {direct.path} are runs of different models; if they are meant to "
                "stand side by side, say --other-models."
            )


def _check_data(direct: Run, agentic: Sequence[Run]) -> None:
    """Whether all runs are of the same questions about the same videos, which all were shown.

    Raises:
        Table6Error: they are not; ids alone do not tell.
    """
    for run in (direct, *agentic):
        if run.config.get("control"):
            raise Table6Error(
                f"{run.path} is the control {run.config['control']!r}, which hides something of "
                "the video; give runs without --control."
            )
    for run in agentic:
        for suite in run.samples.keys() & direct.samples.keys():
            if not same_data(suite, direct, run):
                raise Table6Error(
                    f"{run.path} and {direct.path} were asked different questions of {suite} (its "
                    "data differ); evaluate both on the same --split and build."
                )


def _apart(direct: Run, run: Run) -> list[str]:
    """Settings of the first look in which a run differs from the direct one, in words."""
    both = [(name, direct.config.get(name), run.config.get(name)) for name in SETTINGS]
    return [f"{name.replace('_', ' ')} {theirs}" for name, ours, theirs in both if ours != theirs]


def _looks(run: Run) -> str:
    return str((run.config.get("agent") or {}).get("looks", ""))


def _line(
    run: Run,
    suite: str,
    samples: Sequence[Sample],
    base: Sequence[Sample] | None,
    chance: Sequence[Sample] | None = None,
) -> Line:
    before = {sample.id: sample for sample in base or samples}
    both = [sample for sample in samples if sample.id in before]
    if not both:
        raise Table6Error(f"{run.path} shares no sample of {suite} with the direct run.")
    answered = [sample for sample in both if sample.error is None]
    agents = [sample.agent for sample in answered if sample.agent is not None]
    costs = [agent["cost"] for agent in agents]
    changes = [change for sample in both if (change := _change(sample)) is not None]
    label = " ".join(filter(None, [run.model.get("label"), _open_web(run)]))
    return Line(
        name=system_name(run), suite=suite, label=label,
        score=standing(both), n=len(both), failed=len(both) - len(answered),
        videos=len({sample.video_id for sample in both}),
        difference=difference_of(base, both) if base else None,
        over_random=difference_of(chance, both) if chance else None,
        tokens=fmean(map(_tokens, answered)) if answered else None,
        seconds=_seconds(run, suite, answered) if answered else None,
        calls=fmean(cost["tool_calls"] for cost in costs) if costs else None,
        without_tools=fmean(cost["tool_calls"] == 0 for cost in costs) if costs else None,
        spoilt=sum(change < 0 for change in changes) / len(both) if agents else None,
        mended=sum(change > 0 for change in changes) / len(both) if agents else None,
        run=run.id, model=str(run.model.get("name")),
    )  # fmt: skip


def system_name(run: Run) -> str:
    """Who answered, from the run's settings: `direct`, or the agent with what sets it apart."""
    agent = run.config.get("agent")
    if not agent:
        return "direct QA"
    apart = []
    if agent["looks"] == "random":
        apart.append("looks at random")
    if agent["looks"] == "none":
        apart.append("without zoom")
    if agent["looks"] == "spread":
        apart.append("without memory")
    if not agent["verifies"]:
        apart.append("without verification")
    return ", ".join([f"agentic ({agent['policy']})", *apart])


def _open_web(run: Run) -> str:
    return "open-web" if "web_search" in (run.config.get("agent") or {}).get("tools", ()) else ""


def _tokens(sample: Sample) -> float:
    if sample.agent is None:
        return float(sample.tokens)
    cost = sample.agent["cost"]
    return float(cost["context_tokens"] + cost["side_tokens"])


def _seconds(run: Run, suite: str, samples: Sequence[Sample]) -> float:
    parts = ("decode_s", "encode_s", "prefill_s", "generate_s")
    # A retry that has not ended leaves two rows; the later one is of the answer.
    rows = {row.get("id"): row for row in run.timings.get(suite, ())}
    taken = [rows[sample.id] for sample in samples if sample.id in rows]
    return sum(float(row.get(part, 0.0)) for row in taken for part in parts) / max(1, len(taken))


def _change(sample: Sample) -> float | None:
    """Score that verification added to an answer; None if the answer is the proposed one."""
    proposed = (sample.agent or {}).get("proposed")
    if proposed is None or proposed == sample.prediction:
        return None
    doc = sample.doc or {
        "id": sample.id, "suite": sample.suite, "family": sample.family,
        "length_s": sample.length_s, "question": sample.question, "options": list(sample.options),
        "answer": sample.answer, "answer_type": sample.answer_type,
    }  # fmt: skip
    before = score(sample.benchmark, doc, proposed).value
    return None if before is None or sample.value is None else sample.value - before


def _score(found: Standing) -> str:
    if found.value is None:
        return found.instead
    span = f" ({wording.span(found.interval)})" if found.interval else ""
    return f"{wording.percent(found.value)}{span}"


def cells(line: Line) -> list[str]:
    """A line as texts, in the order of `HEAD`."""
    found, above = line.difference, line.over_random
    return [
        line.name + (f" [{line.label}]" if line.label else ""),
        _score(line.score),
        wording.points(found.interval.mean) if found else "–",
        wording.signed_span(found.interval) if found else "–",
        f"{wording.points(above.interval.mean)} ({wording.signed_span(above.interval)})"
        if above
        else "–",
        wording.count(line.n),
        "–" if line.tokens is None else wording.count(round(line.tokens)),
        "–" if line.seconds is None else f"{line.seconds:.2f}",
        "–" if line.calls is None else f"{line.calls:.1f}",
        *(wording.percent(one) for one in (line.without_tools, line.spoilt, line.mended)),
    ]


def _paper_cells() -> list[list[str]]:
    benchmark, direct, agentic = PAPER
    rest = ["–"] * (len(HEAD) - 3)
    return [
        [f"paper, {benchmark}: direct QA", f"{direct:.1f}", "–", *rest],
        [f"paper, {benchmark}: agentic MCR", f"{agentic:.1f}", f"+{agentic - direct:.1f}", *rest],
    ]


class Section(NamedTuple):
    """The rows of one suite."""

    title: str
    rows: list[list[str]]
    note: str = ""
    """What failed; empty where nothing did."""


def _sections(found: Sequence[Line]) -> Iterator[Section]:
    """The suites, then the paper's row."""
    for suite in dict.fromkeys(line.suite for line in found):
        mine = [one for one in found if one.suite == suite]
        title = f"{wording.suite_title(suite)}, {mine[0].score.metric}"
        yield Section(title, [cells(one) for one in mine], _failures(mine))
    yield Section("The paper's row", _paper_cells())


def _failures(found: Sequence[Line]) -> str:
    told = [f"{one.name}, {one.failed} of {one.n}" for one in found if one.failed]
    return f"Failed, and in no mean of cost: {'; '.join(told)}." if told else ""


def markdown(found: Sequence[Line]) -> str:
    """The table as Markdown."""
    parts = ["# Direct and agentic (the paper's table 6)", NOTE]
    for title, rows, note in _sections(found):
        texts = [[escape(cell) for cell in row] for row in rows]
        parts += [f"## {title}", markdown_table(list(HEAD), texts), *filter(None, [escape(note)])]
    return "\n\n".join(parts) + "\n"


def latex(found: Sequence[Line]) -> str:
    """The table for a document that loads booktabs and graphicx."""

    def across(text: str) -> str:
        return rf"\multicolumn{{{len(HEAD)}}}{{l}}{{{tex(text)}}} \\"

    out = [
        r"\begin{table}\centering",
        rf"\caption{{Direct and agentic (the paper's table 6, and ours). {tex(NOTE)}}}",
        FIT,
        rf"\begin{{tabular}}{{l{'r' * (len(HEAD) - 1)}}}",
        r"\toprule",
        " & ".join(map(tex, HEAD)) + r" \\",
    ]
    for title, rows, note in _sections(found):
        out += [r"\midrule", across(title)]
        out += [" & ".join(map(tex, row)) + r" \\" for row in rows]
        out += [across(note)] if note else []
    return "\n".join([*out, r"\bottomrule", r"\end{tabular}}", r"\end{table}", ""])


def rows(found: Sequence[Line]) -> list[dict[str, Any]]:
    """The table's numbers, unrounded, as plain data."""
    return [_row(line) for line in found]


def _row(line: Line) -> dict[str, Any]:
    found, above = line.difference, line.over_random
    return {
        "suite": line.suite, "system": line.name, "label": line.label, "run": line.run,
        "model": line.model,
        "metric": line.score.metric, "score": line.score.value, "instead": line.score.instead,
        "low": line.score.interval.low if line.score.interval else None,
        "high": line.score.interval.high if line.score.interval else None,
        "n": line.n, "videos": line.videos,
        "difference": found.interval.mean if found else None,
        "difference_low": found.interval.low if found else None,
        "difference_high": found.interval.high if found else None,
        "won": found.wins if found else None, "lost": found.losses if found else None,
        "p_mcnemar": found.p_mcnemar if found else None,
        "over_random": above.interval.mean if above else None,
        "over_random_low": above.interval.low if above else None,
        "over_random_high": above.interval.high if above else None,
        "tokens": line.tokens, "seconds": line.seconds, "calls": line.calls,
        "without_tools": line.without_tools, "right_to_wrong": line.spoilt,
        "wrong_to_right": line.mended, "failed": line.failed,
    }  # fmt: skip


def as_csv(found: Sequence[Line]) -> str:
    """The numbers as CSV."""
    out = io.StringIO()
    data = rows(found)
    writer = csv.DictWriter(out, list(data[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: inert(value) if isinstance(value, str) else value for key, value in row.items()}
        for row in data
    )
    return out.getvalue()


def html(found: Sequence[Line], provenance: Sequence[Mapping[str, Any]]) -> str:
    """The table as a page of its own, without script or network."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment.get_template("table6.html.jinja").render(
        style=Markup(style), head=HEAD, note=NOTE, runs=provenance,
        tables=list(_sections(found)),
    )  # fmt: skip


def provenance(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Command and commit of every run, and the agent's settings."""
    return [
        {
            "run": run.id,
            "command": " ".join(map(str, run.meta.get("command") or ())),
            "commit": run.meta.get("commit"),
            "dirty": run.meta.get("dirty"),
            "model": run.model.get("name"),
            "weights": run.model.get("digest"),
            "data": {name: one.get("data_digest") for name, one in run.meta["suites"].items()},
            "agent": run.config.get("agent"),
            "max_frames": run.config.get("max_frames"),
            "fps": run.config.get("fps"),
        }
        for run in runs
    ]


def write(
    direct: Run, agentic: Sequence[Run], out: Path, *, other_models: bool = False
) -> list[Path]:
    """Write table6.md, .tex, .csv, .html and .json into a folder; see `lines`.

    Raises:
        Table6Error: the runs cannot be set beside each other.
    """
    found = lines(direct, agentic, other_models=other_models)
    told = provenance([direct, *agentic])
    out.mkdir(parents=True, exist_ok=True)
    data = {"rows": rows(found), "runs": told}
    texts = {
        "table6.md": markdown(found),
        "table6.tex": latex(found),
        "table6.csv": as_csv(found),
        "table6.html": html(found, told),
        "table6.json": json.dumps(data, indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8")
    return [out / name for name in texts]
