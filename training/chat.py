"""Documents of files in the chat form: real videos and images, decoded as evaluation does.

A row that cannot be used (its video is broken or missing, its text has placeholders of its own) is
logged, counted and replaced by the next one of its file; more of them than the budget allows end
the run, with the states of finished steps kept.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from internvideo3.model.fitting import fit_frames, fit_image
from internvideo3.model.prompt import Prompter
from internvideo3.model.scale.build import SYSTEM_PROMPT
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.training.acted import Shelf, acted, is_rollout
from internvideo3.training.curation.records import DataError, Row, read_rows
from internvideo3.training.documents import Document, Prompt, replied
from internvideo3.training.mixture import dealt
from internvideo3.training.recipe import ChatData, Modality

log = logging.getLogger("internvideo3.training")
BLOCK = 1000
"""Samples after which the shares of the files are exact."""
MARK = "<VIDEO_CONTEXT>"
"""Where the released data put a video into a text (OpenGVLab/InternVideo@3965eef); it is before the
text here, as Qwen3-VL's template has it."""
FEW = 10
"""Bad rows that are always forgiven: of a handful of rows one is more than any budget."""


@dataclass(frozen=True)
class Media:
    """What a row shows."""

    frames: tuple[Any, ...]
    images: tuple[Any, ...]


class ChatDocuments:
    """The documents of a stage, by index."""

    def __init__(self, data: ChatData, processor: Any, seed: int) -> None:
        """Reads all rows; videos only when they are asked for.

        Raises:
            DataError: A file cannot be read, or is empty.
            RecipeError: The shares do not sum to 1.
        """
        self.data = data
        self.seed = seed
        self.prompter = Prompter(processor, {"do_resize": False})
        self.reader = IsolatedReader()
        image = processor.image_processor
        self.factor = int(image.patch_size * image.merge_size)
        self.rows = {name: read_rows(Path(name)) for name in data.files}
        for name, rows in self.rows.items():
            if not rows:
                raise DataError(f"{name} has no rows; leave it out of the recipe")
        self.shelf = Shelf(self._look)
        self.order = dealt(data.files, BLOCK)
        self.seen = 0
        self.bad: dict[tuple[str, int], str] = {}
        """File and number of a row (ids may be missing, or repeat) → why it cannot be used."""

    def kind(self, index: int) -> Modality:
        """What the row of an index shows."""
        row = self._row(index)[1]
        if is_rollout(row):
            return "video"
        parts = _parts(row)
        kinds = {part["type"] for part in parts}
        return "video" if "video_url" in kinds else "image" if "image_url" in kinds else "text"

    def taught(self, index: int) -> Document:
        """A row and its last reply, which is what is learnt; of a rollout, all its words."""
        made: Document = self._usable(index, self._taught)
        return made

    def prompt(self, index: int) -> Prompt:
        """A row to answer, with what scores the answer."""
        made: Prompt = self._usable(index, self._prompt)
        return made

    def _usable(self, index: int, make: Any) -> Any:
        """What can be made of the row of an index, or of the next one that can be used.

        Raises:
            DataError: There are too many bad rows.
        """
        for step in range(len(self.rows[self.order[index % BLOCK]])):
            name, number = self._place(index, step)
            if (name, number) in self.bad:
                continue
            self.seen += 1
            row = self.rows[name][number]
            try:
                return make(row, Path(name).parent)
            except (ValueError, LookupError, TypeError, OSError) as error:
                self.bad[name, number] = str(error)
                what = f"{name}, row {number + 1} (id {row.get('id')})"
                log.warning("%s is left out: %s", what, error)
                self._check_budget(error)
        raise DataError(f"no row of {self.order[index % BLOCK]} can be used; see the log")

    def _check_budget(self, error: Exception) -> None:
        bad = len(self.bad)
        if bad > max(FEW, self.data.most_bad * self.seen):
            raise DataError(
                f"{bad} of {self.seen} rows cannot be used, more than {self.data.most_bad:.0%}; "
                f"the last one: {error}. Repair the data or raise data.most_bad; the states of "
                "finished steps are kept."
            ) from error

    def _row(self, index: int) -> tuple[str, Row]:
        """File and row of an index."""
        name, number = self._place(index)
        return name, self.rows[name][number]

    def _place(self, index: int, step: int = 0) -> tuple[str, int]:
        """File of an index and number of its row there, from 0; `step` rows on."""
        block, place = divmod(index, BLOCK)
        name = self.order[place]
        before = _before(tuple(self.order))[place] + block * Counter(self.order)[name]
        count = len(self.rows[name])
        epoch, at = divmod(before, count)
        chosen = _shuffled(count, self.seed, f"{name}/{epoch}")
        return name, chosen[(at + step) % count]

    def _taught(self, row: Row, folder: Path) -> Document:
        if is_rollout(row):
            return acted(row, folder, self.prompter, self.shelf)
        messages = row["messages"]
        if messages[-1]["role"] != "assistant":
            raise DataError("the last message is not the assistant's")
        text, media = self._asked(messages[:-1], folder)
        piece = self.prompter.piece(text, media.frames, media.images)
        return replied(self.prompter, piece, _text(messages[-1]))

    def _prompt(self, row: Row, folder: Path) -> Prompt:
        if is_rollout(row):
            raise DataError("a rollout by its ids is for supervised stages; give questions here")
        text, media = self._asked(row["messages"][:-1], folder)
        if len(media.frames) != 1 or media.images:
            raise DataError("a rollout needs exactly one video")
        doc = {
            "id": str(row.get("id")), "family": row.get("category", "all"),
            "options": row.get("options"), "answer": row["answer"],
            "answer_type": row.get("answer_type", "choice" if row.get("options") else "span"),
            "length_s": media.frames[0].duration_s,
        }  # fmt: skip
        return Prompt(text, media.frames[0], row.get("doc", doc), row.get("benchmark"))

    def _asked(self, messages: Sequence[Mapping[str, Any]], folder: Path) -> tuple[str, Media]:
        """The rendered prompt, and its media in order."""
        frames: list[Any] = []
        images: list[Any] = []
        turns: list[dict[str, Any]] = []
        if messages[0]["role"] != "system":
            turns.append({"role": "system", "content": SYSTEM_PROMPT})
        for message in messages:
            content = []
            for part in _content(message):
                if part["type"] == "video_url":
                    frames.append(self._video(folder / part["video_url"]["url"]))
                    content.append({"type": "video"})
                elif part["type"] == "image_url":
                    images.append(self._image(folder / part["image_url"]["url"]))
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": part["text"].replace(MARK, "")})
            turns.append({"role": message["role"], "content": content})
        return self.prompter.render(turns), Media(tuple(frames), tuple(images))

    def _video(self, path: Path) -> Any:
        read = self.reader.read(path, fps=self.data.fps, max_frames=self.data.max_frames)
        return fit_frames(
            read, factor=self.factor, min_pixels=self.data.min_pixels,
            max_pixels=self.data.max_pixels,
        )  # fmt: skip

    def _look(self, path: Path, how: Mapping[str, Any]) -> Any:
        """Frames as a rollout's look says, whatever the recipe says of videos."""
        read = self.reader.read(
            path, fps=how["fps"], max_frames=how["max_frames"], start_s=how["start_s"],
            end_s=how["end_s"],
        )  # fmt: skip
        return fit_frames(
            read, factor=self.factor, min_pixels=how["min_pixels"], max_pixels=how["max_pixels"]
        )

    def _image(self, path: Path) -> Any:
        with Image.open(path) as opened:
            whole = opened.convert("RGB")
        return fit_image(whole, self.factor, self.data.min_pixels, self.data.max_pixels)


def _content(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _parts(row: Row) -> list[dict[str, Any]]:
    return [part for message in row["messages"] for part in _content(message)]


def _text(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in _content(message))


@lru_cache(maxsize=4)
def _before(order: tuple[str, ...]) -> list[int]:
    """How often each place's name stands before it."""
    seen: Counter[str] = Counter()
    places = []
    for name in order:
        places.append(seen[name])
        seen[name] += 1
    return places


@lru_cache(maxsize=16)
def _shuffled(count: int, seed: int, what: str) -> list[int]:
    order = list(range(count))
    random.Random(f"chat/{seed}/{what}").shuffle(order)
    return order
