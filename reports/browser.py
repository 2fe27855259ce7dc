"""The samples that the page's browser shows: which, with which pictures, as JSON data."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from internvideo3.reports import wording
from internvideo3.reports.load import Run, Sample
from internvideo3.reports.summary import SuiteSummary, Summary, System
from internvideo3.reports.thumbnails import Sampling, Thumbnailer, Wanted, moments
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS, SUBTITLED
from internvideo3.tasks.benchmarks.protocol import Benchmark
from internvideo3.tasks.scoring.numeric import read_span

SAMPLES_PER_SUITE = 36
VIDEOS_PER_SUITE = 10
FRAMES_PER_SAMPLE = 5
IMAGE_BUDGET_BYTES = 3_500_000
LONGEST_TEXT = 2_000
FPS, MAX_FRAMES = 2.0, 768
"""What is sampled where a run does not say: the harness's defaults."""
RIGHT_FROM = 0.5
"""Graded answers (spans, distances) count as right from this score on."""


@dataclass(frozen=True, slots=True)
class Browser:
    """Data for the page's sample browser."""

    payload: dict[str, Any]
    """JSON data: systems, suites, samples, images."""
    shown: int
    total: int
    notes: tuple[str, ...]


def collect(summary: Summary) -> Browser:
    """Choose samples and take their pictures.

    The choice covers every family and every pattern of right and wrong answers of each suite; it
    is the same for equal runs, and it is not a random sample.
    """
    camera = Thumbnailer(IMAGE_BUDGET_BYTES)
    images: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    total = 0
    for suite in summary.suites:
        answers = _answers(summary, suite)
        total += len(answers)
        for by_system in _choose(answers, SAMPLES_PER_SUITE, VIDEOS_PER_SUITE):
            rows.append(_row(by_system, summary, camera, images))
    camera.close()
    payload = {
        "systems": [{"name": s.name, "label": s.label or ""} for s in summary.systems],
        "pairs": _pairs(summary),
        "suites": {s.name: wording.suite_title(s.name) for s in summary.suites},
        "families": {f: wording.family(f) for s in summary.suites for f in s.families},
        "samples": rows,
        "images": list(images),
        "rightFrom": RIGHT_FROM,
    }
    return Browser(payload, len(rows), total, (*_unknown(summary), *_notes(camera)))


def _pairs(summary: Summary) -> list[list[int]]:
    """Places of the two systems of each comparison, the reference first."""
    place = {system.name: number for number, system in enumerate(summary.systems)}
    found = dict.fromkeys((c.a, c.b) for suite in summary.suites for c in suite.comparisons)
    return [[place[a], place[b]] for a, b in found]


def _notes(camera: Thumbnailer) -> tuple[str, ...]:
    notes = [f"no pictures of {video}: {why}" for video, why in sorted(camera.failed.items())]
    if camera.left <= 0:
        notes.append("the page's room for pictures is used up; some samples have none")
    return tuple(notes)


Answers = dict[str, dict[System, Sample]]
"""Sample id → what each system answered, in the report's order of systems."""


def _answers(summary: Summary, suite: SuiteSummary) -> Answers:
    answers: Answers = {}
    for system in summary.systems:
        for sample in system.run.samples.get(suite.name, ()):
            answers.setdefault(sample.id, {})[system] = sample
    return answers


def _choose(answers: Answers, count: int, videos: int) -> list[dict[System, Sample]]:
    """Take samples in turn from every family and pattern of right and wrong, from few videos."""
    strata: dict[tuple[str, str], list[str]] = {}
    for key in sorted(answers, key=lambda k: hashlib.sha256(k.encode()).digest()):
        first = next(iter(answers[key].values()))
        strata.setdefault((first.family, _pattern(answers[key])), []).append(key)
    chosen: list[str] = []
    used: set[str] = set()
    queues = [strata[name] for name in sorted(strata)]
    while len(chosen) < count and any(queues):
        for queue in queues:
            taken = _next(queue, answers, used, open_to_new=len(used) < videos)
            if taken is not None and len(chosen) < count:
                chosen.append(taken)
                used.add(_video(answers[taken]))
    order = {key: i for i, key in enumerate(answers)}
    return [answers[key] for key in sorted(chosen, key=order.__getitem__)]


def _next(queue: list[str], answers: Answers, used: set[str], *, open_to_new: bool) -> str | None:
    """Take the next sample, preferring videos in use; the queue is emptied when none is left."""
    for i, key in enumerate(queue):
        if open_to_new or _video(answers[key]) in used:
            return queue.pop(i)
    queue.clear()
    return None


def _video(by_system: Mapping[System, Sample]) -> str:
    return next(iter(by_system.values())).video_id


def _pattern(by_system: Mapping[System, Sample]) -> str:
    real = [x for system, x in by_system.items() if not system.is_control]
    return "".join("1" if (x.value or 0.0) >= RIGHT_FROM else "0" for x in real)


def _row(
    by_system: Mapping[System, Sample],
    summary: Summary,
    camera: Thumbnailer,
    images: dict[str, int],
) -> dict[str, Any]:
    system, sample = next(iter(by_system.items()))
    return {
        "id": sample.id,
        "suite": sample.suite,
        "family": sample.family,
        "seconds": sample.length_s,
        "question": _cut(sample.question),
        "options": [_cut(option) for option in sample.options],
        "answer": _cut(sample.answer),
        "kind": sample.answer_type,
        "evidence": [list(span) for span in sample.evidence],
        "frames": _frames(system, sample, camera, images),
        "answers": [_answer(by_system.get(s)) for s in summary.systems],
    }


def _frames(
    system: System, sample: Sample, camera: Thumbnailer, images: dict[str, int]
) -> list[dict[str, Any]]:
    if sample.video is None or system.control == "text":
        return []
    length_s = sample.length_s if sample.length_s else camera.length_s(sample.video)
    times_s = tuple(moments(sample.evidence, length_s))
    taken = camera.take(sample.video, Wanted(times_s, FRAMES_PER_SAMPLE, _sampling(system, sample)))
    return [
        {
            "t": picture.time_s,
            "image": images.setdefault(picture.uri, len(images)),
            "evidence": any(a <= picture.time_s <= b for a, b in sample.evidence),
        }
        for picture in taken
    ]


def _sampling(system: System, sample: Sample) -> Sampling:
    """How the frames of a question were taken: of an agentic answer, those of its first look."""
    run = system.run
    # Benchmarks have settings of their own; elsewhere the run's count.
    settings = run.meta.get("suites", {}).get(sample.suite, {}).get("settings") or run.config
    own = sample.sampling or {}
    return Sampling(
        fps=float(own.get("fps") or settings.get("fps") or FPS),
        max_frames=int(settings.get("max_frames") or MAX_FRAMES),
        steps_over_s=own.get("steps_over_s"),
    )


def _unknown(summary: Summary) -> Iterator[str]:
    """Say of which suites the frames are not known: runs of earlier versions do not tell."""
    for suite in summary.suites:
        benchmark = BENCHMARKS.get(suite.name.removesuffix(SUBTITLED))
        runs = [s.run for s in summary.systems if s.run.samples.get(suite.name)]
        if benchmark is not None and any(_untold(benchmark, run, suite.name) for run in runs):
            yield (
                f"{benchmark.title}: how frames were taken depends on the question, and a run of "
                "an earlier version does not tell; the pictures are by its settings"
            )


def _untold(benchmark: Benchmark, run: Run, suite: str) -> bool:
    """Whether a question decides its frames, and the run does not say how."""
    protocol = run.meta.get("suites", {}).get(suite, {}).get("protocol") or {}
    preset = benchmark.official if protocol.get("preset") == "official" else benchmark.paper
    decides = benchmark.between is not None or preset.question_frames is not None
    return decides and any(sample.sampling is None for sample in run.samples[suite])


def _answer(sample: Sample | None) -> dict[str, Any] | None:
    if sample is None:
        return None
    span = read_span(sample.prediction or "") if sample.answer_type == "span" else None
    return {
        "text": None if sample.prediction is None else _cut(sample.prediction),
        "value": sample.value,
        "plain": sample.plain.value,
        "outcome": str(sample.official.outcome),
        "error": sample.error,
        "span": None if span is None else list(span),
        "choice": _choice(sample),
    }


def _choice(sample: Sample) -> int | None:
    """Return the index of the option that the official rule read, if it read one."""
    parsed = sample.official.parsed
    if sample.answer_type != "choice" or not isinstance(parsed, str) or len(parsed) != 1:
        return None
    return ascii_uppercase.find(parsed)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " … (cut)"
