"""What curation hands from step to step, and the chat form that training reads.

The chat form is that of the released training code (OpenGVLab/InternVideo@3965eef, `messages` with
`video_url` and `text` parts), one row a line of JSONL or of a Parquet file. Paths of videos are
relative to the file's folder or absolute.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
"""Of an address, such as `https://` or `data:`, which is no path; `part 1: hall.mp4` is one."""
_MEDIA = {"video_url": "video", "image_url": "picture"}
_HELD_AS = b"internvideo3"
"""Key of a Parquet column's metadata; `json` says that its strings are JSON."""


class DataError(ValueError):
    """Data that cannot be used; says which, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A stretch of one scene that is captioned at once."""

    scene: int
    start_s: float
    end_s: float
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Narrative:
    """A video in words, from the ground up."""

    video: str
    """Path of the file."""
    duration_s: float
    clips: tuple[Clip, ...]
    scenes: tuple[str, ...]
    """A summary of each scene, in order of time."""
    text: str
    """The whole story."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question with options, made from a narrative."""

    category: str
    """One of the seventeen of Table 1."""
    question: str
    options: tuple[str, ...]
    answer: str
    """The text of the right option."""
    evidence_s: tuple[float, float]
    """Where in the video the answer can be seen."""


def chat_row(key: str, narrative: Narrative, asked: Asked) -> Row:
    """A question in the chat form."""
    lettered = [f"{letter}. {text}" for letter, text in zip("ABCDEF", asked.options, strict=False)]
    text = "\n".join([asked.question, *lettered, "Answer with the text of one option."])
    return {
        "id": key,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": narrative.video}},
                    {"type": "text", "text": text},
                ],
            },
            {"role": "assistant", "content": asked.answer},
        ],
        "category": asked.category,
        "options": list(asked.options),
        "answer": asked.answer,
        "evidence": [list(asked.evidence_s)],
        "duration_s": narrative.duration_s,
        "context": narrative.text,
    }


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSONL or Parquet file; what is null in a Parquet row is absent.

    Raises:
        DataError: It is neither, or a line is no JSON object.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    return list(_lines(path))


def check_ending(path: Path) -> None:
    """Make sure that rows can be written to a file of this name.

    Raises:
        DataError: It ends in neither `.jsonl` nor `.parquet`.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"{path} must end in .jsonl or .parquet")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, all or nothing.

    A Parquet file has the columns of all rows. One whose values Arrow does not give back as they
    are (of mixed or nested form, or null) holds them as JSON, and so do the messages.

    Raises:
        DataError: The name ends in neither `.jsonl` nor `.parquet`, or JSON has no form of a value.
    """
    check_ending(path)
    part = path.with_suffix(f"{path.suffix}.part")
    if path.suffix == ".parquet":
        _write_parquet(path, part, list(rows))
    else:
        lines = [_json(path, number, row) for number, row in enumerate(rows, start=1)]
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    part.replace(path)


def _json(path: Path, number: int, value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path}, row {number}, has what JSON cannot hold ({error}); give text, numbers, "
            "lists and mappings"
        ) from error
    return text


def _write_parquet(path: Path, part: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [
        {key: _json(path, number, value) for key, value in row.items()}
        for number, row in enumerate(rows, start=1)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns, fields = [], []
    for name in names:
        held = [row.get(name) for row in texts]
        column = None if name == "messages" else _as_it_is([row.get(name) for row in rows], held)
        kind = None if column is not None else {_HELD_AS: b"json"}
        columns.append(pyarrow.array(held, pyarrow.string()) if column is None else column)
        fields.append(pyarrow.field(name, columns[-1].type, metadata=kind))
    table = pyarrow.Table.from_arrays(columns, schema=pyarrow.schema(fields))
    pyarrow.parquet.write_table(table, part)


def _as_it_is(values: Sequence[Any], texts: Sequence[str | None]) -> Any:
    """An Arrow column from which the same values come back; None where there is none.

    Args:
        values: Of the rows; None where one has none, or has null.
        texts: The same as JSON; None only where a row has none.
    """
    import pyarrow

    try:
        column = pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError):
        return None
    # Parquet cannot hold every struct, and gives each the keys of all.
    if pyarrow.types.is_nested(column.type) and column.type != pyarrow.list_(pyarrow.string()):
        return None
    given = [
        None if value is None else json.dumps(value, ensure_ascii=False)
        for value in column.to_pylist()
    ]
    return column if given == list(texts) else None


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no Parquet file: {error}") from error
    marked = {one.name for one in table.schema if (one.metadata or {}).get(_HELD_AS) == b"json"}
    # A file of others has no marks; its messages are JSON or lists.
    held = marked | {"messages"}
    return [
        {
            name: _from_json(path, number, value) if name in held else value
            for name, value in row.items()
            if value is not None
        }
        for number, row in enumerate(table.to_pylist(), start=1)
    ]


def _from_json(path: Path, number: int, held: Any) -> Any:
    if not isinstance(held, str):
        return held
    try:
        return json.loads(held)
    except ValueError as error:
        raise DataError(f"{path}, row {number}, has text that is no JSON: {error}") from error


def user_text(row: Mapping[str, Any]) -> str:
    """All that the user says in a row; of a rollout by its ids, the question."""
    if "messages" not in row:
        return str(row["question"])
    texts = []
    for message in row["messages"]:
        if message["role"] == "user":
            content = message["content"]
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            texts += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(texts)


def videos_of(row: Mapping[str, Any]) -> list[str]:
    """Paths of a row's videos, as they are written."""
    return [where for kind, where in media_of(row) if kind == "video"]


def media_of(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a row shows beside its texts, in order.

    Returns:
        Kind and place of each: `video` or `picture` with its path or address as it is written;
        what is neither as its own type, with all that is said of it.
    """
    if "messages" not in row:
        return [("video", str(row["video"]))]
    return [
        _medium(part)
        for message in row["messages"]
        if isinstance(message["content"], Sequence) and not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] != "text"
    ]


def _medium(part: Mapping[str, Any]) -> tuple[str, str]:
    kind = str(part["type"])
    if kind in _MEDIA:
        return _MEDIA[kind], part[kind]["url"]
    return kind, json.dumps(part, sort_keys=True, default=str)


def keys_of(path: Path, rows: Sequence[Row]) -> list[str]:
    """The id of each row of a file, as text.

    Raises:
        DataError: A row has no `id`, or shares it with another one.
    """
    numbers: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if row.get("id") is None:
            raise DataError(
                f"{path}, row {number}, has no `id`; give each row one of its own, by which it is "
                "reported"
            )
        key = str(row["id"])
        if key in numbers:
            raise DataError(f"{path}, rows {numbers[key]} and {number}, have the same id {key!r}")
        numbers[key] = number
    return list(numbers)


def moved(row: Row, source: Path, target: Path) -> Row:
    """A row as a file in another folder must hold it.

    Args:
        row: Whose paths of videos and images begin at the folder of its file.
        source: That folder.
        target: Folder of the new file; where it is another one, paths become absolute.
    """
    if source.resolve() == target.resolve():
        return row
    if "messages" not in row:
        return row | {"video": str(source.resolve() / row["video"])} if "video" in row else row
    messages = [
        message | {"content": [_moved_part(part, source) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in row["messages"]
    ]
    return row | {"messages": messages}


def is_address(url: str) -> bool:
    """Whether a place of media is an address, such as `https://` or `data:`, and no path."""
    return _SCHEME.match(url) is not None


def _moved_part(part: dict[str, Any], source: Path) -> dict[str, Any]:
    kind = part["type"]
    if kind not in _MEDIA:
        return part
    url = str(part[kind]["url"])
    if is_address(url):
        return part
    return part | {kind: part[kind] | {"url": str(source.resolve() / url)}}


def _lines(path: Path) -> Iterator[Row]:
    # Not `splitlines`, which also breaks at characters that JSON texts may hold (U+2028).
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}, is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}, is no JSON object")
        yield row
