"""From runs to the numbers that every form of the report shows (terminal, Markdown, CSV, page).

One `System` per run; one `Cell` per system and suite. Nothing here is formatted, and no number
comes from anywhere but the runs' files.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from internvideo3.reports.load import Run, Sample, load_runs
from internvideo3.reports.stats import (
    RESAMPLES,
    Difference,
    Interval,
    cluster_interval,
    paired_difference,
    statistic_interval,
)
from internvideo3.reports.wording import MODEL_TITLES
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS, SUBTITLED
from internvideo3.tasks.scoring import Outcome, aggregate, headline
from internvideo3.tasks.scoring.averages import band_order, length_band
from internvideo3.tasks.scoring.result import Row

SUITE_ORDER = (
    "world_long",
    "world_ego",
    "world_short",
    "world_grounding",
    "world_spatial",
    "world_manyq",
)
HIDING = ("blind", "text")
"""Controls that do not show the video: what a system scores without having seen it."""
GROUP_RESAMPLES = 2_000
"""Resamples for families and length bands, which are many; whole suites take all."""
TOLERATED_LOSS = 0.03
"""The loss that a conversion may cost, as a fraction: a reference line, not a test."""
FEW_VIDEOS = 10
"""An interval over fewer videos is said to be rough: resampling so few shows little of the rest."""
GROUP_SCORE = "group score"
"""The metric of a benchmark whose average is over groups of questions, and not linear in them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class System:
    """One run as a row of the leaderboard."""

    name: str
    """For readers, unique among the systems of a report."""
    model: str
    """The checkpoint's name."""
    attention: str
    """`gqa`, `m2la` or, where the run does not say, empty."""
    control: str | None
    """Name of the control that this run is (`blind`), else `None`."""
    label: str | None
    """`scale` where run.json says so; goes with every number."""
    cache_bytes_per_token: int | None
    parameters: int | None
    run: Run

    @property
    def in_dtype(self) -> str:
        """Of which number type its cache is, as " in float32"; empty where it is not told."""
        dtype = str(self.run.config.get("dtype") or "")
        return f" in {dtype}" if dtype else ""

    @property
    def is_control(self) -> bool:
        """Whether the run is a control, not a system."""
        return self.control is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One system on one suite (or family, or length band)."""

    value: float | None
    """The headline number, 0 to 1; `None` where none of the answers has a score here."""
    interval: Interval | None
    """Its interval; `None` without a score, or where its average cannot be taken anew."""
    instead: str = ""
    """What there is in place of a score: a submission file, answers that wait for a judge."""
    plain: float | None
    """The number under the plain rule."""
    further: Mapping[str, float]
    """The benchmark's other numbers by name, as recorded; see `wording.further`."""
    n: int
    scored: int
    """Answers that the number is of; the rule leaves out the others, or cannot score them."""
    videos: int
    expected: int | None
    """Questions that the run set out to answer."""
    unreadable: int
    errors: int
    no_value: int
    """Answers without a score: their truth is not public, or only a judge could tell."""
    judge_needed: int = 0
    """Verdicts and ratings of a suite that are still missing."""
    judges: tuple[str, ...] = ()
    """Who judged answers that have no other score."""
    caveat: str = ""
    """Why the official number says something else than it seems to."""
    partial: str = ""
    """Which answers the number leaves out, and why."""
    above_floor: bool | None = None
    """Whether the whole interval lies above chance and every control that hides the video; `None`
    for controls, and where there is no interval or no floor."""

    @property
    def note(self) -> str:
        """What a reader of the number must know."""
        return "; ".join(filter(None, (self.partial, self.caveat)))

    @property
    def complete(self) -> bool:
        """Whether every question that was set out is there."""
        return self.expected is None or self.n >= self.expected


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """System `b` minus system `a` on one suite, on the samples both answered."""

    a: str
    b: str
    suite: str
    difference: Difference

    @property
    def name(self) -> str:
        """The pair, for readers."""
        return f"{self.b} − {self.a}"


Cells = dict[tuple[str, str], Cell]
"""(system name, group name) → cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteSummary:
    """Everything about one suite."""

    name: str
    metric: str
    chance: float | None
    """Expected accuracy of guessing among the options; `None` where answers are not options."""
    questions: int
    videos: int
    cells: dict[str, Cell]
    """By system name; a system that was not run on the suite is absent."""
    families: tuple[str, ...]
    by_family: Cells
    family_chance: dict[str, float | None]
    bands: tuple[str, ...]
    by_length: Cells
    comparisons: tuple[Comparison, ...]

    @property
    def scored(self) -> bool:
        """Whether any system has a score."""
        return any(cell.value is not None for cell in self.cells.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Everything that a report says about a list of runs."""

    systems: tuple[System, ...]
    suites: tuple[SuiteSummary, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that runs carry, such as `scale`."""
        return tuple(sorted({s.label for s in self.systems if s.label}))

    @property
    def floored(self) -> bool:
        """Whether any score is marked as not above chance and the controls."""
        cells = [cell for suite in self.suites for cell in suite.cells.values()]
        return any(cell.above_floor is False for cell in cells)

    @property
    def caveats(self) -> bool:
        """Whether any score says something else than it seems to."""
        return any(cell.note for suite in self.suites for cell in suite.cells.values())

    @property
    def further(self) -> bool:
        """Whether any benchmark has other numbers than its headline."""
        return any(cell.further for suite in self.suites for cell in suite.cells.values())

    @property
    def averaged(self) -> tuple[SuiteSummary, ...]:
        """The suites that a mean is of: those with scores, a benchmark's once.

        Where a benchmark was run with and without subtitles, the run without them counts.
        """
        names = {suite.name for suite in self.suites}
        return tuple(
            suite
            for suite in self.suites
            if suite.scored
            and not (suite.name.endswith(SUBTITLED) and suite.name.removesuffix(SUBTITLED) in names)
        )

    def mean(self, system: str) -> Interval | None:
        """Return a system's mean over suites, each with the same weight, if it ran them all.

        A suite that was begun, or only named by the command, is not one that it ran.
        """
        if any(_left_of_mean(one.run) for one in self.systems if one.name == system):
            return None
        cells = [suite.cells.get(system) for suite in self.averaged]
        whole = [cell for cell in cells if cell is not None and cell.complete]
        present = [cell.interval for cell in whole if cell.interval]
        if not present or len(present) < len(cells):
            return None
        return _mean_of(present)

    def mean_difference(self, pair: str) -> Interval | None:
        """Return a pair's difference as the mean over suites, if both ran more than one.

        None, too, where one of them was stopped: it would be of what came first.
        """
        found = [(s, c) for s in self.averaged for c in s.comparisons if c.name == pair]
        both = {name for _, c in found for name in (c.a, c.b)}
        if any(_left_of_mean(one.run) for one in self.systems if one.name in both):
            return None
        if not all(s.cells[name].complete for s, _ in found for name in both):
            return None
        return _mean_of([c.difference.interval for _, c in found]) if len(found) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What became of a system's answers, in all suites together."""

    system: System
    n: int
    unreadable: int
    errors: int
    judge_needed: int
    """Verdicts and ratings that are still missing."""
    incomplete: int
    """Suites that are not answered to their end, though begun."""
    not_begun: int
    """Suites of its command without an answer."""
    shift: float
    """What a plain reader would change, as a mean over suites; a fraction."""


def readings(summary: Summary) -> list[Reading]:
    """What became of every system's answers."""
    return [_reading(summary, system) for system in summary.systems]


def _reading(summary: Summary, system: System) -> Reading:
    cells = [s.cells[system.name] for s in summary.suites if system.name in s.cells]
    shifts = [c.plain - c.value for c in cells if c.plain is not None and c.value is not None]
    return Reading(
        system=system,
        n=sum(c.n for c in cells),
        unreadable=sum(c.unreadable for c in cells),
        errors=sum(c.errors for c in cells),
        judge_needed=sum(c.judge_needed for c in cells),
        incomplete=sum(not c.complete for c in cells),
        not_begun=len(_not_begun(system.run)),
        shift=sum(shifts) / len(shifts) if shifts else 0.0,
    )


def _mean_of(intervals: Sequence[Interval]) -> Interval:
    """Return the mean over suites that share no videos.

    The distances to the limits add in squares (Zou and Donner, "Construction of confidence limits
    about effect measures", Statistics in Medicine 2008), so that a suite without spread keeps the
    width of its own interval.
    """
    count = len(intervals)
    mean = sum(i.mean for i in intervals) / count
    below = math.sqrt(sum((i.mean - i.low) ** 2 for i in intervals)) / count
    above = math.sqrt(sum((i.high - i.mean) ** 2 for i in intervals)) / count
    se = math.sqrt(sum(i.se**2 for i in intervals)) / count
    n, clusters = sum(i.n for i in intervals), sum(i.clusters for i in intervals)
    return Interval(mean, mean - below, mean + above, se, n, clusters)


def summarise_paths(paths: Sequence[Path]) -> Summary:
    """Read runs and summarise them.

    Raises:
        RunError: As `load_runs`.
    """
    return summarise(load_runs(list(paths)))


def summarise(runs: Sequence[Run]) -> Summary:
    """Summarise runs; systems keep the order given, controls go last."""
    systems = tuple(sorted(_systems(runs), key=lambda s: s.is_control))
    names = {name for run in runs for name, samples in run.samples.items() if samples}
    known = (*SUITE_ORDER, *(n for b in BENCHMARKS for n in (b, b + SUBTITLED)))
    ordered = [s for s in known if s in names] + sorted(names - set(known))
    notes = [f"{run.id}: {note}" for run in runs for note in run.notes]
    notes += [f"{run.id}: without {suite}: {why}" for run in runs for suite, why in _absent(run)]
    notes += [
        f"{run.id}: not begun: {', '.join(left)}; the same `eval` goes on with them"
        for run in runs
        if (left := _not_begun(run))
    ]
    notes += [note for name in ordered for note in _data_notes(name, systems)]
    notes += [note for run in runs for note in _unscored_notes(run)]
    notes += [f"{run.id}: {suite}: {note}" for run in runs for suite, note in _oddities(run)]
    suites = tuple(_suite(name, systems) for name in ordered)
    notes += [note for suite in suites for note in _caveats(suite)]
    notes += _few_videos(suites)
    summary = Summary(systems=systems, suites=suites, notes=tuple(notes))
    twice = [s.name for s in suites if s.scored and s not in summary.averaged]
    if twice:
        said = "the mean of suites counts a benchmark once, without its subtitles"
        return replace(summary, notes=(*notes, f"{', '.join(twice)}: {said}"))
    return summary


def _absent(run: Run) -> Iterable[tuple[str, str]]:
    """Suites that the command named and the run leaves out, with the reason."""
    return dict(run.meta.get("left_out") or {}).items()


def _not_begun(run: Run) -> list[str]:
    """Suites that the command named and nothing was answered of."""
    named = run.meta.get("suites", {})
    return [suite for suite in named if not run.samples.get(suite)]


def _left_of_mean(run: Run) -> list[str]:
    """Those of them that a mean would count: with a truth, and once without subtitles."""
    named = run.meta.get("suites", {})
    left = []
    for suite in _not_begun(run):
        plain = suite.removesuffix(SUBTITLED)
        judged_elsewhere = plain in BENCHMARKS and "server" in BENCHMARKS[plain].verdict
        if not judged_elsewhere and (plain == suite or plain not in named):
            left.append(suite)
    return left


def _oddities(run: Run) -> Iterator[tuple[str, str]]:
    """What was odd about the data of a run's suites."""
    for suite, described in run.meta.get("suites", {}).items():
        yield from ((suite, str(note)) for note in described.get("notes", ()))


def _caveats(suite: SuiteSummary) -> Iterator[str]:
    for system, cell in suite.cells.items():
        if cell.note:
            plain = "" if cell.plain is None else f"; the plain score is {100 * cell.plain:.1f}"
            yield f"{system}: {suite.name}: {cell.note}{plain}"


def _few_videos(suites: Sequence[SuiteSummary]) -> Iterator[str]:
    """Say which intervals are over so few videos that they are rough."""
    fewest = {
        suite.name: min((c.videos for c in suite.cells.values() if c.interval), default=FEW_VIDEOS)
        for suite in suites
    }
    few = [f"{name} ({count})" for name, count in fewest.items() if count < FEW_VIDEOS]
    if few:
        yield f"rough intervals, over fewer than {FEW_VIDEOS} videos: {', '.join(few)}"


def _systems(runs: Sequence[Run]) -> list[System]:
    return [
        System(
            name=name,
            model=str(run.model.get("name") or run.id),
            attention=str(run.model.get("attention") or ""),
            control=run.control,
            label=run.model.get("label") or None,
            cache_bytes_per_token=_int(run.model.get("cache_bytes_per_token")),
            parameters=_int(run.model.get("parameters")),
            run=run,
        )
        for name, run in zip(_distinct(runs), runs, strict=True)
    ]


def _distinct(runs: Sequence[Run]) -> list[str]:
    """Return a name for every run; equal ones get the run's id, and then a number."""
    names = [_base_name(run) for run in runs]
    for suffix in (" ({id})", " #{number}"):
        repeated = {name for name, count in Counter(names).items() if count > 1}
        names = [
            name + suffix.format(id=run.id, number=i + 1) if name in repeated else name
            for i, (name, run) in enumerate(zip(names, runs, strict=True))
        ]
    return names


def _base_name(run: Run) -> str:
    model = str(run.model.get("name") or run.id)
    name = MODEL_TITLES.get(model, model)
    return f"{name}, {run.control}" if run.control else name


def _int(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) else None


def _suite(name: str, systems: Sequence[System]) -> SuiteSummary:
    tested = [s for s in systems if s.run.samples.get(name)]
    everything = [x for s in tested for x in s.run.samples[name]]
    families = tuple(sorted({x.family for x in everything}))
    bands = {length_band(x.length_s) for x in everything if x.length_s is not None}
    records = {s.name: _record(s.run, name) for s in tested}
    metric = _metric(everything, records)
    # Guessing at single questions says nothing about a score of whole groups of them.
    chance = None if metric == GROUP_SCORE else _chance(everything)
    return SuiteSummary(
        name=name,
        metric=metric,
        chance=chance,
        questions=len({x.id for x in everything}),
        videos=len({x.video_id for x in everything}),
        cells=_with_floor(
            {s.name: _cell(s, name, s.run.samples[name], records[s.name]) for s in tested},
            systems,
            chance,
        ),
        families=families,
        by_family=_grouped(tested, name, lambda x: x.family),
        family_chance={f: _chance([x for x in everything if x.family == f]) for f in families},
        bands=tuple(sorted(bands, key=band_order)),
        by_length=_grouped(
            tested, name, lambda x: None if x.length_s is None else length_band(x.length_s)
        ),
        comparisons=tuple(_comparisons(name, tested)),
    )


_NO_SCORE = {
    Outcome.DROPPED: "unreadable and left out by the official rule",
    Outcome.JUDGE_NEEDED: "only a judge could tell",
    Outcome.NO_TRUTH: "whose truth is not public",
}


def _scored(samples: Iterable[Sample]) -> list[Sample]:
    return [x for x in samples if x.value is not None]


def _unscored_notes(run: Run) -> list[str]:
    notes = []
    for suite, samples in run.samples.items():
        if samples and not _scored(samples):
            counts = Counter(_NO_SCORE[x.official.outcome] for x in samples)
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            notes.append(f"{run.id}: {suite} has no score: {why}")
    return notes


def _record(run: Run, suite: str) -> Mapping[str, Any]:
    """Return a suite's result: as recorded, or taken anew if answers came after it.

    Of samples without documents (the scale world) nothing is taken anew; their number is the mean.
    """
    samples, recorded = run.samples[suite], run.results.get(suite, {})
    if recorded.get("n") == len(samples):
        return recorded
    if any(x.doc is None for x in samples):
        return {}
    benchmark = samples[0].benchmark
    plain = aggregate(benchmark, [(x.doc or {}, x.plain) for x in samples], "plain")
    official = aggregate(benchmark, _rows(samples))
    return official.as_dict() | {"plain": plain.as_dict()}


def _metric(samples: Sequence[Sample], records: Mapping[str, Mapping[str, Any]]) -> str:
    for record in records.values():
        if record.get("metric"):
            return str(record["metric"])
    kinds = {x.answer_type for x in samples}
    names = {"choice": "accuracy", "span": "mIoU"}
    return names.get(kinds.pop(), "score") if len(kinds) == 1 else "score"


def _chance(samples: Iterable[Sample]) -> float | None:
    """Return the mean of 1 / options, or `None` if any answer is not one of several options."""
    shares = [1 / len(x.options) if x.options else None for x in samples]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known and len(known) == len(shares) else None


def _cell(
    system: System,
    suite: str,
    samples: Sequence[Sample],
    recorded: Mapping[str, Any] | None = None,
) -> Cell:
    """Return the cell of a suite and its result, or of a part of one, which has none."""
    whole, recorded = recorded is not None, recorded or {}
    value, interval = _headline(samples, recorded, RESAMPLES if whole else GROUP_RESAMPLES)
    outcomes = Counter(x.official.outcome for x in samples)
    expected = system.run.meta.get("suites", {}).get(suite, {}).get("n") if whole else None
    further = (recorded.get("extra") or {}).items()
    return Cell(
        value=value,
        interval=interval,
        instead=_instead(samples, recorded) if value is None else "",
        plain=_plain(samples, recorded),
        further={key: float(number) for key, number in further if number is not None},
        n=len(samples),
        scored=len(_scored(samples)),
        videos=len({x.video_id for x in samples}),
        expected=_int(expected),
        unreadable=sum(x.unread for x in samples),
        errors=outcomes[Outcome.ERROR],
        no_value=outcomes[Outcome.NO_TRUTH] + outcomes[Outcome.JUDGE_NEEDED],
        judge_needed=_int(recorded.get("judge_needed")) or 0,
        judges=tuple(sorted({x.judge for x in samples if x.judge})),
        caveat=_caveat(samples) if whole and value is not None else "",
        partial=_partial(samples) if whole and value is not None else "",
    )


def _headline(
    samples: Sequence[Sample], recorded: Mapping[str, Any], resamples: int
) -> tuple[float | None, Interval | None]:
    """Return the number of some samples, as recorded or else their mean, and its interval.

    A benchmark's own number may not be determined by the samples; then it is `None`.
    """
    scored = _scored(samples)
    if not scored:
        return None, None
    videos = [x.video_id for x in scored]
    interval = cluster_interval([x.value or 0.0 for x in scored], videos, resamples=resamples)
    if "value" not in recorded:
        return interval.mean, interval
    if recorded["value"] is None:
        return None, None
    value = float(recorded["value"])
    if abs(value - interval.mean) < 1e-6:
        return value, interval
    known = all(x.doc is not None for x in samples)
    return value, _own_interval(value, samples, resamples) if known else None


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What some of a run's answers come to by their benchmark's own rule."""

    value: float | None
    """0 to 1; None where they have no score here."""
    interval: Interval | None
    """None without a score, or where its average cannot be taken anew."""
    instead: str
    """What there is in place of a score."""
    metric: str


def standing(samples: Sequence[Sample]) -> Standing:
    """Return what answers to one suite come to, by the benchmark's own average."""
    known = all(x.doc is not None for x in samples)
    recorded = aggregate(samples[0].benchmark, _rows(samples)).as_dict() if known else {}
    value, interval = _headline(samples, recorded, RESAMPLES)
    instead = _instead(samples, recorded) if value is None else ""
    metric = _metric(samples, {"": recorded})
    return Standing(value=value, interval=interval, instead=instead, metric=metric)


def difference_of(before: Sequence[Sample], after: Sequence[Sample]) -> Difference | None:
    """Return the second answers' score minus the first's, on what both answered with a score."""
    first = {x.id: x for x in before if x.value is not None}
    shared = [(first[x.id], x) for x in after if x.id in first and x.value is not None]
    return _difference(shared) if shared else None


def _instead(samples: Sequence[Sample], recorded: Mapping[str, Any]) -> str:
    """Return what there is of answers that have no score here, or not the benchmark's own."""
    if _scored(samples):
        groups = recorded.get("metric") == GROUP_SCORE
        return "no complete group" if groups else "not determined by these answers"
    outcomes = Counter(x.official.outcome for x in samples)
    unread = sum(x.unread for x in samples)
    if outcomes[Outcome.NO_TRUTH]:
        # EgoSchema is the one whose server takes a file (harness/submission.py).
        submitted = all(x.benchmark == "egoschema" for x in samples)
        what = "submission file" if submitted else "truth not public"
        return f"{what}, unreadable: {unread}" if unread else what
    if outcomes[Outcome.JUDGE_NEEDED]:
        return f"judge needed: {outcomes[Outcome.JUDGE_NEEDED]}"
    return f"unreadable: {unread}"


def _partial(samples: Sequence[Sample]) -> str:
    """Say which answers a score leaves out."""
    left_out = Counter(_NO_SCORE[x.official.outcome] for x in samples if x.value is None)
    if not left_out:
        return ""
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
    return f"it is of {len(_scored(samples))} of {len(samples)} answers: {why}"


def _caveat(samples: Sequence[Sample]) -> str:
    """Return what credit a benchmark's own code gives to answers that say nothing."""
    if all(x.benchmark == "videomme_v2" for x in samples):
        lost = sum(x.unread or x.official.outcome is Outcome.ERROR for x in samples)
        credit = "to which the official code gives credit in groups of logic"
        return f"{lost} answers are unreadable or failed, {credit}" if lost else ""
    if all(x.benchmark == "mvbench" for x in samples):
        empty = sum(bool(x.value) and x.plain.outcome is Outcome.UNREADABLE for x in samples)
        credit = "which the official code takes for right"
        return f"{empty} answers are empty or a lone bracket, {credit}" if empty else ""
    return ""


def _plain(samples: Sequence[Sample], recorded: Mapping[str, Any]) -> float | None:
    """Return the number under the plain rule: as recorded, else the mean over questions."""
    if recorded.get("plain"):
        return cast("float | None", recorded["plain"].get("value"))
    values = [x.plain.value for x in samples if x.plain.value is not None]
    return sum(values) / len(values) if values else None


def _own_interval(value: float, samples: Sequence[Sample], resamples: int) -> Interval | None:
    """Return the interval of an average that is no mean over questions, by its own rule."""
    own = headline(samples[0].benchmark)
    found = own.units(_rows(samples), "official")
    units = [(samples[u.row].video_id, u.part, u.value) for u in found]
    if not units:
        return None
    return statistic_interval(
        value,
        units,
        lambda means: own.combine(means, "official"),
        n=len(samples),
        resamples=resamples,
    )


def _rows(samples: Sequence[Sample]) -> list[Row]:
    """Return samples that have documents as scoring's rows."""
    return [(x.doc or {}, x.official) for x in samples]


def _with_floor(
    cells: dict[str, Cell], systems: Sequence[System], chance: float | None
) -> dict[str, Cell]:
    """Mark the cells whose whole interval lies above chance and above every floor's mean.

    The shuffled control is no floor: it shows all of the video, and questions that need no order
    are answered as well with it.
    """
    controls = {s.name for s in systems if s.is_control}
    hiding = {s.name for s in systems if s.control in HIDING}
    hidden = [cells[name].value for name in hiding & cells.keys()]
    floors = [floor for floor in (*hidden, chance) if floor is not None]
    if not floors:
        return cells
    return {
        name: cell
        if name in controls or cell.interval is None
        else replace(cell, above_floor=cell.interval.low > max(floors))
        for name, cell in cells.items()
    }


def _grouped(tested: Sequence[System], suite: str, key: Callable[[Sample], str | None]) -> Cells:
    groups: dict[str, dict[System, list[Sample]]] = {}
    for system in tested:
        for sample in system.run.samples[suite]:
            name = key(sample)
            if name is not None:
                groups.setdefault(name, {}).setdefault(system, []).append(sample)
    return {
        (system.name, name): _cell(system, suite, samples)
        for name, by_system in groups.items()
        for system, samples in by_system.items()
        if _scored(samples)
    }


def pairs(systems: Sequence[System]) -> list[tuple[System, System]]:
    """Return the pairs worth comparing as (reference, candidate).

    Every M²LA system against every GQA system, then the systems of one kind against the first of
    it; where attention is not told apart, every system against the first. Controls are compared
    where there are just two runs.
    """
    real = [s for s in systems if not s.is_control]
    if len(systems) == 2 and len(real) < 2:
        return [(systems[0], systems[1])]
    gqa = [s for s in real if s.attention == "gqa"]
    latent = [s for s in real if s.attention == "m2la"]
    if gqa and latent:
        across = [(g, m) for m in latent for g in gqa]
        return across + [(kind[0], other) for kind in (gqa, latent) for other in kind[1:]]
    return [(real[0], s) for s in real[1:]]


def same_data(suite: str, *runs: Run) -> bool:
    """Return whether runs read the same questions and videos, as far as they say."""
    digests = {run.meta.get("suites", {}).get(suite, {}).get("data_digest") for run in runs}
    return len(digests - {None}) < 2


def _data_notes(suite: str, systems: Sequence[System]) -> list[str]:
    tested = [s for s in systems if s.run.samples.get(suite)]
    return [
        f"{suite}: {a.name} and {b.name} ran on different data and are not compared"
        for a, b in pairs(tested)
        if not same_data(suite, a.run, b.run)
    ]


def _comparisons(suite: str, tested: Sequence[System]) -> Iterable[Comparison]:
    for a, b in pairs(tested):
        if not same_data(suite, a.run, b.run):
            continue
        difference = difference_of(a.run.samples[suite], b.run.samples[suite])
        if difference is not None:
            yield Comparison(a=a.name, b=b.name, suite=suite, difference=difference)


def _difference(shared: Sequence[tuple[Sample, Sample]]) -> Difference | None:
    """Second minus first, by the benchmark's own average where that is no mean over questions.

    Wins, losses and McNemar's test are of questions in any case. `None` where the shared questions
    do not determine that average.
    """
    found = paired_difference(
        [x.value or 0.0 for x, _ in shared],
        [y.value or 0.0 for _, y in shared],
        [x.video_id for x, _ in shared],
    )
    if any(one.doc is None for pair in shared for one in pair):
        return found

    own = headline(shared[0][0].benchmark)
    before, after = ([pair[side] for pair in shared] for side in (0, 1))
    first, second = own.value(_rows(before), "official"), own.value(_rows(after), "official")
    if first is None or second is None:
        return None
    if abs(second - first - found.interval.mean) < 1e-6:
        return found

    def apart(means: Mapping[tuple[int, str], float | None]) -> float | None:
        sides = [{part: m for (at, part), m in means.items() if at == side} for side in (0, 1)]
        drawn = [own.combine(of_side, "official") for of_side in sides]
        return None if drawn[0] is None or drawn[1] is None else drawn[1] - drawn[0]

    units = [
        (samples[unit.row].video_id, (side, unit.part), unit.value)
        for side, samples in enumerate((before, after))
        for unit in own.units(_rows(samples), "official")
    ]
    interval = statistic_interval(second - first, units, apart, n=len(shared), bounds=(-1.0, 1.0))
    return replace(found, interval=interval)
