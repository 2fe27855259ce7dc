"""`internvideo3 data rollouts`: questions with answers → rollouts to learn from; resumable."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvideo3.harness.ask import AskOptions, agent_of, load_place, sight_of
from internvideo3.training.curation.records import DataError, Row, read_rows, videos_of

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
        DataError: a row is no question about one video, or nothing can be learnt.
        ValueError: the model cannot be read.
    """
    asked = read_rows(options.rows)[: options.limit]
    if not asked:
        raise DataError(f"{options.rows} has no rows")
    lessons = [_lesson(options.rows, number, row) for number, row in enumerate(asked)]
    made = _made(options)
    if set(made) - {lesson.key for lesson, _ in lessons}:
        raise DataError(
            f"{_part(options.out)} was begun with other questions; finish them or delete it"
        )
    with _part(options.out).open("a", encoding="utf-8") as file:
        for number, (key, rows) in enumerate(_roll(options, lessons, made)):
            made[key] = rows
            file.write(json.dumps({"key": key, "rows": rows}) + "\n")
            file.flush()
            progress(number + 1, len(lessons))
    rows = [row for lesson, _ in lessons for row in made[lesson.key]]
    if not rows:
        raise DataError("no rollout came upon its answer; raise --tool-calls, or check evidence")
    whole = options.out.with_suffix(f".{os.getpid()}{PARTS}")
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole.replace(options.out)
    _part(options.out).unlink()
    dropped = sum(not made[lesson.key] for lesson, _ in lessons)
    return Written(len(rows), len(lessons), dropped)


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
    """What an interrupted command finished; a line that it did not finish is written again."""
    path = _part(options.out)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    path.write_bytes(whole)
    made = [json.loads(line) for line in whole.splitlines()]
    return {one["key"]: one["rows"] for one in made}


def _part(out: Path) -> Path:
    return out.with_suffix(out.suffix + PARTS)


def _lesson(path: Path, number: int, row: Row) -> Any:
    """A row as a lesson, and its video."""
    from internvideo3.harness.agent.teaching import Lesson

    where = f"{path}, row {number + 1} (id {row.get('id')})"
    videos = videos_of(row)
    if len(videos) != 1 or not isinstance(row.get("answer"), str):
        raise DataError(f"{where} is no question about one video with an `answer`")
    (user,) = [m for m in row["messages"] if m["role"] == "user"] or [{"content": ""}]
    said = user["content"]
    parts = [said] if isinstance(said, str) else [p["text"] for p in said if p["type"] == "text"]
    video = Path(videos[0])
    lesson = Lesson(
        key=str(row.get("id", number)),
        question="\n".join(parts).strip("\n"),
        answer=row["answer"],
        options=tuple(row.get("options") or ()),
        evidence=tuple((float(a), float(b)) for a, b in row.get("evidence") or ()),
        category=str(row.get("category", "all")),
    )
    return lesson, (video if video.is_absolute() else (path.parent / video).resolve())
