"""`internvideo3 data …`: curation of training data; what the commands do, without printing."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvideo3.harness import provenance
from internvideo3.harness.agent.tools import segmentation
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.training.curation import filters
from internvideo3.training.curation.card import data_card
from internvideo3.training.curation.distribution import distribution, figure5, table1
from internvideo3.training.curation.filters import Kept
from internvideo3.training.curation.fingerprints import Steps, fingerprint, named
from internvideo3.training.curation.mixing import mixed
from internvideo3.training.curation.pipeline import Changes, Curation
from internvideo3.training.curation.records import (
    DataError,
    Row,
    read_rows,
    videos_of,
    write_rows,
)
from internvideo3.training.endpoint import Endpoint

VIDEO_NAMES = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi"})
FILTERS: dict[str, Callable[[Sequence[Row]], Kept]] = {
    "iou": filters.by_iou, "mixed": filters.by_mixed_answers, "gap": filters.by_gap,
}  # fmt: skip


def scene_changes(video: Path) -> list[float]:
    """Times at which scenes change, hard cuts and dissolves, by TransNetV2.

    Raises:
        ValueError: The file has no picture, or is too long for one call.
    """
    changes: list[float] = segmentation.run(str(video))["changes"]
    return changes


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
    changes: Changes = scene_changes
    """Finds the scenes."""
    per_video: int = 3
    most_failures: float = 0.1
    command: tuple[str, ...] = ()


def curate(options: CurateOptions, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Videos to questions, Table 1, Figure 5 and a card; goes on where it was stopped.

    Raises:
        DataError: There is no video, or too many fail.
        EndpointError: The server does not answer; what is finished is kept.
    """
    reader = IsolatedReader()
    guesser = options.guesser
    curation = Curation(
        out=options.out,
        changes=options.changes,
        read=reader.read,
        write=options.writer.write,
        guess=None if guesser is None else lambda p, n: guesser.write(p, temperature=1.0, seed=n),
        per_video=options.per_video,
        most_failures=options.most_failures,
    )
    try:
        rows = curation.run(found_videos(options.videos), progress)
    finally:
        reader.close()
    if not rows:
        raise DataError(f"no question passed the checks; {options.out / 'dropped.jsonl'} says why")
    made = {"writer": options.writer.model, "checked blind": guesser is not None}
    return describe(options.out / "questions.jsonl", options.out, made, options.command)


def describe(path: Path, out: Path, made: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """Write distribution.json, table1.md, figure5.svg and card.md of a file of questions.

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
    drops = path.parent / "dropped.jsonl"
    dropped = {row["id"]: row["reason"] for row in read_rows(drops)} if drops.is_file() else {}
    commit, dirty = provenance.revision()
    known = {"command": " ".join(command), "commit": f"{commit}{' with changes' if dirty else ''}"}
    (out / "card.md").write_text(data_card(path.stem, path, rows, dropped, known | made))
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
    kept = FILTERS[kind](read_rows(path)).or_fail(f"the filter {kind}")
    if count is not None:
        drawn = filters.sampled(kept.rows, count, seed)
        kept = Kept(drawn.rows, kept.dropped | drawn.dropped)
    _write(out, kept)
    return len(kept.rows), kept.dropped


def check_rows(
    path: Path, out: Path, benchmark_videos: Path | None, benchmark_questions: Path | None
) -> tuple[int, dict[str, str]]:
    """Write rows without repeats and without what benchmarks hold; kept and drops.

    Raises:
        DataError: A file is missing or no video, or nothing is left.
        VideoError: A video cannot be read.
    """
    rows = read_rows(path)
    benchmark = () if benchmark_videos is None else found_videos((benchmark_videos,))
    reader = IsolatedReader()
    try:
        prints = {f"benchmark {video}": _print(reader, video) for video in benchmark}
        ours = {video: _found(video, path.parent) for row in rows for video in videos_of(row)}
        prints |= {name: _print(reader, where) for name, where in ours.items()}
    finally:
        reader.close()
    names = named(prints)
    by_row = {str(row["id"]): tuple(names[video] for video in videos_of(row)) for row in rows}
    unique = filters.without_repeats(rows, by_row)
    asked = {} if benchmark_questions is None else _questions(benchmark_questions)
    held = {names[key]: key for key in prints if key.startswith("benchmark ")}
    clean = filters.without_benchmarks(unique.rows, by_row, held, asked)
    kept = Kept(clean.rows, unique.dropped | clean.dropped).or_fail("the check")
    _write(out, kept)
    return len(kept.rows), kept.dropped


def mix_rows(sources: Sequence[str], out: Path, total: int, seed: int) -> int:
    """Write a mixture of files given as `FILE=SHARE`.

    Raises:
        DataError: An argument is none of this form, or a source has too few rows.
        RecipeError: The shares do not sum to 1.
    """
    shares: dict[str, float] = {}
    for one in sources:
        name, _, share = one.rpartition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise DataError(f"{one!r} is not FILE=SHARE, such as long.jsonl=0.172") from None
    rows = mixed({name: read_rows(Path(name)) for name in shares}, shares, total, seed)
    write_rows(out, rows)
    return len(rows)


def found_videos(paths: Sequence[Path]) -> list[Path]:
    """Videos among files and folders, in the order of their names.

    Raises:
        DataError: There is none.
    """
    found = [
        one
        for path in paths
        for one in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if one.suffix.lower() in VIDEO_NAMES
    ]
    if not found:
        raise DataError(f"no video among {', '.join(map(str, paths))} ({', '.join(VIDEO_NAMES)})")
    return found


def _print(reader: IsolatedReader, path: Path) -> Steps:
    return fingerprint(reader.read(path, fps=1.0, max_frames=64).pixels_THWC)


def _found(video: str, folder: Path) -> Path:
    path = Path(video)
    return path if path.is_absolute() else folder / path


def _questions(path: Path) -> dict[str, str]:
    return {str(row["id"]): str(row["question"]) for row in read_rows(path)}


def _write(out: Path, kept: Kept) -> None:
    write_rows(out, kept.rows)
    drops = [{"id": key, "reason": why} for key, why in kept.dropped.items()]
    write_rows(out.with_suffix(".dropped.jsonl"), drops)
