"""What curation hands from step to step, and the chat form that training reads.

The chat form is that of the released training code (OpenGVLab/InternVideo@3965eef, `messages` with
`video_url` and `text` parts), one row a line of JSONL or of a Parquet file. Paths of videos are
relative to the file's folder or absolute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


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
    """Rows of a JSONL or Parquet file.

    Raises:
        DataError: It is neither, or a line is no JSON object.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a .jsonl or .parquet file")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
        return [_with_messages(row, json.loads) for row in rows]
    return list(_lines(path))


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, all or nothing; the messages of a Parquet row are JSON, as parts differ in form.

    Raises:
        DataError: The name ends in neither `.jsonl` nor `.parquet`.
    """
    part = path.with_suffix(f"{path.suffix}.part")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        flat = [_with_messages(row, json.dumps) for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat), part)
    elif path.suffix == ".jsonl":
        part.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    else:
        raise DataError(f"{path} must end in .jsonl or .parquet")
    part.replace(path)


def _with_messages(row: Mapping[str, Any], change: Callable[[Any], Any]) -> Row:
    """A row with its messages changed; rollouts have none."""
    return {k: change(v) if k == "messages" else v for k, v in row.items()}


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
    if "messages" not in row:
        return [str(row["video"])]
    return [
        part["video_url"]["url"]
        for message in row["messages"]
        if isinstance(message["content"], Sequence) and not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "video_url"
    ]


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}, is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}, is no JSON object")
        yield row
