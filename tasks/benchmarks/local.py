"""Benchmarks as they lie on disk: annotations read, videos found, documents in one common form.

    <root>/<benchmark>/annotations.jsonl    or a published name: see README.md
    <root>/<benchmark>/videos/...           paths as the annotations name them
    <root>/<benchmark>/images/... subtitle/...

Reading opens no video. What is missing is returned, not raised, so that one look can list it all.
"""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from internvideo3.tasks.scoring.choice import letter_index
from internvideo3.tasks.scoring.entry import aggregate, score
from internvideo3.tasks.scoring.entry import options as options_of
from internvideo3.tasks.scoring.entry import truth as truth_of
from internvideo3.tasks.scoring.result import ScoringError

from .layouts import LayoutError, records
from .protocol import Benchmark, Doc, Preset, Raw

VIDEO_ENDINGS = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov")
_READABLE = (".jsonl", ".json", ".csv", ".parquet", ".txt")


class DataError(ValueError):
    """A benchmark whose data is missing or in no known layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """One benchmark's documents, as far as they are on disk."""

    benchmark: Benchmark
    folder: Path
    files: tuple[Path, ...]
    """Annotation files."""
    docs: tuple[Raw, ...]
    """Documents in the common form: see `_common`."""
    missing: tuple[str, ...]
    """Media that the documents name and the folder lacks, as paths below it."""
    digest: str
    """SHA-256 of the annotation files' content."""
    notes: tuple[str, ...] = ()
    """What is odd about the documents, in words."""


def data_root(root: str | Path | None = None) -> Path:
    """Where benchmarks are: `root`, else $IV3_DATA, else the user's cache."""
    chosen = root or os.environ.get("IV3_DATA") or "~/.cache/internvideo3/data"
    return Path(chosen).expanduser()


def annotation_files(benchmark: Benchmark, folder: Path) -> tuple[Path, ...]:
    """The annotation files that are there, in order of their names; the first pattern that fits.

    Patterns that name parts of one whole (one file a task) all count.
    """
    return tuple(p for p in _matching(benchmark, folder) if p.name not in benchmark.data.skipped)


def _matching(benchmark: Benchmark, folder: Path) -> tuple[Path, ...]:
    """As `annotation_files`, with files that the benchmark publishes and does not score."""
    whole = [sorted(folder.glob("annotations.*"))] if folder.is_dir() else []
    rest = [p for pattern in benchmark.data.annotations for p in sorted(folder.glob(pattern))]
    found = next(iter([*filter(None, whole), rest]), [])
    return tuple(dict.fromkeys(p for p in found if p.suffix in _READABLE and p.is_file()))


def load_local(
    benchmark: Benchmark, root: Path, preset: Preset, *, subtitles: bool = False
) -> Local:
    """Read a benchmark's documents and look for their media.

    Args:
        benchmark: which one.
        root: the data root.
        preset: its prompt is written into the documents where it is ours.
        subtitles: whether the documents carry their subtitles.

    Raises:
        DataError: no annotations, or annotations in no known layout.
    """
    folder = root / benchmark.home
    files = annotation_files(benchmark, folder)
    if not files:
        raise DataError(
            f"{benchmark.title}: no annotations in {folder} "
            f"(looked for {', '.join(benchmark.data.annotations)}). Get them: {benchmark.data.get}."
        )
    raws = _completed(benchmark, list(_documents(benchmark, files, folder)), folder)
    if subtitles and benchmark.subtitles is not None:
        _check_subtitles(benchmark, raws, folder)
    docs = [
        _checked(benchmark, raw, number, folder, preset, subtitles)
        for number, raw in enumerate(raws)
    ]
    found = find_videos(folder / "videos", (path for doc in docs for path in doc["videos"]))
    missing = Counter[str]()
    for doc in docs:
        doc["videos"] = [_place(found, folder, path, missing) for path in doc["videos"]]
    if not docs:
        raise DataError(f"{benchmark.title}: {files[0]} holds no questions.")
    _check_average(benchmark, docs, folder)
    return Local(
        benchmark=benchmark,
        folder=folder,
        files=files,
        docs=tuple(_distinct(docs)),
        missing=tuple(sorted(missing)),
        digest=_digest(files),
        notes=(
            *_absent_parts(benchmark, files),
            *_skipped(benchmark, folder),
            *_impossible(benchmark, docs),
        ),
    )


def _skipped(benchmark: Benchmark, folder: Path) -> Iterator[str]:
    """Say which published files hold no questions that the benchmark's number counts."""
    here = [p.name for p in _matching(benchmark, folder) if p.name in benchmark.data.skipped]
    if here:
        yield f"left out: {', '.join(here)} ({benchmark.data.skipped_why})"


def _absent_parts(benchmark: Benchmark, files: Sequence[Path]) -> Iterator[str]:
    """Say which of several annotation files, or folders of them, are not there."""
    here = {name for path in files for name in (path.stem, path.parent.name)}
    absent = [part for part in benchmark.data.parts if part not in here]
    if absent and "annotations" not in here:
        yield f"no annotations of {', '.join(absent)}"


def _impossible(benchmark: Benchmark, docs: Sequence[Raw]) -> Iterator[str]:
    """Say which documents nobody can answer rightly; published data has some."""
    impossible = [
        doc["id"]
        for doc in docs
        if doc["options"]
        and (letter := truth_of(benchmark.scorer, doc["doc"])) is not None
        and letter_index(letter, len(doc["options"])) is None
    ]
    if impossible:
        yield (
            f"the right answer of {len(impossible)} questions is none of their options, so that "
            f"every reply to them is wrong: {', '.join(impossible[:3])}"
            + (", ..." if len(impossible) > 3 else "")
        )


def _check_subtitles(benchmark: Benchmark, raws: Sequence[Raw], folder: Path) -> None:
    """Some videos have no subtitles; where none has, they are not there."""
    show = benchmark.subtitles
    assert show is not None, "only benchmarks with subtitles are asked for them"
    try:
        found = any(show(raw, folder) for raw in raws)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return  # the question's own check tells which field is wrong
    if raws and not found:
        raise DataError(
            f"{benchmark.title}: no video of {folder} has subtitles there. Get them with the "
            f"benchmark ({benchmark.data.get}), or leave --subtitles off."
        )


def _completed(benchmark: Benchmark, raws: list[Raw], folder: Path) -> list[Raw]:
    """Documents with what others of the benchmark hold about them."""
    if benchmark.data.complete is None:
        return raws
    try:
        return list(benchmark.data.complete(raws))
    except LayoutError as error:
        raise DataError(f"{benchmark.title}: {folder}: {error}") from error


def _documents(benchmark: Benchmark, files: Sequence[Path], folder: Path) -> Iterator[Raw]:
    read = benchmark.data.read or records
    for path in files:
        try:
            yield from read(path.relative_to(folder).as_posix(), read_rows(path))
        except LayoutError as error:
            raise DataError(f"{benchmark.title}: {folder}/{error}") from error
        except (LookupError, TypeError, ValueError, AttributeError, csv.Error) as error:
            raise DataError(
                f"{benchmark.title}: {path} is in another layout than published: "
                f"{type(error).__name__}: {error}. Get it again: {benchmark.data.get}."
            ) from error


def read_rows(path: Path) -> Any:
    """The content of a json, jsonl, csv, parquet or text file, as it stands.

    Raises:
        ValueError: the file is not what its name says.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    # Lines end at line feeds alone: questions hold U+2028, U+0085 and others at which `splitlines`
    # would cut them in two. A csv's own line ends are the csv module's to read.
    with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file if line.strip()]
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        if path.suffix == ".txt":
            return [line.rstrip("\n") for line in file]
        return json.load(file)


def _checked(
    benchmark: Benchmark, raw: Raw, number: int, folder: Path, preset: Preset, subtitles: bool
) -> Raw:
    try:
        doc = _common(benchmark, raw, folder, preset, subtitles)
        # What no answer could be scored by is better known before a model is loaded.
        score(benchmark.scorer, doc["doc"], "")
        if preset.prompt is None:
            _check_shown(benchmark, raw)
        return doc
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise DataError(
            f"{benchmark.title}: question {number} in {folder} does not have the published "
            f"layout: {type(error).__name__}: {error}. Its fields: {', '.join(sorted(raw))}."
        ) from error


def _check_shown(benchmark: Benchmark, raw: Raw) -> None:
    """A prompt of lmms-eval's is made when the run asks; what it is made of must be there."""
    shown = benchmark.lmms.shows(raw) if benchmark.lmms else ()
    for name in shown:
        if not raw.get(name):
            raise KeyError(name)


def _check_average(benchmark: Benchmark, docs: Sequence[Raw], folder: Path) -> None:
    """What groups documents is read when all are answered, and must not fail only then."""
    rows = [(doc["doc"], score(benchmark.scorer, doc["doc"], None)) for doc in docs]
    try:
        aggregate(benchmark.scorer, rows)
    except ScoringError as error:
        raise DataError(
            f"{benchmark.title}: the questions in {folder} cannot be averaged as published: "
            f"{error}. Get the annotations again: {benchmark.data.get}."
        ) from error


def _common(benchmark: Benchmark, raw: Raw, folder: Path, preset: Preset, subtitles: bool) -> Raw:
    """A document in the form that all suites share, with what scoring needs in `doc`."""
    kept = {key: raw.get(key) for key in benchmark.kept if key in raw}
    options = list(options_of(benchmark.scorer, kept))
    if subtitles and benchmark.subtitles is not None:
        # A video without subtitles is asked about without them, as lmms-eval does.
        raw = raw | {"iv3_subtitles": benchmark.subtitles(raw, folder) or "No subtitles available"}
    videos = [str(path) for path in benchmark.videos(raw)]
    name = f"{benchmark.name}{'_subtitles' if subtitles else ''}"
    return {
        "id": f"{name}/{' '.join(benchmark.identify(raw).split())}",
        "suite": name,
        "video_id": videos[0] if videos else benchmark.identify(raw),
        "videos": videos,
        "images": _image_files(benchmark, raw, folder),
        "family": benchmark.family(raw),
        "length_s": benchmark.length_s(raw),
        "fps": benchmark.rate(raw, preset.question_frames) if preset.question_frames else None,
        "question": benchmark.question(raw),
        "options": options or None,
        "answer": _answer(benchmark, raw, kept, options),
        "answer_type": benchmark.answer_type,
        "evidence": [list(map(float, span)) for span in benchmark.evidence(raw)],
        "between": _between(benchmark, raw, folder, preset),
        "prompt": None if preset.prompt is None else preset.prompt(raw),
        "doc": kept,
        "raw": raw if preset.prompt is None else None,
    }


def _between(benchmark: Benchmark, raw: Doc, folder: Path, preset: Preset) -> Raw | None:
    if benchmark.between is None:
        return None
    found = benchmark.between(raw)
    path = str((folder / str(found["path"])).resolve())
    return found | {"path": path, "max_frames": preset.max_frames}


def _answer(benchmark: Benchmark, raw: Doc, kept: Doc, options: Sequence[str]) -> str:
    letter = truth_of(benchmark.scorer, kept)
    index = None if letter is None else letter_index(letter, len(options))
    if index is not None:
        return options[index]
    if benchmark.answer is not None:
        return benchmark.answer(raw)
    return letter or ""


def _image_files(benchmark: Benchmark, raw: Doc, folder: Path) -> list[str]:
    """Paths of a document's images; images that the annotations hold are written out once."""
    paths = []
    for number, image in enumerate(benchmark.images(raw)):
        content = image.get("bytes") if isinstance(image, Mapping) else image
        if isinstance(content, str):
            paths.append(str(folder / "ref_images" / content))
            continue
        if not isinstance(content, bytes):
            raise TypeError(f"image {number} is a {type(image).__name__}, expected bytes or a path")
        path = folder / "images" / f"{hashlib.sha256(content).hexdigest()[:32]}.png"
        if not path.is_file():
            _write_image(path, content)
        paths.append(str(path))
    return paths


def _write_image(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise DataError(
            f"The annotations hold images, which are written to {path.parent}, and it cannot be "
            f"written to: {error.strerror}. Make room or the folder writable."
        ) from error


def find_videos(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """The files of videos below a folder, by the names that the annotations have for them.

    At the path named, else with another ending, else by file name in a folder that `_same_place`
    allows. A name without a file of its own is absent: what is found by search counts only if no
    other name means it too.
    """
    wanted = {name: str(PurePosixPath(name)) for name in names}
    index = _MediaIndex(folder)
    exact = {path: folder / path for path in set(wanted.values()) if (folder / path).is_file()}
    searched = {
        path: found
        for path in set(wanted.values()) - exact.keys()
        if (found := index.search(path)) is not None
    }
    claims = Counter([*exact.values(), *searched.values()])
    own = exact | {path: found for path, found in searched.items() if claims[found] == 1}
    return {name: own[path] for name, path in wanted.items() if path in own}


class _MediaIndex:
    """Finds videos that do not lie at the path named: with another ending, or elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_stem: dict[str, list[Path]] | None = None

    def search(self, name: str) -> Path | None:
        """The only file that the name can mean, or None."""
        direct = self.folder / name
        for path in (direct.with_suffix(ending) for ending in VIDEO_ENDINGS):
            if path.is_file():
                return path
        if self._by_stem is None:
            self._by_stem = self._walk()
        found = [
            path
            for path in self._by_stem.get(direct.stem, ())
            if _same_place(PurePosixPath(name).parent, path.parent.relative_to(self.folder))
        ]
        return found[0] if len(found) == 1 else None

    def _walk(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for folder, _, files in os.walk(self.folder):
            for file in files:
                if file.endswith(VIDEO_ENDINGS):
                    found.setdefault(Path(file).stem, []).append(Path(folder) / file)
        return found


def _same_place(named: PurePath, lies: PurePath) -> bool:
    """Whether a file in the folder `lies` can be the one that is named in the folder `named`.

    Archives unpack with folders around those named, or without some of the outer ones; then the
    inner ones are equal as far as both are there. Views, sources and kinds of one benchmark repeat
    file names in folders of their own, so that another folder means another video.
    """
    return all(a == b for a, b in zip(named.parts[::-1], lies.parts[::-1], strict=False))


def _place(found: Mapping[str, Path], folder: Path, name: str, missing: Counter[str]) -> str:
    if name not in found:
        missing[f"videos/{name}"] += 1
        return str((folder / "videos" / name).resolve())
    return str(found[name].resolve())


def _distinct(docs: Sequence[Raw]) -> Iterator[Raw]:
    """Documents with ids of their own: a repeated id gets a number."""
    seen = Counter[str]()
    for doc in docs:
        seen[doc["id"]] += 1
        count = seen[doc["id"]]
        yield doc if count == 1 else doc | {"id": f"{doc['id']}#{count}"}


def _digest(files: Sequence[Path]) -> str:
    sha = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()
