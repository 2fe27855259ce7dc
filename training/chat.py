"""Documents of files in the chat form: real videos and images, decoded as evaluation does.

A row that cannot be used (its video is broken or missing, its text has placeholders of its own, it
is longer than a row of training) is logged, counted and replaced by the next one of its file; more
of them than the budget allows end the run, with the states of finished steps kept.

Of a conversation with several turns every reply is learnt.
"""

from __future__ import annotations

import logging
import random
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from internvideo3.model.fitting import fit_image, fitter
from internvideo3.model.prompt import Medium, Piece, Prompter
from internvideo3.model.scale.build import SYSTEM_PROMPT
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.training.acted import Shelf, acted, is_rollout
from internvideo3.training.curation.budget import FEW, UNUSABLE
from internvideo3.training.curation.records import DataError, Row, read_rows
from internvideo3.training.documents import Document, Prompt, check_scored, replied
from internvideo3.training.mixture import block_of, dealt, in_order
from internvideo3.training.recipe import ChatData, Modality

log = logging.getLogger("internvideo3.training")
MARK = "<VIDEO_CONTEXT>"
"""Where the released data put a video into a text (OpenGVLab/InternVideo@3965eef); it is before the
text here, as Qwen3-VL's template has it."""
LETTERED = re.compile(r"\(?([A-Za-z])\)?(?:[.:)]\s*(.*))?")
"""`B`, `(B)`, `B.`, `B. a red ring`."""
SEEN = 7 / 8
"""Share of a row's tokens that its videos may take; time stamps and words need the rest."""


@dataclass(frozen=True)
class RowLimits:
    """What a document has to fit and to hold."""

    tokens: int | None = None
    """Tokens of a row of training; None: any number."""
    answer_tokens: int = 0
    """Tokens of the responses that will be put behind a prompt."""
    scored: bool = True
    """Whether responses to a prompt are scored, so that it must say what is right."""


NO_LIMITS = RowLimits()


@dataclass(frozen=True)
class Media:
    """What a row shows."""

    frames: tuple[Any, ...]
    images: tuple[Any, ...]


class ChatDocuments:
    """The documents of a stage, by index."""

    def __init__(
        self, data: ChatData, processor: Any, seed: int, row: RowLimits = NO_LIMITS
    ) -> None:
        """Reads all rows; videos only when they are asked for.

        Args:
            data: What the recipe says of them.
            processor: The policy's.
            seed: Of the recipe.
            row: What a document has to fit and to hold.

        Raises:
            DataError: A file cannot be read, or is empty.
            RecipeError: The shares do not sum to 1.
        """
        self.data = data
        self.row = row
        self.seed = seed
        self.prompter = Prompter(processor, {"do_resize": False})
        self.reader = IsolatedReader()
        image = processor.image_processor
        self.factor = int(image.patch_size * image.merge_size)
        self.token_pixels = int(image.temporal_patch_size) * self.factor**2
        self.end = self.prompter.tokenizer.decode(self.prompter.tokenize(self.prompter.closing)[:1])
        self.placeholders = processor.video_token, processor.image_token
        self.rows = {name: read_rows(Path(name)) for name in data.files}
        for name, rows in self.rows.items():
            if not rows:
                raise DataError(f"{name} has no rows; leave it out of the recipe")
        self.shelf = Shelf(self._look)
        shares = in_order(data.files)
        self.order = tuple(dealt(shares, block_of(shares)))
        """Each place's file; after all of them the shares are exact, and it begins anew."""
        self.before = _before(self.order)
        self.in_block = Counter(self.order)
        self.shuffled: dict[str, tuple[int, Sequence[int]]] = {}
        """File → its present epoch and that one's order; to shuffle all rows for each is slow."""
        self.seen = 0
        self.bad: dict[tuple[str, int], str] = {}
        """File and number of a row (ids may be missing, or repeat) → why it cannot be used."""

    def of_kind(self, kind: Modality, count: int) -> Iterator[Document]:
        """The first so many rows of a kind in the order of the files, or as many as there are.

        Raises:
            DataError: There are too many bad rows.
        """
        places = (
            (name, number)
            for name, rows in self.rows.items()
            for number, row in enumerate(rows)
            if _kind_if_any(row) == kind
        )
        found = (self._made(*place, self._taught) for place in places)
        return islice((one for one in found if one is not None), count)

    def taught(self, index: int) -> Document:
        """A row and its replies, which are what is learnt; of a rollout, all its words."""
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
        file = self.order[index % len(self.order)]
        for step in range(len(self.rows[file])):
            made = self._made(*self._place(index, step), make)
            if made is not None:
                return made
        raise DataError(f"no row of {file} can be used; see the log")

    def _made(self, name: str, number: int, make: Any) -> Any:
        """What can be made of a row; None if nothing can, which is noted."""
        if (name, number) in self.bad:
            return None
        self.seen += 1
        row = self.rows[name][number]
        try:
            return make(row, Path(name).parent)
        except UNUSABLE as error:
            self.bad[name, number] = _reason(error)
            what = f"{name}, row {number + 1} (id {row.get('id')})"
            log.warning("%s is left out: %s", what, self.bad[name, number])
            self._check_budget(error)
            return None

    def _check_budget(self, error: Exception) -> None:
        bad = len(self.bad)
        if bad > max(FEW, self.data.most_bad * self.seen):
            raise DataError(
                f"{bad} of {self.seen} rows cannot be used, more than {self.data.most_bad:.0%}; "
                f"the last one: {_reason(error)}. Repair the data or raise data.most_bad; the "
                "states of finished steps are kept."
            ) from error

    def _row(self, index: int) -> tuple[str, Row]:
        """File and row of an index."""
        name, number = self._place(index)
        return name, self.rows[name][number]

    def _place(self, index: int, step: int = 0) -> tuple[str, int]:
        """File of an index and number of its row there, from 0; `step` rows on."""
        block, place = divmod(index, len(self.order))
        name = self.order[place]
        before = self.before[place] + block * self.in_block[name]
        count = len(self.rows[name])
        epoch, at = divmod(before, count)
        return name, self._shuffled(name, epoch)[(at + step) % count]

    def _shuffled(self, name: str, epoch: int) -> Sequence[int]:
        """Numbers of a file's rows in the order of an epoch."""
        held = self.shuffled.get(name)
        if held is None or held[0] != epoch:
            held = epoch, _shuffled(len(self.rows[name]), self.seed, f"{name}/{epoch}")
            self.shuffled[name] = held
        return held[1]

    def _taught(self, row: Row, folder: Path) -> Document:
        made = self._whole(row, folder)
        self._check_length(len(made))
        return made

    def _whole(self, row: Row, folder: Path) -> Document:
        if is_rollout(row):
            return acted(row, folder, self.prompter, self.shelf)
        messages = row["messages"]
        if messages[-1]["role"] != "assistant":
            raise DataError("the last message is not the assistant's")
        text, media = self._asked(messages[:-1], folder)
        asked = self._turns(text)
        replies = sum(message["role"] == "assistant" for message in messages[:-1])
        if len(asked) // 2 != replies:
            found = len(asked) // 2
            raise DataError(f"its text has turns of its own: {replies} replies, {found} found")
        piece, said = self._joined(asked, media)
        return replace(replied(self.prompter, piece, _text(messages[-1])), said=said)

    def _turns(self, text: str) -> list[str]:
        """A rendered conversation as prompt, reply with its end, prompt, … and the last prompt."""
        turns: list[str] = []
        begun, at = 0, text.find(self.prompter.opening)
        while (end := text.find(self.end, at)) >= 0 <= at:
            at, end = at + len(self.prompter.opening), end + len(self.end)
            turns += [text[begun:at], text[at:end]]
            begun, at = end, text.find(self.prompter.opening, end)
        return [*turns, text[begun:]]

    def _joined(
        self, turns: Sequence[str], media: Media
    ) -> tuple[Piece, tuple[tuple[int, int], ...]]:
        """Turns as one prompt, and from and to which of its ids the replies in it stand.

        Each is tokenised alone, since a reply is sampled behind the ids of what it replies to.
        """
        ids: list[int] = []
        shown: list[Medium] = []
        said: list[tuple[int, int]] = []
        frames, images = iter(media.frames), iter(media.images)
        for number, turn in enumerate(turns):
            videos, pictures = (turn.count(token) for token in self.placeholders)
            piece = self.prompter.piece(turn, list(islice(frames, videos)),
                                        list(islice(images, pictures)))  # fmt: skip
            if number % 2:
                said.append((len(ids), len(ids) + len(piece.ids)))
            ids += piece.ids
            shown += piece.media
        if len(shown) != len(media.frames) + len(media.images):
            raise DataError("it has fewer placeholders than videos and images")
        return Piece(ids, shown), tuple(said)

    def _check_length(self, tokens: int) -> None:
        if self.row.tokens is not None and tokens > self.row.tokens:
            raise DataError(f"it has {tokens} tokens, and pack_tokens is {self.row.tokens}")

    def _prompt(self, row: Row, folder: Path) -> Prompt:
        if is_rollout(row):
            raise DataError("a rollout by its ids is for supervised stages; give questions here")
        text, media = self._asked(asked_of(row["messages"]), folder)
        if len(media.frames) != 1 or media.images:
            raise DataError("a rollout needs exactly one video")
        if self.row.tokens is not None:
            asked = self.prompter.piece(text, media.frames)
            self._check_length(len(asked.ids) + self.row.answer_tokens)
        made = Prompt(text, media.frames[0], self._doc(row, media.frames[0]), row.get("benchmark"))
        if self.row.scored:
            check_scored(made.benchmark, made.doc)
        return made

    def _doc(self, row: Row, frames: Any) -> Mapping[str, Any]:
        """What scores the answer: the row's own document, or one of its fields."""
        if row.get("doc") is not None:
            return dict(row["doc"])
        if self.row.scored and row.get("answer") is None:
            raise DataError("it has no `answer` to score responses by")
        return doc_of(row) | {"length_s": frames.duration_s}

    def _asked(self, messages: Sequence[Mapping[str, Any]], folder: Path) -> tuple[str, Media]:
        """The rendered prompt, and its media in order."""
        frames: list[Any] = []
        images: list[Any] = []
        turns: list[dict[str, Any]] = []
        parts = [part for message in messages for part in _content(message)]
        videos = sum(part["type"] == "video_url" for part in parts)
        if messages[0]["role"] != "system":
            turns.append({"role": "system", "content": SYSTEM_PROMPT})
        for message in messages:
            content = []
            for part in _content(message):
                if part["type"] == "video_url":
                    frames.append(self._video(folder / part["video_url"]["url"], videos))
                    content.append({"type": "video"})
                elif part["type"] == "image_url":
                    images.append(self._image(folder / part["image_url"]["url"]))
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": part["text"].replace(MARK, "")})
            turns.append({"role": message["role"], "content": content})
        return self.prompter.render(turns), Media(tuple(frames), tuple(images))

    def _video(self, path: Path, videos: int) -> Any:
        """A video at the size at which all frames of the row's videos are within the limits."""
        data = self.data
        totals = [] if data.total_pixels is None else [data.total_pixels]
        if self.row.tokens is not None:
            room = self.row.tokens - self.row.answer_tokens
            totals.append(int(SEEN * room / videos) * self.token_pixels)

        def bounds(count: int) -> tuple[int, int]:
            most = max(1, min([data.max_pixels, *(total // count for total in totals)]))
            return min(data.min_pixels, most), most

        return self.reader.read(
            path, fps=data.fps, max_frames=data.max_frames, fit=fitter(self.factor, bounds)
        )

    def _look(self, path: Path, how: Mapping[str, Any]) -> Any:
        """Frames as a rollout's look says, whatever the recipe says of videos."""
        return self.reader.read(
            path, fps=how["fps"], max_frames=how["max_frames"], start_s=how["start_s"],
            end_s=how["end_s"],
            fit=fitter(self.factor, lambda _: (how["min_pixels"], how["max_pixels"])),
        )  # fmt: skip

    def _image(self, path: Path) -> Any:
        with Image.open(path) as opened:
            whole = opened.convert("RGB")
        return fit_image(whole, self.factor, self.data.min_pixels, self.data.max_pixels)


def _reason(error: Exception) -> str:
    """An error in words; a missing key's own message is the key alone."""
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _content(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def asked_of(messages: Sequence[Row]) -> Sequence[Row]:
    """The messages that ask: all but a reply at the end, which is what they ask for."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def doc_of(row: Row) -> dict[str, Any]:
    """What scores the answer to a row that has no document of its own.

    Raises:
        DataError: Its answer is none of its options.
    """
    answer, options = row.get("answer"), row.get("options")
    if answer is not None and options:
        answer = option_meant(str(answer), options)
    return {
        "id": str(row.get("id")), "family": row.get("category", "all"),
        "options": options, "answer": answer,
        "answer_type": row.get("answer_type") or ("choice" if options else "span"),
    }  # fmt: skip


def option_meant(answer: str, options: Sequence[str]) -> str:
    """The option that an answer names by its words or, as most data do, by its letter.

    Raises:
        DataError: It names none.
    """
    bare = [str(option).strip() for option in options]
    text = answer.strip()
    if text in bare:
        return str(options[bare.index(text)])
    found = LETTERED.fullmatch(text)
    place = ord(found[1].upper()) - ord("A") if found else len(bare)
    if found is None or place >= len(bare) or (found[2] or bare[place]) != bare[place]:
        raise DataError(f"its answer {answer!r} is none of its options: {', '.join(bare)}")
    return str(options[place])


def shares_of(files: Mapping[str, float]) -> dict[Modality, float]:
    """Shares of the kinds by samples, as the shares of files make them.

    Raises:
        DataError: A file cannot be read.
    """
    found: dict[Modality, float] = dict.fromkeys(get_args(Modality), 0.0)
    for name, share in files.items():
        kinds = map(_kind_if_any, read_rows(Path(name)))
        counts = Counter(kind for kind in kinds if kind is not None)
        for kind, count in counts.items():
            found[kind] += share * count / counts.total()
    return found


def kind_of(row: Row) -> Modality:
    """What a row shows."""
    if is_rollout(row):
        return "video"
    messages = row.get("messages") or ()
    kinds = {part.get("type") for message in messages for part in _content(message)}
    return "video" if "video_url" in kinds else "image" if "image_url" in kinds else "text"


def _kind_if_any(row: Row) -> Modality | None:
    """None for a row that cannot be used, which is told when it is asked for."""
    try:
        return kind_of(row)
    except (LookupError, TypeError, AttributeError):
        return None


def _text(message: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in _content(message))


def _before(order: tuple[str, ...]) -> list[int]:
    """How often each place's name stands before it."""
    seen: Counter[str] = Counter()
    places = []
    for name in order:
        places.append(seen[name])
        seen[name] += 1
    return places


def _shuffled(count: int, seed: int, what: str) -> Sequence[int]:
    order = list(range(count))
    random.Random(f"chat/{seed}/{what}").shuffle(order)
    return array("q", order)
