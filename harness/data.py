"""`internvideo3 data …`: curation of training data; what the commands do, without printing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvideo3.harness import provenance
from internvideo3.harness.outputs import alone, make_ready
from internvideo3.harness.provenance import file_digest
from internvideo3.harness.scenes import SceneFinder
from internvideo3.harness.video_files import candidates, found_videos, is_named_video
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import VideoError
from internvideo3.training.curation import filters
from internvideo3.training.curation.budget import MOST_BAD, UNUSABLE, Budget
from internvideo3.training.curation.card import data_card
from internvideo3.training.curation.distribution import distribution, figure5, table1
from internvideo3.training.curation.filters import Kept
from internvideo3.training.curation.fingerprints import Steps, fingerprint, named, shown_in
from internvideo3.training.curation.mixing import (
    Preset,
    mixed,
    mixed_videos,
    preset_of,
    source_of,
    told_apart,
)
from internvideo3.training.curation.origin import claim, origin_of
from internvideo3.training.curation.pipeline import Changes, Curation, Guesser
from internvideo3.training.curation.records import (
    DataError,
    Row,
    is_address,
    keys_of,
    media_of,
    moved,
    read_rows,
    user_text,
    videos_of,
    write_rows,
)
from internvideo3.training.endpoint import Endpoint

Progress = Callable[[str, int, int], None]
Tell = Callable[[str], None]
FILTERS: dict[str, Callable[[Sequence[Row]], Kept]] = {
    "iou": filters.by_iou, "mixed": filters.by_mixed_answers, "gap": filters.by_gap,
}  # fmt: skip


def _unwatched(name: str, done: int, total: int) -> None:
    """Nobody watches."""


def _unheard(said: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True, kw_only=True)
class CurateOptions:
    """One `data curate` command."""

    videos: tuple[Path, ...]
    """Files, and folders whose videos are taken."""
    out: Path
    writer: Endpoint
    """Captions clips, summarises, writes questions."""
    guesser: Endpoint | None
    """Answers without the video; None: not checked."""
    changes: Changes | None = None
    """Finds the scenes; None: TransNetV2 in a process of its own."""
    per_video: int = 3
    most_failures: float = 0.1
    command: tuple[str, ...] = ()


def curate(options: CurateOptions, progress: Progress) -> dict[str, Any]:
    """Videos to questions, Table 1, Figure 5 and a card; goes on where it was stopped.

    Raises:
        DataError: There is no video, too many fail, the folder holds what other options made, or
            another command is writing to it.
        EndpointError: The server does not answer; what is finished is kept.
    """
    guesser = options.guesser
    with ExitStack() as stack:
        reader = stack.enter_context(closing(IsolatedReader()))
        changes = options.changes or stack.enter_context(closing(SceneFinder(reader)))
        curation = Curation(
            out=options.out,
            changes=changes,
            read=reader.read,
            write=options.writer.write,
            guess=None if guesser is None else _guessing(guesser),
            per_video=options.per_video,
            most_failures=options.most_failures,
        )
        videos = found_videos(options.videos)
        options.out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(alone(options.out))
        claim(options.out, _decides(options, curation), _revision(), ("narratives/*", "asked/*"))
        rows = curation.run(videos, progress)
        if not rows:
            why = options.out / "dropped.jsonl"
            raise DataError(f"no question passed the checks; {why} says why")
        return describe(options.out / "questions.jsonl", options.out, options.command)


def _guessing(endpoint: Endpoint) -> Guesser:
    return lambda prompt, number: endpoint.write(prompt, temperature=1.0, seed=number)


def _decides(options: CurateOptions, curation: Curation) -> dict[str, Any]:
    """What of a command decides its questions; where a server is does not."""
    guesser = options.guesser
    return {
        "writer": options.writer.model,
        "checked blind": guesser is not None,
        "guesser": None if guesser is None else guesser.model,
        "guesses": None if guesser is None else curation.guesses,
        "questions of a video": curation.per_video,
        "frames of a clip": curation.frames,
    }


def _revision() -> str:
    commit, dirty = provenance.revision()
    return f"{commit}{' with changes' if dirty else ''}"


def describe(path: Path, out: Path, command: Sequence[str]) -> dict[str, Any]:
    """Write distribution.json, table1.md, figure5.svg and card.md of a file of questions.

    How `questions.jsonl` was made stands beside it (`curation.json`), and of there is what the card
    says of it; of other files it says only which command described them.

    Raises:
        DataError: The file is none, or its rows are no questions of curation.
    """
    rows = read_rows(path)
    lacking = [row.get("id") for row in rows if not {"category", "options", "answer"} <= row.keys()]
    if lacking or not rows:
        raise DataError(f"{path}: {len(lacking)} of {len(rows)} rows are no curated questions")
    out.mkdir(parents=True, exist_ok=True)
    told = distribution(rows)
    (out / "distribution.json").write_text(json.dumps(told, indent=1) + "\n")
    (out / "table1.md").write_text(table1(told) + "\n")
    figure5(rows, out / "figure5.svg")
    curated = path.name == "questions.jsonl"
    origin = origin_of(path.parent) if curated else {"options": {}, "revisions": []}
    drops = path.parent / "dropped.jsonl" if curated else _drops_of(path)
    dropped = {row["id"]: row["reason"] for row in read_rows(drops)} if drops.is_file() else {}
    known = {"command": " ".join(command), "commit": _revision()}
    if origin["revisions"]:
        known["curated at"] = ", then ".join(origin["revisions"])
    card = data_card(path.stem, path, rows, dropped, known | origin["options"])
    # The command may name files whose names are no text.
    (out / "card.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    return told


def filter_rows(
    kind: str, path: Path, out: Path, count: int | None, seed: int
) -> tuple[int, dict[str, str]]:
    """Write what a filter keeps, and beside it `NAME.dropped.jsonl`; kept and drops.

    Raises:
        DataError: The filter is unknown, a row lacks what it reads, or nothing is left.
    """
    if kind not in FILTERS:
        raise DataError(f"no filter {kind!r}; known: {', '.join(FILTERS)}")
    make_ready(out)
    rows = read_rows(path)
    keys_of(path, rows)
    kept = FILTERS[kind](rows).or_fail(f"the filter {kind}")
    if count is not None:
        drawn = filters.sampled(kept.rows, count, seed)
        kept = Kept(drawn.rows, kept.dropped | drawn.dropped)
    _write(path, out, kept)
    return len(kept.rows), kept.dropped


def check_rows(
    path: Path,
    out: Path,
    benchmark_videos: Path | None,
    benchmark_questions: Path | None,
    most_bad: float = MOST_BAD,
    progress: Progress = _unwatched,
    tell: Tell = _unheard,
) -> tuple[int, dict[str, str]]:
    """Write rows without repeats and without what benchmarks hold; kept and drops.

    A row that cannot be used is among the drops, up to a budget. What of a benchmark was compared,
    and what was not, is told in words.

    Raises:
        DataError: A file is missing or no video, too many rows cannot be used, a row has no id, a
            benchmark's video cannot be read, or nothing is left.
    """
    make_ready(out)
    rows = read_rows(path)
    keys = keys_of(path, rows)
    budget = Budget(str(path), len(rows), most_bad)
    asked = {} if benchmark_questions is None else _questions(benchmark_questions)
    usable: list[Row] = []
    with closing(IsolatedReader()) as reader:
        prints = _Prints(reader)
        held = {} if benchmark_videos is None else prints.held(benchmark_videos, progress, tell)
        for number, (key, row) in enumerate(zip(keys, rows, strict=True), start=1):
            try:
                prints.of_row(row, path.parent)
                usable.append(row)
            except UNUSABLE as error:
                budget.leave_out(number, key, error)
            progress("rows", number, len(rows))
    names = named(prints.known)
    by_row = {str(row["id"]): [str(one) for one in _paths(row, path.parent)] for row in usable}
    contents = {
        str(row["id"]): [
            names[str(path.parent / where)] if kind == "video" else prints.others[kind, where]
            for kind, where in media_of(row)
        ]
        for row in usable
    }
    unique = filters.without_repeats(usable, contents)
    clean = filters.without_benchmarks(unique.rows, by_row, shown_in(prints.known, held), asked)
    kept = Kept(clean.rows, budget.bad | unique.dropped | clean.dropped).or_fail("the check")
    _write(path, out, kept)
    return len(kept.rows), kept.dropped


BENCHMARK = "benchmark "
"""Begins the names of a benchmark's videos."""


class _Prints:
    """Fingerprints of videos by path, each decoded once, also where it is broken."""

    def __init__(self, reader: IsolatedReader) -> None:
        self.reader = reader
        self.known: dict[str, Steps] = {}
        self.broken: dict[str, VideoError] = {}
        self.others: dict[tuple[str, str], str] = {}
        """Kind and place of a picture or of anything else → a digest of its content."""

    def held(self, folder: Path, progress: Progress, tell: Tell) -> dict[str, Steps]:
        """A benchmark's videos: every file is tried that is not by its name something else.

        Raises:
            DataError: There is none, or what is by its name a video cannot be read, so that nobody
                could say what shares it.
        """
        found = candidates(folder)
        held: dict[str, Steps] = {}
        unread: list[str] = []
        for number, file in enumerate(found.tried, start=1):
            try:
                held[f"{BENCHMARK}{file}"] = self._read(file)
            except VideoError as error:
                if is_named_video(file):
                    raise DataError(
                        f"the benchmark's video {file} cannot be compared: {error} Repair it, or "
                        "take it out of the folder."
                    ) from error
                unread.append(file.name)
            progress("benchmark", number, len(found.tried))
        others = len(found.others)
        if not held:
            raise DataError(f"none of the {len(found.tried) + others} files in {folder} is a video")
        tell(
            f"{folder}: compared with {len(held)} of its files; not with {len(unread)} that no "
            f"decoder reads{_few(unread)}, nor with {others} texts, pictures and the like."
        )
        return held

    def of_row(self, row: Row, folder: Path) -> None:
        """Take in a row's videos and pictures.

        Raises:
            VideoError: One cannot be read.
            DataError: A picture cannot be read.
            LookupError, TypeError: The row is of another form.
        """
        user_text(row)
        for kind, where in media_of(row):
            if kind != "video" and (kind, where) not in self.others:
                self.others[kind, where] = _digest(kind, where, folder)
        for path in _paths(row, folder):
            key = str(path)
            if key in self.broken:
                raise self.broken[key]
            if key in self.known:
                continue
            try:
                self.known[key] = self._read(path)
            except VideoError as error:
                self.broken[key] = error
                raise

    def _read(self, path: Path) -> Steps:
        return fingerprint(self.reader.read(path, fps=1.0, max_frames=64).pixels_THWC)


def _few(names: Sequence[str]) -> str:
    """The first of some names, in brackets."""
    return f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""


def _digest(kind: str, where: str, folder: Path) -> str:
    """A picture's by its file; of what is no file here, by what is said of it."""
    if kind == "picture" and not is_address(where):
        try:
            return f"{kind} {file_digest(folder / where)}"
        except OSError as error:
            said = f"cannot read the picture {folder / where}: {error.strerror}"
            raise DataError(said) from error
    return f"{kind} {hashlib.sha256(where.encode(errors='surrogatepass')).hexdigest()}"


def mix_rows(
    sources: Sequence[str], out: Path, total: int, seed: int, preset: str | None = None
) -> int:
    """Write a mixture of files; its number of rows, each with an id of its own.

    Args:
        sources: `FILE=SHARE`; with a preset `SOURCE=FILE`, a source's files one by one.
        out: File for the mixture.
        total: Rows in all; of a preset that is of videos, videos.
        seed: What is drawn.
        preset: A published mixture (`mixing.presets`); None for one's own.

    Raises:
        DataError: An argument is none of this form, a source has no file or too few rows, or a
            file is given twice.
        RecipeError: The shares do not sum to 1.
    """
    make_ready(out)
    if preset is None:
        shares = _own_shares(sources)
        read = _read_sources([Path(name) for name in shares], out)
        rows = mixed({name: read[Path(name)] for name in shares}, shares, total, seed)
    else:
        published = preset_of(preset)
        named_files = [_source_file(published, one) for one in sources]
        read = _read_sources([file for _, file in named_files], out)
        files: dict[str, list[Row]] = {}
        for name, file in named_files:
            files.setdefault(name, []).extend(read[file])
        mix = mixed_videos if published.of_videos else mixed
        rows = mix(files, published.shares, total, seed)
    write_rows(out, rows)
    return len(rows)


def _source_file(preset: Preset, given: str) -> tuple[str, Path]:
    """Source and file of a `SOURCE=FILE`."""
    name, mark, file = given.partition("=")
    if not mark or not file:
        first = next(iter(preset.shares))
        raise DataError(f"{given!r} is not SOURCE=FILE, such as '{first}=rows.jsonl'")
    return source_of(preset, name), Path(file)


def _read_sources(files: Sequence[Path], out: Path) -> dict[Path, list[Row]]:
    """File → its rows, as the mixture must hold them."""
    for number, file in enumerate(files):
        if any(file.resolve() == other.resolve() for other in files[:number]):
            raise DataError(f"{file} is given twice, and no row is drawn twice; give it once")
    return told_apart({file: _moved_rows(file, out) for file in files})


def _own_shares(sources: Sequence[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for one in sources:
        name, _, share = one.rpartition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise DataError(f"{one!r} is not FILE=SHARE, such as long.jsonl=0.172") from None
    return shares


def _moved_rows(path: Path, out: Path) -> list[Row]:
    rows: list[Row] = []
    for number, row in enumerate(read_rows(path), start=1):
        try:
            videos_of(row)
            rows.append(moved(row, path.parent, out.parent))
        except (LookupError, TypeError) as error:
            raise DataError(f"{path}, row {number}, is not in the chat form: {error!r}") from error
    return rows


def _paths(row: Row, folder: Path) -> list[Path]:
    """Where a row's videos are; an absolute path stays itself."""
    return [folder / video for video in videos_of(row)]


def _questions(path: Path) -> dict[str, str]:
    rows = read_rows(path)
    lacking = [n for n, row in enumerate(rows, start=1) if not isinstance(row.get("question"), str)]
    if lacking:
        raise DataError(f"{path}, row {lacking[0]}, has no `question`; each needs `id` and that")
    return {key: row["question"] for key, row in zip(keys_of(path, rows), rows, strict=True)}


def _write(source: Path, out: Path, kept: Kept) -> None:
    write_rows(out, (moved(row, source.parent, out.parent) for row in kept.rows))
    drops = [{"id": key, "reason": why} for key, why in kept.dropped.items()]
    write_rows(_drops_of(out), drops)


def _drops_of(out: Path) -> Path:
    return out.with_suffix(".dropped.jsonl")
