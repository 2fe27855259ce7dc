"""Suites of the scale world as files: videos, subtitles, questions, and lmms-eval tasks.

    <root>/<split>/videos/<video id>.mp4, .srt
    <root>/<split>/<suite>.jsonl            one document a line
    <root>/<split>/manifest.json            digests, counts and versions of every suite built
    <root>/<split>/lmms/iv3_<suite>.yaml    the suite as a task for lmms-eval
    <root>/<split>/.<suite>.journal         finished videos, for a build that is continued

A build does only what is missing or damaged, so it can be killed and repeated. The documents and
the manifest's entry are written last: a suite that has them is complete.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world import media
from internvideo3.tasks.world.files import (
    Job,
    Journal,
    Record,
    digest,
    subtitles_name,
    video_name,
    write_whole,
)
from internvideo3.tasks.world.lmms import task_files
from internvideo3.tasks.world.questions import Question
from internvideo3.tasks.world.suites import (
    SPLIT_BASE,
    SUITES,
    Split,
    Suite,
    deal_lengths,
    draw_suite,
    video_seed,
)
from internvideo3.tasks.world.workers import WorkerError, make_videos

SCHEMA: Final = 1
Progress = Callable[[str, int, int], None]
"""Called with a suite, its finished videos, and how many it will have."""


class BuildError(ValueError):
    """A build that cannot start or go on; says why, what is kept, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A suite on disk."""

    suite: str
    folder: Path
    """`<root>/<split>`; the documents' `video` is relative to it."""
    docs: Path
    tasks: Path
    """Folder for lmms-eval's `--include_path`."""
    videos: int
    questions: int
    made: int
    """Videos that this call made; the others were there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a suite's files are, beside its recipe: `WORLD`, or that of tasks/brief.py."""

    documents: Callable[[Suite, Split, int | None], Iterable[dict[str, Any]]]
    """(suite, split, limit on videos) → rows of the documents."""
    files: Callable[[Suite, Path], Mapping[Path, str]]
    """(suite, `<root>/<split>`) → what lies beside the documents, which are written by then."""
    visit_s: float | None = None
    """See `visits.draw`."""
    subtitles: bool = True
    """Whether videos have some."""
    key: str = ""
    """Digest of what decides the files and is in neither recipe nor world."""


def world_root(root: str | Path | None = None) -> Path:
    """Where the world is: `root`, else $IV3_WORLD, else the user's cache."""
    chosen = root or os.environ.get("IV3_WORLD") or "~/.cache/internvideo3/world"
    return Path(chosen).expanduser()


def world_build(
    suites: Sequence[str] | None = None,
    *,
    root: str | Path | None = None,
    split: str = "test",
    limit_videos: int | None = None,
    sound: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Built]:
    """Build several suites; see `build_suite`.

    Args:
        suites: Names; all suites where it is None or empty.
        root: See `world_root`.
        split: train, validation or test.
        limit_videos: Only the first so many videos of each suite.
        sound: Give the videos a sound track.
        workers: Processes; by default one a core.
        progress: Told of every finished video.

    Raises:
        BuildError: As `build_suite`; all names are checked first.
    """
    chosen = [checked_suite(name) for name in suites or SUITES]
    return [
        build_suite(
            suite,
            root,
            split,
            limit_videos,
            sound=sound,
            workers=workers,
            progress=progress,
        )
        for suite in chosen
    ]


def build_suite(
    suite: Suite | str,
    root: str | Path | None = None,
    split: str = "test",
    limit_videos: int | None = None,
    *,
    sound: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    form: Form | None = None,
) -> Built:
    """Make what is missing of a suite.

    A suite that was built with more videos than the limit stays as it is. One that was built by
    another version of the world, or with another choice of sound, is made anew.

    Args:
        suite: The suite or its name.
        root: See `world_root`.
        split: train, validation or test.
        limit_videos: Only the first so many videos.
        sound: Give the videos a sound track (files get several times as large).
        workers: Processes; by default one a core.
        progress: Told of every finished video.
        form: What its files are; by default those of the world's suites.

    Raises:
        BuildError: Unknown suite or split, senseless limit, full or read-only disk, killed worker.
    """
    recipe = checked_suite(suite) if isinstance(suite, str) else suite
    if limit_videos is not None and limit_videos < 1:
        raise BuildError(f"the limit on videos must be at least 1, got {limit_videos}")
    folder = world_root(root) / checked_split(split)
    build = _Build(recipe, checked_split(split), folder, sound, form or WORLD)
    with _failures_in_words(build), locked(folder):
        return build.run(limit_videos, workers, progress)


def suite_key(suite: Suite, split: Split, sound: bool, form: Form | None = None) -> str:
    """Digest of all that decides a suite's files, apart from how many there are."""
    recipe = asdict(suite)
    del recipe["videos"]
    # JSON has no integer keys, and the order of lengths decides which video gets which.
    recipe["lengths"] = list(suite.lengths.items())
    # `deal_lengths` looks at the count only to know when to stop.
    content: list[Any] = [SCHEMA, d.digest(), media.ENCODING, sound, split, recipe]
    if form is not None and form != WORLD:
        content += [form.visit_s, form.subtitles, form.key]
    return digest(json.dumps(content, sort_keys=True).encode())[:16]


class _Build:
    """One suite's build in its folder."""

    def __init__(self, suite: Suite, split: Split, folder: Path, sound: bool, form: Form) -> None:
        self.suite, self.split, self.folder, self.sound = suite, split, folder, sound
        self.form = form
        self.key = suite_key(suite, split, sound, form)
        self.journal = Journal(folder / f".{suite.name}.journal")
        self.docs = folder / f"{suite.name}.jsonl"
        self.finished = 0
        self.wanted = 0

    def run(self, limit: int | None, workers: int | None, progress: Progress | None) -> Built:
        """Make what is missing, then write the documents."""
        (self.folder / "videos").mkdir(parents=True, exist_ok=True)
        entry = self._entry()
        if entry is None:
            self._discard()
        count = min(limit or self.suite.videos, self.suite.videos)
        self.wanted = max(count, 0 if entry is None else int(entry["videos"]))
        records, made = self._make_missing(workers, progress)
        if entry is None or self.wanted > entry["videos"] or not self._docs_are(entry):
            entry = self._write_docs(list(records.values()))
        self._write_tasks()
        return Built(
            suite=self.suite.name,
            folder=self.folder,
            docs=self.docs,
            tasks=self.folder / "lmms",
            videos=self.wanted,
            questions=int(entry["questions"]),
            made=made,
        )

    def _make_missing(
        self, workers: int | None, progress: Progress | None
    ) -> tuple[dict[str, Record], int]:
        """Records of all wanted videos in order, and how many of them were made now."""
        jobs = self._jobs()
        known = self.journal.read(self.key)
        records: dict[str, Record | None] = {
            job.video_id: _intact(known.get(job.video_id), self.folder) for job in jobs
        }
        missing = [job for job in jobs if records[job.video_id] is None]
        self.finished = self.wanted - len(missing)
        self._tell(progress)
        with closing(make_videos(missing, workers)) as fresh:
            for record in self.journal.append(fresh):
                records[record.video_id] = record
                self.finished += 1
                self._tell(progress)
        return {name: one for name, one in records.items() if one is not None}, len(missing)

    def _jobs(self) -> list[Job]:
        lengths = deal_lengths(self.suite)
        return [
            Job(
                folder=str(self.folder),
                video_id=video_id(self.suite, index),
                key=self.key,
                seed=video_seed(self.suite, self.split, index),
                length_s=lengths[index],
                profile=self.suite.profile,
                sound=self.sound,
                visit_s=self.form.visit_s,
                subtitles=self.form.subtitles,
            )
            for index in range(self.wanted)
        ]

    def _tell(self, progress: Progress | None) -> None:
        if progress is not None:
            progress(self.suite.name, self.finished, self.wanted)

    def _entry(self) -> dict[str, Any] | None:
        """The manifest's entry of this suite if it was built with the same key."""
        entry: dict[str, Any] | None = self._manifest()["suites"].get(self.suite.name)
        return entry if entry is not None and entry["key"] == self.key else None

    def _manifest(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"schema": SCHEMA, "split": self.split, "suites": {}}
        try:
            found = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return empty
        readable = isinstance(found, dict) and found.get("schema") == SCHEMA
        return found if readable else empty

    def _discard(self) -> None:
        """Take away documents that do not belong to the files about to be written."""
        self.docs.unlink(missing_ok=True)
        manifest = self._manifest()
        if manifest["suites"].pop(self.suite.name, None) is not None:
            self._write_manifest(manifest)
        for leftover in (self.folder / "videos").glob(f"{self.suite.name}-*.part"):
            leftover.unlink(missing_ok=True)

    def _docs_are(self, entry: dict[str, Any]) -> bool:
        return self.docs.is_file() and digest(self.docs.read_bytes()) == entry["docs_sha256"]

    def _write_docs(self, records: list[Record]) -> dict[str, Any]:
        docs = list(self.form.documents(self.suite, self.split, self.wanted))
        data = "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs).encode()
        write_whole(self.docs, data)
        entry = {
            "key": self.key,
            "world": d.digest(),
            "difficulty_version": d.VERSION,
            "encoding": media.ENCODING,
            "sound": self.sound,
            "videos": self.wanted,
            "questions": len(docs),
            "families": dict(sorted(Counter(doc["family"] for doc in docs).items())),
            "docs_sha256": digest(data),
            "bytes": sum(record.size for record in records),
            "packages": {name: importlib.metadata.version(name) for name in ("av", "numpy")},
            "files": {name: sha for one in records for name, sha in one.files().items()},
        }
        manifest = self._manifest()
        manifest["suites"][self.suite.name] = entry
        self._write_manifest(manifest)
        return entry

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        data = json.dumps(manifest, indent=1, sort_keys=True).encode()
        write_whole(self.folder / "manifest.json", data)

    def _write_tasks(self) -> None:
        for path, text in self.form.files(self.suite, self.folder).items():
            path.parent.mkdir(exist_ok=True)
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_whole(path, text.encode())


def video_id(suite: Suite, index: int) -> str:
    """Name of a suite's index-th video."""
    return f"{suite.name}-{index:04d}"


def documents(
    suite: Suite, split: Split = "test", limit_videos: int | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of a suite's documents, in order; needs no files.

    A question's id does not depend on the limit.
    """
    number = 0
    for index, (spec, asked) in enumerate(draw_suite(suite, split, limit_videos)):
        for question in asked:
            name = video_id(suite, index)
            yield _document(suite, f"{suite.name}/{number:06d}", name, spec.length_s, question)
            number += 1


WORLD: Final = Form(documents=documents, files=task_files)
"""The form of the scale world's six suites."""


def _document(
    suite: Suite, row_id: str, name: str, length_s: float, question: Question
) -> dict[str, Any]:
    return {
        "id": row_id,
        "video_id": name,
        "video": video_name(name),
        "subtitles": subtitles_name(name),
        "suite": suite.name,
        "family": question.family,
        "length_s": length_s,
        "question": question.question,
        "options": None if question.options is None else list(question.options),
        "answer": question.answer,
        "answer_letter": question.answer_letter,
        "answer_type": question.answer_type,
        "evidence": [list(span) for span in question.evidence],
        "prompt": question.prompt,
    }


def _intact(record: Record | None, folder: Path) -> Record | None:
    return record if record is not None and record.is_intact(folder) else None


def checked_suite(name: str, known: Mapping[str, Suite] = SUITES) -> Suite:
    """The suite of a name.

    Raises:
        BuildError: If there is none; the nearest names are offered.
    """
    if name not in known:
        raise BuildError(f"unknown suite {name!r}; {_nearest(name, known)}")
    return known[name]


def checked_split(name: str) -> Split:
    """The split of a name.

    Raises:
        BuildError: If there is none; the nearest names are offered.
    """
    for split in SPLIT_BASE:
        if split == name:
            return split
    raise BuildError(f"unknown split {name!r}; {_nearest(name, SPLIT_BASE)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known := sorted(known), n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder; another one waits. The system frees it with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _failures_in_words(build: _Build) -> Iterator[None]:
    try:
        yield
    except WorkerError as error:
        raise BuildError(f"{build.suite.name}: {error}. {_kept(build)}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"no space left for {build.suite.name} in {build.folder}. Free some, or choose "
            raise BuildError(f"{what}another --root. {_kept(build)}") from error
        where = error.filename or build.folder
        raise BuildError(
            f"cannot build {build.suite.name}: {error.strerror or error} ({where}). {_kept(build)}"
        ) from error


def _kept(build: _Build) -> str:
    return (
        f"{build.finished} of {build.wanted or build.suite.videos} videos are finished and kept; "
        "repeat the same command to continue"
    )
