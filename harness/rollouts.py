"""`internvideo3 data rollouts`: questions with answers → rollouts to learn from; resumable."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from internvideo3.harness.ask import AskOptions, agent_of, load_place, sight_of
from internvideo3.harness.outputs import alone, make_ready
from internvideo3.harness.provenance import file_digest
from internvideo3.tasks.world.files import write_whole
from internvideo3.training.curation.records import (
    DataError,
    Row,
    read_rows,
    user_text,
    videos_of,
)

log = logging.getLogger("internvideo3.data")
PARTS = ".part"


@dataclass(frozen=True, kw_only=True)
class RolloutsOptions:
    """One `data rollouts` command."""

    rows: Path
    """Questions in the chat form."""
    out: Path
    """File for the rollouts."""
    asking: AskOptions
    """The model, how frames are taken, and the agent; video and question come from the rows."""
    slips: float = 0.25
    """Share of the rollouts whose first answer is wrong."""
    limit: int | None = None
    """Only the first so many questions."""


@dataclass(frozen=True)
class Written:
    """What came of the questions."""

    rows: int
    questions: int
    left_out: int


def write_rollouts(options: RolloutsOptions, progress: Callable[[int, int], None]) -> Written:
    """Rolls every question out and writes what can be learnt; goes on where it was stopped.

    Raises:
        DataError: a row is no question about one video, nothing can be learnt, or another command
            is writing to the file.
        ValueError: the model cannot be read.
    """
    make_ready(options.out)
    with alone(options.out):
        return _written(options, progress)


def _written(options: RolloutsOptions, progress: Callable[[int, int], None]) -> Written:
    if options.out.suffix != ".jsonl":
        raise DataError(f"{options.out} must end in .jsonl")
    if options.out.exists():
        raise DataError(f"{options.out} is finished; give another --out, or delete it")
    asked = read_rows(options.rows)[: options.limit]
    if not asked:
        raise DataError(f"{options.rows} has no rows")
    lessons = [_lesson(options.rows, number, row) for number, row in enumerate(asked)]
    _check_keys([lesson.key for lesson, _ in lessons])
    made = _made(options)
    with _part(options.out).open("a", encoding="utf-8") as file:
        for key, rows in _roll(options, lessons, made):
            made[key] = rows
            file.write(json.dumps({"key": key, "rows": rows}) + "\n")
            file.flush()
            progress(len(made), len(lessons))
    rows = [row for lesson, _ in lessons for row in made[lesson.key]]
    if not rows:
        raise DataError("no rollout came upon its answer; raise --tool-calls, or check evidence")
    write_whole(options.out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    _part(options.out).unlink()
    dropped = sum(not made[lesson.key] for lesson, _ in lessons)
    return Written(len(rows), len(lessons), dropped)


def _check_keys(keys: Sequence[str]) -> None:
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} ids stand at several rows, such as {twice[0]!r}")


def _roll(options: RolloutsOptions, lessons: Any, made: Mapping[str, list[Row]]) -> Any:
    """Key and rows of every question in turn; those that are made are given again."""
    from internvideo3.harness.agent.perception import Eye
    from internvideo3.harness.agent.teaching import teach
    from internvideo3.harness.agent.tools.catalogue import TOOLS, cache_folder
    from internvideo3.harness.agent.tools.desk import Desk
    from internvideo3.tasks.decoder import IsolatedReader
    from internvideo3.tasks.video import VideoError

    asking = options.asking
    sight, agent = sight_of(asking), agent_of(asking)
    if agent.policy == "trained":
        # The teacher calls none, and such rows do not name any.
        agent = replace(agent, tools=())
    with closing(IsolatedReader()) as reader, Desk(TOOLS, asking.cache or cache_folder()) as desk:
        place = load_place(asking, desk)
        for lesson, video in lessons:
            if lesson.key in made:
                continue
            try:
                rows = teach(place, Eye(video, sight, reader), lesson, agent, options.slips)
            except VideoError as error:
                log.warning("%s is left out: %s", lesson.key, error)
                rows = []
            yield lesson.key, [row | {"video": str(video)} for row in rows]


def _made(options: RolloutsOptions) -> dict[str, list[Row]]:
    """What an interrupted command finished; a line that it did not finish is written again.

    Raises:
        DataError: it was another command.
    """
    path, begun = _part(options.out), {"settings": _settings(options)}
    if path.is_file():
        content = path.read_bytes()
        # Cut in place: what is finished stays, also where the disk is full.
        os.truncate(path, content.rfind(b"\n") + 1)
    if not path.is_file() or not path.stat().st_size:
        path.write_text(json.dumps(begun) + "\n", encoding="utf-8")
    try:
        lines = path.read_text("utf-8").split("\n")
        first, *made = [json.loads(line) for line in lines if line]
        if first == begun:
            return {one["key"]: one["rows"] for one in made}
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete it to begin anew") from error
    raise DataError(
        f"{path} was begun with other questions or options; repeat that command, or delete it"
    )


def _settings(options: RolloutsOptions) -> dict[str, Any]:
    """What decides the rollouts."""
    from internvideo3.model.checkpoint import resolve_checkpoint, weights_digest

    asking = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options.asking).items()
        if name not in ("video", "out", "cache", "threads", "device")
    }
    weights = weights_digest(resolve_checkpoint(options.asking.model))
    rows = file_digest(options.rows)
    return {"rows": rows, "limit": options.limit, "slips": options.slips, "weights": weights,
            "asking": asking}  # fmt: skip


def _part(out: Path) -> Path:
    return out.with_suffix(out.suffix + PARTS)


def _lesson(path: Path, number: int, row: Row) -> Any:
    """A row as a lesson, and its video."""
    from internvideo3.harness.agent.teaching import Lesson

    where = f"{path}, row {number + 1} (id {row.get('id')})"
    try:
        (video,) = map(Path, videos_of(row))
        lesson = Lesson(
            key=str(row.get("id", number)),
            question=user_text(row).strip("\n"),
            answer=str(row["answer"]),
            options=tuple(map(str, row.get("options") or ())),
            evidence=tuple((float(a), float(b)) for a, b in row.get("evidence") or ()),
            category=str(row.get("category", "all")),
        )
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{where} is no question about one video with an `answer`, and spans as `evidence` "
            f"if there is any ({type(error).__name__}: {error})"
        ) from error
    return lesson, (video if video.is_absolute() else (path.parent / video).resolve())
