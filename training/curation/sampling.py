"""Responses of a student, and of a teacher, to rows in the chat form, as `filters.py` reads them.

What comes out is the row itself, which trains as it is, and with it `benchmark` and `doc` (what the
scorers read), `predictions` at `temperature` 1, and where there is a teacher a response of each,
`teacher` and `student`. A description, which no rule scores, has a `reference` too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from internvideo3.tasks.scoring.numeric import read_span
from internvideo3.training.chat import MARK, ChatDocuments, RowLimits
from internvideo3.training.curation.records import DataError, Row, user_text
from internvideo3.training.documents import SCORED_AS, Prompt, check_scored
from internvideo3.training.endpoint import Endpoint
from internvideo3.training.recipe import ChatData
from internvideo3.training.rollouts import Sampler

TEMPERATURE = 1.0
"""At which `Sampler` samples; section 4.3 samples questions for reinforcement learning at it."""
TEXT = "text"
"""`answer_type` of a row whose answer is a description, whatever it reads like."""


class RowPrompts(ChatDocuments):
    """Prompts of given rows, made as training makes them.

    Their frames are training's where what is said of data and row is what the recipe says.
    """

    def of(self, row: Row) -> Prompt:
        """The prompt of a row.

        Raises:
            ValueError, LookupError, TypeError, AttributeError, OSError: The row cannot be used.
        """
        return self._prompt(row, Path(next(iter(self.data.files))).parent)


class Teacher(Protocol):
    """Who answers beside the student."""

    def answer(self, row: Row, prompt: Prompt, seed: int) -> str:
        """One response to a row; `prompt` is the student's."""


@dataclass(frozen=True)
class LoadedTeacher:
    """A checkpoint in this process."""

    prompts: RowPrompts
    """As its own processor has them."""
    sampler: Sampler

    def answer(self, row: Row, prompt: Prompt, seed: int) -> str:
        """One response at temperature 1.

        Raises:
            PromptError: The row's text has places for media of its own.
        """
        return self.sampler.sample(self.prompts.of(row), 1, seed)[0].text


@dataclass(frozen=True)
class ServedTeacher:
    """A model behind a server of OpenAI's form, asked in one turn with the student's frames."""

    endpoint: Endpoint
    max_new_tokens: int

    def answer(self, row: Row, prompt: Prompt, seed: int) -> str:
        """One response at temperature 1.

        Raises:
            EndpointError: The server does not answer.
            DataError: The row has more turns than one.
        """
        turns = [one["role"] for one in row["messages"] if one["role"] != "system"]
        if turns != ["user", "assistant"]:
            raise DataError(f"a served teacher is asked in one turn, and this row has {len(turns)}")
        return self.endpoint.write(
            user_text(row).replace(MARK, "").strip(),
            list(prompt.frames.pixels_THWC),
            temperature=TEMPERATURE,
            max_tokens=self.max_new_tokens,
            seed=seed,
        )


def sampled(
    row: Row, prompts: RowPrompts, student: Sampler, teacher: Teacher | None, count: int, seed: int
) -> Row:
    """A row with `count` responses of the student and one of the teacher.

    What is drawn depends on the seed and the row's id, not on the other rows.

    Args:
        row: In the chat form, about one video.
        prompts: Of the student.
        student: Answers `count` times.
        teacher: Answers once; None for none.
        count: Responses.
        seed: Of the responses.

    Raises:
        ValueError, LookupError, TypeError, AttributeError, OSError: The row cannot be used.
        EndpointError: The teacher's server does not answer.
    """
    whole = completed(row)
    prompt = prompts.of(whole)
    judged = judged_by(whole, prompt)
    said = student.sample(prompt, count, _seed("student", seed, row))
    made = whole | judged | {
        "predictions": [one.text for one in said],
        "temperature": TEMPERATURE,
    }  # fmt: skip
    if teacher is not None:
        theirs = teacher.answer(whole, prompt, _seed("teacher", seed, row))
        made |= {"teacher": theirs, "student": said[0].text}
    return made


def completed(row: Row) -> Row:
    """A row with its right answer both as `answer` and as the last message, as training reads it.

    Raises:
        LookupError: It has neither.
    """
    messages = list(row["messages"])
    if messages[-1]["role"] == "assistant":
        return row | {"answer": row.get("answer") or _said(messages[-1])}
    reply = {"role": "assistant", "content": str(row["answer"])}
    return row | {"messages": [*messages, reply]}


def judged_by(row: Row, prompt: Prompt) -> Row:
    """By what the filters judge responses: `benchmark`, `doc`, and of a description `reference`.

    Raises:
        ScoringError, DataError: Its rule cannot score the row.
    """
    benchmark = prompt.benchmark or SCORED_AS
    judged: Row = {"benchmark": benchmark, "doc": dict(prompt.doc)}
    if is_description(row):
        return judged | {"reference": str(row.get("reference") or row["answer"])}
    # What cannot be scored is told now, before it is sampled, and not by the filter.
    check_scored(benchmark, judged["doc"])
    return judged


def is_description(row: Row) -> bool:
    """Whether no rule says if a response is right: neither options nor a span are its answer."""
    if row.get("reference") or row.get("answer_type") == TEXT:
        return True
    ruled = any(row.get(key) for key in ("benchmark", "doc", "options", "answer_type"))
    return not ruled and read_span(str(row["answer"])) is None


def prompts_of(
    rows: Path,
    processor: Any,
    look: Mapping[str, Any],
    row_tokens: int | None = None,
    answer_tokens: int = 0,
) -> RowPrompts:
    """Prompts of a file's rows for a model's processor.

    Args:
        rows: The file.
        processor: Of the model.
        look: How frames are taken: `ChatData`'s fps, max_frames and limits of pixels.
        row_tokens: Of a row of training, by which its frames are sized; None: any number.
        answer_tokens: Of the responses that training puts behind a prompt in such a row.
    """
    # Descriptions are prompts too, and `judged_by` tells what cannot be scored.
    limits = RowLimits(row_tokens, answer_tokens, scored=False)
    return RowPrompts(ChatData(files={str(rows): 1.0}, **look), processor, 0, limits)


def _said(message: Mapping[str, Any]) -> str:
    content = message["content"]
    parts = [{"text": content}] if isinstance(content, str) else content
    return "".join(str(part["text"]) for part in parts).strip()


def _seed(who: str, seed: int, row: Row) -> int:
    """31 bits, which servers take too."""
    digest = hashlib.sha256(f"{who}/{seed}/{row['id']}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
