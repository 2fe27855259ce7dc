"""What can be known to be wrong before any weights are read: suites, checkpoints, videos.

No torch here: a wrong name should cost a second, not a minute.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from internvideo3.harness.provenance import file_digest
from internvideo3.tasks.benchmarks import prompts
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS, SUBTITLED, suites
from internvideo3.tasks.benchmarks.lmms import METRIC, task_name
from internvideo3.tasks.benchmarks.local import DataError, Local, load_local
from internvideo3.tasks.benchmarks.protocol import Preset, PresetName, no_videos
from internvideo3.tasks.brief import EVALUABLE
from internvideo3.tasks.world.suites import SUITES

Doc = dict[str, Any]
Subtitles = Literal["off", "on", "both"]

ALL_SUITES = "scale"
_SHOWN = 5


class PreflightError(ValueError):
    """Something named on the command line is missing or of the wrong kind."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One suite as it lies on disk: of the scale world, or a benchmark (then `local` is set)."""

    suite: str
    """Its name."""
    folder: Path
    """Where the videos' relative paths start: `<root>/<split>`, or the benchmark's folder."""
    docs: tuple[Doc, ...]
    """The documents to be answered, in the data set's order."""
    everything: tuple[Doc, ...] = ()
    """All documents of the data set."""
    digest: str
    """SHA-256 of the data set's file."""
    local: Local | None = None
    """The benchmark's data."""
    preset: Preset | None = None
    """The benchmark's settings."""
    tasks: Path | None = None
    """Where the task's YAML is; None for the place where `world build` puts it."""

    @property
    def whole(self) -> int:
        """How many documents the data set has."""
        return len(self.everything)

    @property
    def selected(self) -> bool:
        """Whether `docs` is a selection."""
        return len(self.docs) < self.whole

    @property
    def task(self) -> str:
        """lmms-eval's name of the task."""
        return task_name(self.suite)

    @property
    def scorer(self) -> str:
        """The suite's name in scoring."""
        return self.local.benchmark.scorer if self.local else self.suite

    @property
    def tasks_folder(self) -> Path:
        """Where the task's YAML is."""
        return self.tasks or self.folder / "lmms"

    @property
    def metric(self) -> str | None:
        """lmms-eval's key of the number; None for the scorer's own name of it."""
        return METRIC if self.local else None

    def videos(self, doc: Mapping[str, Any]) -> tuple[Path, ...]:
        """Paths of a document's videos."""
        if self.local:
            return tuple(Path(one) for one in doc["videos"])
        return (self.folder / str(doc["video"]),)

    def media(self, doc: Mapping[str, Any]) -> tuple[Path, ...]:
        """Paths of all files that a document shows."""
        between = doc.get("between")
        subtitles = [between["path"]] if between else []
        return (*self.videos(doc), *(Path(one) for one in [*(doc.get("images") or ()), *subtitles]))


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that offers the known names nearest to a wrong one."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(known)}."


def suite_names(text: str, subtitles: Subtitles = "off") -> list[str]:
    """Names of suites out of a comma-separated list.

    `scale` stands for all of the scale world; `long`, `short`, `grounding`, `spatial`, `paper` and
    `classic` for groups of benchmarks.

    Args:
        text: the list.
        subtitles: `on` to show the subtitles of benchmarks that have some, `both` to run those
            with and without.

    Raises:
        PreflightError: a name is unknown; the nearest are offered.
    """
    groups = suites() | {ALL_SUITES: tuple(SUITES)}
    names: list[str] = []
    if subtitles != "off":
        _check_subtitled(text, groups)
    for part in (part.strip() for part in text.split(",")):
        if part in groups:
            names.extend(groups[part])
        elif part in EVALUABLE or part.removesuffix(SUBTITLED) in BENCHMARKS:
            names.append(part)
        else:
            offer = nearest(part, [*EVALUABLE, *BENCHMARKS, *groups])
            raise PreflightError(f"Unknown suite {part!r}. {offer}")
    return list(dict.fromkeys(one for name in names for one in _subtitled(name, subtitles)))


def _check_subtitled(text: str, groups: Mapping[str, Sequence[str]]) -> None:
    """Refuse to ask for subtitles where nothing that is named has any."""
    parts = [part.strip() for part in text.split(",")]
    asked = {name for part in parts for name in groups.get(part, (part,))}
    having = {one.name for one in BENCHMARKS.values() if one.subtitles is not None}
    if asked <= {*EVALUABLE, *BENCHMARKS} - having:
        raise PreflightError(
            f"--subtitles: none of {', '.join(parts)} has subtitles to show; these have: "
            f"{', '.join(sorted(having))}. Leave the option out."
        )


def _subtitled(name: str, subtitles: Subtitles) -> tuple[str, ...]:
    if name not in BENCHMARKS or BENCHMARKS[name].subtitles is None or subtitles == "off":
        return (name,)
    return (f"{name}{SUBTITLED}",) if subtitles == "on" else (name, f"{name}{SUBTITLED}")


def shows_videos(suite: str) -> bool:
    """Whether a suite is about videos, and not about images alone."""
    known = BENCHMARKS.get(suite.removesuffix(SUBTITLED))
    return known is None or known.videos is not no_videos


def check_sample_ids(suites: Sequence[str], sample_ids: Sequence[str]) -> None:
    """Raise if a sample's id begins with the name of no suite.

    Raises:
        PreflightError: with the id.
    """
    for sample in sample_ids:
        if sample.split("/")[0] not in suites:
            raise PreflightError(
                f"--sample-id {sample} belongs to none of the suites {', '.join(suites)}; an id "
                "starts with its suite's name."
            )


def find_benchmark(
    suite: str,
    data: Path,
    preset: PresetName,
    *,
    tasks: Path,
    limit: int | None,
    sample_ids: Sequence[str],
) -> Benchmark:
    """Read a benchmark's documents and choose among them.

    Args:
        suite: its name, with `_subtitles` at the end to show them.
        data: the data root.
        preset: under which settings it is run.
        tasks: where its lmms-eval task will be.
        limit: answer only the first so many; None for all.
        sample_ids: answer only these; empty for all.

    Raises:
        PreflightError: the data is missing or of another layout, an id is unknown.
    """
    name = suite.removesuffix(SUBTITLED)
    benchmark = BENCHMARKS[name]
    shown = suite != name
    settings = with_subtitles(name, benchmark.preset(preset)) if shown else benchmark.preset(preset)
    try:
        local = load_local(benchmark, data, settings, subtitles=shown)
    except DataError as error:
        raise PreflightError(
            f"{error} `internvideo3 suites {name}` describes the layout; "
            "`eval --check` lists everything that is missing; --data says where it is."
        ) from error
    docs = list(local.docs)
    return Benchmark(
        suite=suite,
        folder=local.folder.resolve(),
        docs=tuple(_chosen(suite, docs, limit, sample_ids)),
        everything=local.docs,
        digest=local.digest,
        local=local,
        preset=settings,
        tasks=tasks,
    )


def with_subtitles(name: str, preset: Preset) -> Preset:
    """A preset whose prompt shows the subtitles."""
    forms = {
        "videomme": prompts.videomme_subtitles,
        "videomme_v2": prompts.videomme_v2_subtitles,
        "longvideobench": prompts.longvideobench_subtitles,
    }
    return replace(preset, prompt=forms[name])


def load_benchmark(
    suite: str, root: Path, split: str, *, limit: int | None, sample_ids: Sequence[str]
) -> Benchmark:
    """Read a suite's documents and choose among them.

    Args:
        suite: its name.
        root: the world's root folder.
        split: test, validation or train.
        limit: answer only the first so many; None for all.
        sample_ids: answer only these; empty for all.

    Raises:
        PreflightError: the suite is not built, an id is unknown, or a limit is not positive.
    """
    folder = root / split
    path, task = folder / f"{suite}.jsonl", folder / "lmms" / f"iv3_{suite}.yaml"
    absent = next((file for file in (path, task) if not file.is_file()), None)
    if absent:
        where = f"--split {split} --root {root}"
        building = f"Build it with `internvideo3 world build {suite} {where}`"
        if suite in SUITES:
            building += f", or all six with `internvideo3 world build {where}`"
        raise PreflightError(f"Suite {suite} is not built: {absent} is missing. {building}.")
    with path.open(encoding="utf-8") as lines:
        docs = [json.loads(line) for line in lines]
    chosen = _chosen(suite, docs, limit, sample_ids)
    return Benchmark(
        suite=suite,
        folder=folder.resolve(),
        docs=tuple(chosen),
        everything=tuple(docs),
        digest=file_digest(path),
    )


def check_videos(benchmarks: Sequence[Benchmark], accepted: int = 0) -> None:
    """Raise if files that the documents show are missing.

    A video without content is the run's to record, like any other that cannot be decoded; where
    files are missing it is listed with them.

    Args:
        benchmarks: the suites.
        accepted: how many questions may fail; so many are left to the run to record.

    Raises:
        PreflightError: with the first few paths and how many there are.
    """
    wanted = {path for one in benchmarks for doc in one.docs for path in one.media(doc)}
    missing = sorted({path for one in benchmarks for path in missing_media(one)})
    videos = {str(path) for one in benchmarks for doc in one.docs for path in one.videos(doc)}
    lost = lost_questions(benchmarks, missing)
    if lost > accepted and any(not Path(path).is_file() or path not in videos for path in missing):
        listed = "\n".join(f"  {path}" for path in missing[:_SHOWN])
        more = f"\n  and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        ours = any(one.local is None for one in benchmarks)
        raise PreflightError(
            f"{len(missing)} of {len(wanted)} videos are missing or empty:\n{listed}{more}\n"
            + ("Run `internvideo3 world build` for these suites again; it makes only what is "
               "missing." if ours else "`internvideo3 eval --check` says where to get them.")
            + f" Or accept that {lost} questions fail and count as wrong: --max-errors {lost}."
        )  # fmt: skip


def lost_questions(benchmarks: Sequence[Benchmark], missing: Iterable[str]) -> int:
    """How many of the chosen questions show one of these files."""
    paths = set(missing)
    return sum(
        any(str(path) in paths for path in one.media(doc)) for one in benchmarks for doc in one.docs
    )


def missing_media(benchmark: Benchmark) -> tuple[str, ...]:
    """Files that the chosen documents show and that are missing or empty, in order."""
    wanted = {path for doc in benchmark.docs for path in benchmark.media(doc)}
    return tuple(sorted(str(path) for path in wanted if not _has_content(path)))


def blind_videos(benchmark: Benchmark) -> dict[str, Path]:
    """For each video of a suite another one, of the same length where there is one.

    The control asks every question about a video that does not show the answer. The choice is a
    rotation among the videos of one length; a length with a single video takes the nearest one.
    It depends on the whole data set, so a limit does not change it.

    Raises:
        PreflightError: the suite has only one video.
    """
    shown = [(doc, videos[0]) for doc in benchmark.everything if (videos := benchmark.videos(doc))]
    lengths = {str(doc["video_id"]): float(doc["length_s"] or 0.0) for doc, _ in shown}
    paths = {str(doc["video_id"]): video for doc, video in shown}
    if len(lengths) < 2:
        raise PreflightError(
            f"The blind control needs two videos; {benchmark.suite} has {len(lengths)}. "
            "Build more of the suite, or take another control."
        )
    return {video: paths[_partner(video, lengths)] for video in lengths}


def _partner(video: str, lengths: Mapping[str, float]) -> str:
    same = sorted(other for other in lengths if lengths[other] == lengths[video])
    if len(same) > 1:
        return same[(same.index(video) + 1) % len(same)]
    others = (other for other in lengths if other != video)
    return min(others, key=lambda other: (abs(lengths[other] - lengths[video]), other))


def _chosen(suite: str, docs: list[Doc], limit: int | None, ids: Sequence[str]) -> list[Doc]:
    if limit is not None and limit < 1:
        raise PreflightError(f"--limit must be at least 1, got {limit}.")
    if ids:
        known = {doc["id"] for doc in docs}
        wanted = {one for one in ids if one.split("/")[0] == suite}
        for one in sorted(wanted - known):
            close = difflib.get_close_matches(one, known, n=3)
            hint = f"Near: {', '.join(close)}." if close else f"For example: {docs[0]['id']}."
            raise PreflightError(f"Unknown sample {one!r} in suite {suite}. {hint}")
        docs = [doc for doc in docs if doc["id"] in wanted]
    return docs[:limit]


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
