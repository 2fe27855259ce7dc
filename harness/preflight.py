"""What can be known to be wrong before any weights are read: suites, checkpoints, videos.

No torch here: a wrong name should cost a second, not a minute.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvideo3.harness.provenance import file_digest
from internvideo3.tasks.world.suites import SUITES

Doc = dict[str, Any]

ALL_SUITES = "scale"
_SHOWN = 5


class PreflightError(ValueError):
    """Something named on the command line is missing or of the wrong kind."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One suite as it lies on disk."""

    suite: str
    """Its name."""
    folder: Path
    """Where the videos' relative paths start: `<root>/<split>`."""
    docs: tuple[Doc, ...]
    """The documents to be answered, in the data set's order."""
    whole: int
    """How many documents the data set has."""
    digest: str
    """SHA-256 of the data set's file."""
    selected: bool
    """Whether `docs` is a selection."""

    @property
    def task(self) -> str:
        """lmms-eval's name of the task."""
        return f"iv3_{self.suite}"

    @property
    def tasks_folder(self) -> Path:
        """Where the task's YAML is."""
        return self.folder / "lmms"

    def video(self, doc: Mapping[str, Any]) -> Path:
        """Path of a document's video."""
        return self.folder / str(doc["video"])


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that offers the known names nearest to a wrong one."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(known)}."


def suite_names(text: str) -> list[str]:
    """Names of suites out of a comma-separated list; `scale` stands for all of the scale world.

    Raises:
        PreflightError: a name is unknown; the nearest are offered.
    """
    names: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if part == ALL_SUITES:
            names.extend(SUITES)
        elif part in SUITES:
            names.append(part)
        else:
            offer = nearest(part, [*SUITES, ALL_SUITES])
            raise PreflightError(f"Unknown suite {part!r}. {offer}")
    return list(dict.fromkeys(names))


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
        raise PreflightError(
            f"Suite {suite} is not built: {absent} is missing. "
            f"Build it with `internvideo3 world build {suite} --split {split} --root {root}`."
        )
    with path.open(encoding="utf-8") as lines:
        docs = [json.loads(line) for line in lines]
    chosen = _chosen(suite, docs, limit, sample_ids)
    return Benchmark(
        suite=suite,
        folder=folder.resolve(),
        docs=tuple(chosen),
        whole=len(docs),
        digest=file_digest(path),
        selected=len(chosen) < len(docs),
    )


def check_videos(benchmarks: Sequence[Benchmark]) -> None:
    """Raise if videos that the documents name are missing or empty.

    Raises:
        PreflightError: with the first few paths and how many there are.
    """
    wanted = {one.video(doc) for one in benchmarks for doc in one.docs}
    missing = sorted(str(path) for path in wanted if not _has_content(path))
    if missing:
        listed = "\n".join(f"  {path}" for path in missing[:_SHOWN])
        more = f"\n  and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise PreflightError(
            f"{len(missing)} of {len(wanted)} videos are missing or empty:\n{listed}{more}\n"
            "Run `internvideo3 world build` for these suites again; it makes only what is missing."
        )


def blind_videos(benchmark: Benchmark) -> dict[str, Path]:
    """For each video of a suite another one, of the same length where there is one.

    The control asks every question about a video that does not show the answer. The choice is a
    rotation among the videos of one length; a length with a single video takes the nearest one.
    It depends on the whole data set, so a limit does not change it.

    Raises:
        PreflightError: the suite has only one video.
    """
    path = benchmark.folder / f"{benchmark.suite}.jsonl"
    with path.open(encoding="utf-8") as lines:
        docs = [json.loads(line) for line in lines]
    lengths = {doc["video_id"]: float(doc["length_s"]) for doc in docs}
    paths = {doc["video_id"]: benchmark.video(doc) for doc in docs}
    if len(lengths) < 2:
        raise PreflightError(
            f"The blind control needs two videos; {benchmark.suite} has {len(lengths)}. "
            "Build more of the suite."
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
