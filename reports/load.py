"""Reading runs from disk: `runs/<id>/` with run.json, samples, timings, results, measurements.

Tolerant where a run that was killed may be damaged (a torn last line, a missing results.json, one
of other answers than those on disk), and strict elsewhere. What was tolerated is said in
`Run.notes`.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internvideo3.tasks.scoring import Outcome, Score

SCHEMA = 1
SAMPLES_DIGEST = "samples_sha256"
"""Field of a result: digest of the samples file that it is of; runs of older versions lack it."""


class RunError(ValueError):
    """A folder that is not a run, or a run that cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answered question, as recorded."""

    id: str
    suite: str
    video_id: str
    family: str
    length_s: float | None
    question: str
    options: tuple[str, ...]
    answer: str
    answer_type: str
    evidence: tuple[tuple[float, float], ...]
    """Spans of the video, in seconds, in which the answer can be seen."""
    video: Path | None
    prediction: str | None
    official: Score
    plain: Score
    error: str | None
    benchmark: str
    """Name of the scorer; the suite's own for the scale world."""
    doc: Mapping[str, Any] | None
    """What of the document scoring reads, where the record keeps it apart."""
    tokens: int = 0
    """Tokens of prompt and reply."""
    agent: Mapping[str, Any] | None = None
    """How a rollout ended and what it cost; None for a direct answer."""
    sampling: Mapping[str, Any] | None = None
    """What decides its frames beside the suite's settings: `fps`, `steps_over_s`."""
    judge: str | None = None
    """The model that gave the score, or rated the reasoning beside it; None where none did."""

    @property
    def value(self) -> float | None:
        """The official score, 0 to 1."""
        return self.official.value

    @property
    def unread(self) -> bool:
        """Whether text came back and no answer could be read from it.

        The rule may make that a 0, leave it out of the average, or, where the truth is not public,
        have nothing to submit.
        """
        hidden = self.official.outcome is Outcome.NO_TRUTH and self.official.parsed is None
        return hidden or self.official.outcome in (Outcome.UNREADABLE, Outcome.DROPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: one model, one configuration, any number of suites."""

    path: Path
    meta: Mapping[str, Any]
    """The content of run.json."""
    samples: Mapping[str, tuple[Sample, ...]]
    """Samples of each suite in dataset order."""
    results: Mapping[str, Mapping[str, Any]]
    """results.json: the TaskResult of each finished suite, unless it is of other answers."""
    measurements: tuple[Mapping[str, Any], ...]
    timings: Mapping[str, tuple[Mapping[str, Any], ...]]
    notes: tuple[str, ...] = field(default=())
    """What was tolerated while reading, in words."""

    @property
    def id(self) -> str:
        """The run's id."""
        return str(self.meta.get("id") or self.path.name)

    @property
    def model(self) -> Mapping[str, Any]:
        """The `model` part of run.json."""
        return _mapping(self.meta.get("model"))

    @property
    def config(self) -> Mapping[str, Any]:
        """The `config` part of run.json."""
        return _mapping(self.meta.get("config"))

    @property
    def control(self) -> str | None:
        """Name of the control (`blind`) that this run is, if it is one."""
        control = self.config.get("control")
        return str(control) if control else None


def load_runs(paths: list[Path]) -> list[Run]:
    """Read several runs, in the order given.

    Raises:
        RunError: No paths, or a folder that cannot be read as a run.
    """
    if not paths:
        raise RunError("no run folders were given; name at least one folder with a run.json")
    return [load_run(Path(path)) for path in paths]


def load_run(path: Path) -> Run:
    """Read one run folder.

    Raises:
        RunError: No run.json, an unknown schema, nothing recorded, or a damaged file (other than
            its last line).
    """
    meta = _read_object(path / "run.json")
    if meta.get("schema") != SCHEMA:
        raise RunError(
            f"{path / 'run.json'} has schema {meta.get('schema')!r}; this version reads {SCHEMA}. "
            "Use the version that wrote the run."
        )
    notes: list[str] = list(_unmerged(path))
    samples = {}
    twice: set[str] = set()
    for file in sorted((path / "samples").glob("*.jsonl")):
        lines = _read_lines(file, notes)
        rows = _unique(lines, file, notes)
        if len(rows) < len(lines):
            twice.add(file.stem)
        read = [_sample(row, file) for row in rows]
        samples[file.stem] = tuple(sorted(read, key=lambda s: _natural(s.id)))
    timings = {
        file.stem: tuple(_read_lines(file, notes))
        for file in sorted((path / "timings").glob("*.jsonl"))
    }
    measured = path / "measurements.jsonl"
    results = path / "results.json"
    if not any(samples.values()) and not measured.exists():
        raise RunError(
            f"{path} has no answers and no measurements yet, so there is nothing to report; "
            + ("; ".join(notes) or "repeat the command that started it")
        )
    return Run(
        path=path,
        meta=meta,
        samples=samples,
        results=_fresh(_read_object(results), path, twice, notes) if results.exists() else {},
        measurements=tuple(_read_lines(measured, notes)) if measured.exists() else (),
        timings=timings,
        notes=tuple(notes),
    )


def _unmerged(path: Path) -> Iterator[str]:
    """Say which answers lie in parts, of shards or of a launch that did not end."""
    files = path.glob("parts/*/samples/*.jsonl")
    suites = sorted({file.stem for file in files if file.stat().st_size})
    if suites:
        yield (
            f"answers to {', '.join(suites)} are in parts and not counted: merge them by the "
            "command that made them, without --shard"
        )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise RunError(
            f"{file} does not exist, so {file.parent} is not a run folder; "
            "give the folder that `internvideo3 eval --out` wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {file}: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return value


def _fresh(
    results: Mapping[str, Any], folder: Path, twice: set[str], notes: list[str]
) -> dict[str, Any]:
    """The results that are of the samples on disk.

    A retry or a scoring that was interrupted leaves those of other samples. Where a result has no
    digest, a sample that was recorded twice tells of a retry.
    """
    fresh = {}
    for suite, result in results.items():
        file = folder / "samples" / f"{suite}.jsonl"
        recorded = _mapping(result).get(SAMPLES_DIGEST)
        if recorded is not None and file.exists():
            stale = _digest(file) != recorded
        else:
            stale = suite in twice
        if stale:
            notes.append(
                f"{suite}: results.json is of other answers than those on disk (a retry or a "
                "scoring has not ended), so its numbers were taken anew; "
                f"`internvideo3 score {folder}` records them"
            )
        else:
            fresh[suite] = result
    return fresh


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read_lines(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read JSON lines; a torn last line is left out and noted."""
    lines = file.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8", errors="replace"))
        except ValueError as error:
            if number != len(lines):
                raise RunError(
                    f"{file}, line {number}, is not JSON ({error}); restore the file or delete "
                    "that line, and its sample will be answered again"
                ) from error
            notes.append(f"{file.parent.name}/{file.name}: the last line is torn and was left out")
            continue
        if not isinstance(row, dict):
            raise RunError(f"{file}, line {number}, is not a JSON object")
        rows.append(row)
    return rows


def _unique(rows: list[dict[str, Any]], file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the row of each id that counts; that there are others is noted.

    The rule is the run store's, which decides what a resumed run and `score` take: one without an
    error, of several the last. A retry that is not finished leaves both rows on disk.
    """
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = str(row.get("id"))
        if name in kept:
            notes.append(
                f"{file.name}: {name} was recorded twice; the last one without an error counts"
            )
        if name not in kept or kept[name].get("error") or not row.get("error"):
            kept[name] = row
    return list(kept.values())


def _sample(row: Mapping[str, Any], file: Path) -> Sample:
    try:
        error, length_s = _mapping(row.get("error")), row.get("length_s")
        return Sample(
            id=str(row["id"]),
            suite=file.stem,
            video_id=str(row["video_id"]),
            family=str(row.get("family") or "all"),
            length_s=None if length_s is None else _finite("length_s", length_s),
            question=str(row.get("question") or ""),
            options=tuple(map(str, row.get("options") or ())),
            answer=str(row["answer"]),
            answer_type=str(row.get("answer_type") or "choice"),
            evidence=tuple(_span(span) for span in row.get("evidence") or ()),
            video=Path(row["video"]) if row.get("video") else None,
            prediction=None if row.get("prediction") is None else str(row["prediction"]),
            official=_score("official", row.get("official")),
            plain=_score("plain", row.get("plain")),
            error=f"{error.get('type')}: {error.get('message')}" if error else None,
            benchmark=str(row.get("benchmark") or file.stem),
            doc=row.get("doc"),
            tokens=sum(int(n) for n in _mapping(row.get("tokens")).values()),
            agent=row.get("agent"),
            sampling=row.get("sampling"),
            judge=str(row["judge"]) if row.get("judge") else None,
        )
    except (KeyError, TypeError, ValueError, OverflowError) as problem:
        raise RunError(
            f"{file}: sample {row.get('id')!r} cannot be read: {problem!r}; repair its line, or "
            "delete it, and the sample will be answered again"
        ) from problem


def _finite(name: str, value: Any) -> float:
    """A number that averages, axes and the page can hold.

    Raises:
        ValueError: it is infinite or NaN.
    """
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, expected a finite number")
    return number


def _span(ends: Any) -> tuple[float, float]:
    start_s, end_s = (_finite("evidence", end) for end in ends)
    return start_s, end_s


def _score(rule: str, data: Any) -> Score:
    """Read a recorded score; none was recorded for a sample that failed."""
    if not data:
        return Score(0.0, None, Outcome.ERROR)
    score = Score.from_dict(data)
    if score.value is not None:
        _finite(f"{rule}.value", score.value)
    return score


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _natural(text: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key under which `q10` follows `q9`."""
    parts = re.split(r"([0-9]+)", text)
    return tuple((int(p[:18]), p) if p.isdecimal() and p.isascii() else (-1, p) for p in parts)
