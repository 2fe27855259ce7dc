"""Table 5 from an ablation's folder: ours beside the paper's, with intervals and their reading.

A row is a recipe, a column one of the paper's benchmarks, or a suite of the scale world that stands
for one. The latter are scale numbers: signs may be compared with the paper's, sizes may not.

Two intervals of each difference to the full recipe. Over questions: paired on the same questions,
each question's difference averaged over seeds, resampled by video. Over seeds: Student's t of the
seeds' own differences, of at least three that are not all alike: two that agree say nothing of how
others would spread. A drop is called significant only if both exclude zero.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from internvideo3.reports.load import Sample, load_run
from internvideo3.reports.stats import cluster_interval, paired_difference

MAPPING = {
    "V-MME": "world_long", "LVB": "world_grounding", "MLVU": "world_ego", "LVBench": "world_manyq",
}  # fmt: skip
"""The paper's columns and the suites that stand for them."""
BENCHMARKS = {
    "V-MME": "videomme", "LVB": "longvideobench", "MLVU": "mlvu", "LVBench": "lvbench",
}  # fmt: skip
"""The paper's columns and the benchmarks themselves."""
TASK_MEANS = frozenset({"mlvu"})
"""Benchmarks whose number is the mean of their tasks' means: a question counts by its task's
size."""
WHY = {
    "V-MME": "multiple choice over videos of mixed length",
    "LVB": "the moment that a question refers to has to be found",
    "MLVU": "questions about the whole of a video",
    "LVBench": "many questions of every kind about the longest videos",
}
HARD_FAMILIES, HARD_S = frozenset({"order", "attime", "ground_flash"}), 32.0
ENOUGH_QUESTIONS, ENOUGH_SEEDS, NARROW = 2000, 3, 0.02
"""What issue and README ask of a measurement: questions a suite, seeds, half-width."""
FEWEST_SEEDS = 3
"""Seeds below which a spread over seeds is not told."""
MOMENTS = {
    "full": ("before conversion", "after conversion", "after CPT"),
    "no_m2la": ("before CPT", "after CPT"),
}
"""Recipe → when its losses by modality are measured."""

STEPS = ("GSPO over SFT, grounding mIoU", "OPD over GSPO, hard questions")

Values = dict[str, tuple[str, float]]
"""Question → (video, score)."""


@dataclass(frozen=True)
class Change:
    """A mean difference, 0 to 1, and its two intervals."""

    mean: float
    over_questions: tuple[float, float]
    over_seeds: tuple[float, float] | None
    """None for fewer than `FEWEST_SEEDS`, and where all of them differ by the same."""
    questions: int
    seeds: int

    @property
    def significant(self) -> bool:
        """Whether both intervals exclude zero; never where there is none over seeds."""
        both = (self.over_questions, self.over_seeds)
        return all(one is not None and (one[0] > 0 or one[1] < 0) for one in both)


class AblationError(ValueError):
    """A folder that holds no ablation."""


WRITTEN = ("table5.md", "table5.json", "curves.svg")
"""The report's files; the first is the one to read."""


def write_table5(folder: Path) -> None:
    """Write what is finished, as the files of `WRITTEN`.

    Raises:
        AblationError: The folder holds none.
        RunError: A run cannot be read.
    """
    made = summary(folder)
    (folder / "table5.json").write_text(json.dumps(made, indent=1) + "\n")
    (folder / "table5.md").write_text(in_words(made))
    draw_curves(folder, made)


def summary(folder: Path) -> dict[str, Any]:
    """All numbers of an ablation.

    Raises:
        AblationError: The folder holds none.
    """
    path = folder / "ablation.json"
    if not path.is_file():
        raise AblationError(f"{folder} has no ablation.json; `internvideo3 ablate` writes one")
    plan = json.loads(path.read_text())
    scores: dict[str, dict[int, dict[str, list[Sample]]]] = {}
    for key, told in plan["runs"].items():
        run = load_run(folder / "runs" / key)
        held = scores.setdefault(told["recipe"], {})
        held[told["seed"]] = {name: list(rows) for name, rows in run.samples.items()}
    names = [name for name in plan["about"] if name in scores]
    suites = plan["suites"]
    return {
        "scale": plan.get("scale", True),
        "starts": plan.get("starts", ["scale:base"]),
        **{key: plan[key] for key in ("command", "commit", "dirty", "preset", "limit", "created")},
        "hardware": plan["hardware"],
        "about": plan["about"],
        "mapping": columns(suites),
        "seeds": sorted({told["seed"] for told in plan["runs"].values()}),
        "questions": _questions(scores, suites),
        "rows": {name: _row(scores[name], suites) for name in names},
        "changes": {
            name: _changes(scores["full"], scores[name], suites)
            for name in names
            if name != "full" and "full" in scores
        },
        "steps_beyond_sft": _steps(scores, suites),
        "losses": _losses(folder, plan),
        "stages": {key: told["stages"] for key, told in plan["runs"].items()},
    }


def columns(suites: Sequence[str]) -> dict[str, str]:
    """The paper's columns that are measured, each with its suite; benchmarks before stand-ins."""
    return {
        name: suite
        for name in MAPPING
        for suite in [one for one in (BENCHMARKS[name], MAPPING[name]) if one in suites][:1]
    }


def _questions(scores: Mapping[str, Any], suites: Sequence[str]) -> dict[str, int]:
    every = [runs for seeds in scores.values() for runs in seeds.values()]
    return {suite: max(len(runs.get(suite, ())) for runs in every) for suite in suites}


def _row(
    seeds: Mapping[int, Mapping[str, Sequence[Sample]]], suites: Sequence[str]
) -> dict[str, Any]:
    """Mean of each suite over seeds and questions, with the interval over questions."""
    made: dict[str, Any] = {"seeds": sorted(seeds)}
    for suite in suites:
        pooled = _pooled([_values(runs[suite]) for runs in seeds.values()])
        if not pooled:  # no answer that the benchmark's rule scores
            made[suite] = None
            continue
        told = cluster_interval(
            [value for _, value in pooled.values()], [video for video, _ in pooled.values()]
        )
        each = {seed: _mean(_values(runs[suite])) for seed, runs in sorted(seeds.items())}
        made[suite] = {"mean": told.mean, "low": told.low, "high": told.high, "by_seed": each}
    four = [made[suite] for suite in columns(suites).values()]
    made["average"] = float(np.mean([one["mean"] for one in four])) if four and all(four) else None
    return made


def _changes(
    full: Mapping[int, Mapping[str, Sequence[Sample]]],
    other: Mapping[int, Mapping[str, Sequence[Sample]]],
    suites: Sequence[str],
) -> dict[str, Any]:
    return {suite: _told(change(full, other, suite, lambda sample: True)) for suite in suites}


def change(
    before: Mapping[int, Mapping[str, Sequence[Sample]]],
    after: Mapping[int, Mapping[str, Sequence[Sample]]],
    suite: str,
    keep: Callable[[Sample], bool],
) -> Change | None:
    """`after` minus `before` on the questions that `keep` keeps; None if there is none."""
    seeds = sorted(before.keys() & after.keys())
    pairs = []
    for seed in seeds:
        ours = _values([s for s in before[seed][suite] if keep(s)])
        theirs = _values([s for s in after[seed][suite] if keep(s)])
        both = ours.keys() & theirs.keys()
        pairs.append(({k: ours[k] for k in both}, {k: theirs[k] for k in both}))
    if not pairs or not pairs[0][0]:
        return None
    ours_pooled = _pooled([ours for ours, _ in pairs])
    theirs_pooled = _pooled([theirs for _, theirs in pairs])
    order = sorted(ours_pooled)
    found = paired_difference(
        [ours_pooled[k][1] for k in order], [theirs_pooled[k][1] for k in order],
        [ours_pooled[k][0] for k in order],
    ).interval  # fmt: skip
    by_seed = [_mean(theirs) - _mean(ours) for ours, theirs in pairs]
    spread = _over_seeds(by_seed)
    return Change(found.mean, (found.low, found.high), spread, len(order), len(seeds))


def _over_seeds(differences: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of a mean over seeds; None where their spread is not known."""
    count = len(differences)
    if count < FEWEST_SEEDS or np.ptp(differences) < 1e-12:
        return None
    mean, spread = float(np.mean(differences)), float(np.std(differences, ddof=1))
    half = float(-stdtrit(count - 1, 0.025)) * spread / math.sqrt(count)
    return mean - half, mean + half


def _steps(scores: Mapping[str, Any], suites: Sequence[str]) -> dict[str, Any]:
    """GSPO over SFT on grounding, OPD over GSPO on hard questions of the scale world's suites."""
    made: dict[str, Any] = {}
    if not set(MAPPING.values()) <= set(suites):
        return made
    if {"sft_only", "no_opd"} <= scores.keys():
        gained = change(scores["sft_only"], scores["no_opd"], "world_grounding", lambda s: True)
        made[STEPS[0]] = _told(gained)
    if {"no_opd", "full"} <= scores.keys():
        before, after = _joined(scores["no_opd"]), _joined(scores["full"])
        made[STEPS[1]] = _told(change(before, after, "all", is_hard))
    return made


def is_hard(sample: Sample) -> bool:
    """Order, at-time and flash questions about videos of at least `HARD_S` seconds."""
    return sample.family in HARD_FAMILIES and (sample.length_s or 0.0) >= HARD_S


def _joined(seeds: Mapping[int, Mapping[str, Sequence[Sample]]]) -> dict[int, Any]:
    return {
        seed: {"all": [sample for rows in runs.values() for sample in rows]}
        for seed, runs in seeds.items()
    }


def _values(samples: Sequence[Sample]) -> Values:
    """A question that failed counts 0; one that the benchmark's rule leaves out does not count."""
    scored = [s for s in samples if s.value is not None or s.error is not None]
    tasks = Counter(sample.family for sample in scored if sample.benchmark in TASK_MEANS)
    made = {}
    for sample in scored:
        among = tasks.get(sample.family) if sample.benchmark in TASK_MEANS else None
        weight = len(scored) / (len(tasks) * among) if among else 1.0
        made[sample.id] = sample.video_id, weight * (sample.value or 0.0)
    return made


def _pooled(seeds: Sequence[Values]) -> Values:
    """Each question's mean over seeds, of the questions that all seeds answered."""
    shared = set.intersection(*(set(one) for one in seeds))
    return {k: (seeds[0][k][0], float(np.mean([one[k][1] for one in seeds]))) for k in shared}


def _mean(values: Values) -> float:
    return float(np.mean([value for _, value in values.values()]))


def _told(change: Change | None) -> dict[str, Any] | None:
    return None if change is None else asdict(change) | {"significant": change.significant}


def _losses(folder: Path, plan: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Losses by modality around conversion and continued pretraining, mean over seeds."""
    return {name: _mean_losses(folder, plan, name) for name in MOMENTS}


def _mean_losses(folder: Path, plan: Mapping[str, Any], recipe: str) -> dict[str, dict[str, float]]:
    stages = [s for run in plan["runs"].values() if run["recipe"] == recipe for s in run["stages"]]
    paths = [folder / stage / "losses.json" for stage in stages]
    read = [json.loads(path.read_text()) for path in paths if path.is_file()]
    made = {}
    for moment in MOMENTS[recipe]:
        seeds = [one[moment] for one in read if moment in one]
        if seeds:
            made[moment] = {kind: float(np.mean([s[kind] for s in seeds])) for kind in seeds[0]}
    return made


def in_words(made: Mapping[str, Any]) -> str:
    """The report as Markdown; without the tables to which nothing that is finished belongs."""
    steps = made["steps_beyond_sft"] if _stands_in(made) else {}
    parts = [
        "# Table 5, scale" if made["scale"] else "# Table 5",
        _provenance(made),
        "## Scores",
        _scores_table(made),
        _mapping_lines(made["mapping"]),
        "## Change by leaving a part out, percentage points" if made["changes"] else "",
        _changes_table(made) if made["changes"] else "",
        "## What the post-training stages add" if steps else "",
        _steps_table(made) if steps else "",
        "## Loss by modality, nats a token" if any(made["losses"].values()) else "",
        _losses_table(made) if any(made["losses"].values()) else "",
        "## Reading",
        "\n".join(f"- {line}" for line in reading(made)),
        "![Learning curves](curves.svg)",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _provenance(made: Mapping[str, Any]) -> str:
    questions = ", ".join(f"{suite} {count}" for suite, count in made["questions"].items())
    own = all(start.startswith("scale:") for start in made["starts"])
    what = "a model of 1.5 million parameters" if own else ", ".join(made["starts"])
    where = "the scale world" if _stands_in(made) else ", ".join(made["questions"])
    return (
        f"{'**scale**: ' if made['scale'] else ''}{what} on {where}. Seeds "
        f"{', '.join(map(str, made['seeds']))}; questions: {questions}. Made by "
        f"`{' '.join(made['command'])}` at commit {made['commit']}"
        f"{' with changes' if made['dirty'] else ''}, {made['created']}."
    )


def _scores_table(made: Mapping[str, Any]) -> str:
    paper, suites = _paper_rows(), list(made["questions"])
    mapping = made["mapping"]
    named = {suite: f"{suite} (↔ {column})" for column, suite in mapping.items()}
    places = [list(MAPPING).index(column) for column in mapping]
    all_four = len(mapping) == len(MAPPING)
    head = [
        "recipe",
        *(named.get(suite, suite) for suite in suites),
        "mean",
        "seeds",
        *(f"paper {column}" for column in mapping),
        *(["paper Avg."] if all_four else []),
    ]
    lines = []
    for name, row in made["rows"].items():
        mean = f"{100 * row['average']:.1f}" if all_four and row["average"] is not None else "–"
        theirs = [str(score) for score in paper.get(name, ())] or ["–"] * 5
        theirs = [*(theirs[place] for place in places), *(theirs[-1:] if all_four else [])]
        ours = [_interval(row[suite]) for suite in suites]
        lines.append([name, *ours, mean, str(len(row["seeds"])), *theirs])
    return _table(head, lines)


def _stands_in(made: Mapping[str, Any]) -> bool:
    """Whether all columns are the scale world's suites."""
    return set(MAPPING.values()) <= set(made["questions"])


def _paper_rows() -> dict[str, list[float]]:
    path = Path(__file__).parent / "ablation_paper.json"
    rows: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def _interval(told: Mapping[str, Any] | None) -> str:
    return (
        "–"
        if told is None
        else f"{100 * told['mean']:.1f} ({100 * told['low']:.1f}–{100 * told['high']:.1f})"
    )


def _mapping_lines(mapping: Mapping[str, str]) -> str:
    stand_in = {name: suite for name, suite in mapping.items() if suite == MAPPING[name]}
    told = "; ".join(f"{suite} for {name}: {WHY[name]}" for name, suite in stand_in.items())
    why = f"Suites stand for benchmarks by what they ask ({told}). " if told else ""
    return f"{why}Intervals of scores: 95 % over questions, by video."


def _changes_table(made: Mapping[str, Any]) -> str:
    head = ["recipe", *made["questions"]]
    lines = [
        [name, *(_change_text(changes[suite]) for suite in made["questions"])]
        for name, changes in made["changes"].items()
    ]
    note = "`[over questions] {over seeds}`, 95 %; * both exclude zero."
    told = [one for changes in made["changes"].values() for one in changes.values() if one]
    if any(one["over_seeds"] is None and one["seeds"] > 1 for one in told):
        note += (
            f" None over seeds where there are fewer than {FEWEST_SEEDS} or all differ by the same."
        )
    return _table(head, lines) + f"\n\n{note}"


def _steps_table(made: Mapping[str, Any]) -> str:
    lines = [[name, _change_text(told)] for name, told in made["steps_beyond_sft"].items()]
    note = (
        f"Hard: {', '.join(sorted(HARD_FAMILIES))} about videos of at least {HARD_S:g} s, all "
        "suites together."
    )
    return _table(["step", "change"], lines) + f"\n\n{note}"


def _change_text(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return "–"
    low, high = told["over_questions"]
    text = f"{100 * told['mean']:+.1f} [{100 * low:+.1f} … {100 * high:+.1f}]"
    if told["over_seeds"] is not None:
        low, high = told["over_seeds"]
        text += f" {{{100 * low:+.1f} … {100 * high:+.1f}}}"
    return text + ("*" if told["significant"] else "")


def _losses_table(made: Mapping[str, Any]) -> str:
    kinds = ("text", "image", "video")
    lines = [
        [recipe, moment, *(_loss_text(moments[moment].get(kind)) for kind in kinds)]
        for recipe, moments in made["losses"].items()
        for moment in MOMENTS[recipe]
        if moment in moments
    ]
    note = (
        "The scale base model never saw plain text, pictures or captions before: here continued "
        "pretraining teaches them, where the paper's recovers them."
    )
    return _table(["recipe", "moment", *kinds], lines) + (f"\n\n{note}" if made["scale"] else "")


def _loss_text(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"


def reading(made: Mapping[str, Any]) -> list[str]:
    """What may be concluded, and what may not."""
    lines = []
    for name, changes in made["changes"].items():
        held = [s for s, told in changes.items() if told and told["significant"]]
        told = ", ".join(f"{s} {100 * changes[s]['mean']:+.1f}" for s in held)
        lines.append(f"{name}: {told if held else 'no change is significant'}.")
    for name, step in made["steps_beyond_sft"].items():
        if step is not None:
            known = "significant" if step["significant"] else "not significant"
            lines.append(f"{name}: {100 * step['mean']:+.1f}, {known}.")
    compared = sum(len(changes) for changes in made["changes"].values())
    if compared:
        lines.append(
            f"{compared} changes are tested at 95 % each, without a correction for their number: "
            "one in twenty would come out by chance."
        )
    steps = STEPS if _stands_in(made) else ()
    missing = [f"{step}: not measured" for step in steps if step not in made["steps_beyond_sft"]]
    missing += [f"{name}: no such row yet" for name in _paper_rows() if name not in made["rows"]]
    return [*lines, *(f"{one}." for one in missing), *unmet(made)]


def unmet(made: Mapping[str, Any]) -> list[str]:
    """The bars of a measurement that this one does not meet."""
    lines = []
    fewest, seeds = min(made["questions"].values()), len(made["seeds"])
    if fewest < ENOUGH_QUESTIONS:
        lines.append(f"Bar not met: {fewest} questions in a suite, {ENOUGH_QUESTIONS} are asked.")
    if seeds < ENOUGH_SEEDS:
        lines.append(f"Bar not met: {seeds} seed(s), {ENOUGH_SEEDS} are asked.")
    told = [t for changes in made["changes"].values() for t in changes.values() if t]
    told += [step for step in made["steps_beyond_sft"].values() if step]
    for what in ("over_questions", "over_seeds"):
        widths = [(high - low) / 2 for low, high in (t[what] for t in told if t[what])]
        if widths and max(widths) > NARROW:
            lines.append(
                f"Bar not met: the widest half-width {what.replace('_', ' ')} is "
                f"{100 * max(widths):.1f} points, {100 * NARROW:g} are asked."
            )
    return lines


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *lines))


def draw_curves(folder: Path, made: Mapping[str, Any]) -> None:
    """Learning curves of one recipe's stages, a line a seed: the full one, or the longest."""
    from matplotlib.figure import Figure

    shown = {
        "cpt": "loss",
        "sft_short": "loss",
        "sft_long": "loss",
        "gspo": "reward",
        "opd": "loss",
    }
    figure = Figure(figsize=(12, 2.6), layout="constrained")
    axes = figure.subplots(1, len(shown))
    longest = max(made["stages"], key=lambda key: (key.startswith("full-"), _length(made, key)))
    recipe = longest.rsplit("-s", 1)[0]
    for key, stages in made["stages"].items():
        if key.rsplit("-s", 1)[0] != recipe:
            continue
        by_name = {Path(stage).name.rsplit("-", 1)[0]: folder / stage for stage in stages}
        for axis, (name, metric) in zip(axes, shown.items(), strict=True):
            path = by_name.get(name, folder) / "metrics.jsonl"
            if path.is_file():
                rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
                steps, values = [r["step"] for r in rows], [r[metric] for r in rows]
                axis.plot(steps, values, linewidth=1, label=key)
                axis.set(title=name, xlabel="step", ylabel=metric)
    for axis in axes:
        axis.set_visible(bool(axis.lines))
    drawn = [axis for axis in axes if axis.lines]
    if drawn:
        drawn[0].legend(fontsize="x-small")
    kind = "scale: " if made["scale"] else ""
    figure.suptitle(f"{kind}the stages of {recipe}", fontsize="medium")
    figure.savefig(folder / "curves.svg")


def _length(made: Mapping[str, Any], run: str) -> int:
    return len(made["stages"][run])
