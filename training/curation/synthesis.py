"""Questions from narratives: four dimensions, seventeen categories, Table 1's shares.

The categories are dealt out before anything is written, so that the corpus has Table 1's
distribution by construction; what the checks then drop is reported beside it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from internvideo3.training.curation.narrative import Writer
from internvideo3.training.curation.records import Asked, Narrative
from internvideo3.training.mixture import dealt

PUBLISHED: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "published.yaml").read_text(encoding="utf-8")
)
DIMENSIONS: dict[str, dict[str, float]] = PUBLISHED["qa_percent"]
"""Dimension → category → percent (Table 1)."""
OPTIONS = 4
BLOCK = 1000
TELLING = 2.0
"""An answer this many times as long as the longest wrong option, or as short, gives itself away."""

PROMPT = """This is what happens in a video of {duration:.0f} seconds:
{story}

Its clips:
{clips}

Write one multiple-choice question of the kind "{category}" ({dimension}). It must need the video:
nobody who has not seen it should be able to guess the answer. The wrong options must be plausible,
of the same kind and length as the right one, and wrong. start_s and end_s bound what shows the
answer. Reply with JSON only:
{{"question": str, "answer": str, "distractors": [str, str, str], "start_s": s, "end_s": s}}
"""
_JSON = re.compile(r"\{.*\}", re.DOTALL)
_ALL = re.compile(r"\b(all|none|both) of (the|these)\b|\bcannot be (told|determined)\b", re.I)


class RejectedError(ValueError):
    """A question that a check refused; the message is the reason."""


def shares() -> dict[str, float]:
    """Table 1: category → share of all questions.

    The printed percentages sum to 100.0 up to rounding; they are scaled to sum to 1.
    """
    flat = {name: percent for one in DIMENSIONS.values() for name, percent in one.items()}
    return {name: percent / sum(flat.values()) for name, percent in flat.items()}


def dimension_of(category: str) -> str:
    """The dimension that a category belongs to."""
    return next(name for name, one in DIMENSIONS.items() if category in one)


def category_at(index: int) -> str:
    """The category of the index-th question of a corpus; every thousand have Table 1's shares."""
    return _ORDER[index % BLOCK]


def synthesise(narrative: Narrative, category: str, write: Writer, seed: str) -> Asked:
    """One question, with its options in a random order.

    Raises:
        RejectedError: The reply cannot be read, or a check refuses it.
    """
    clips = "\n".join(
        f"{clip.start_s:.1f} to {clip.end_s:.1f} s: {clip.caption}" for clip in narrative.clips
    )
    prompt = PROMPT.format(
        duration=narrative.duration_s, story=narrative.text, clips=clips, category=category,
        dimension=dimension_of(category),
    )  # fmt: skip
    asked = _read(write(prompt, ()), category, random.Random(f"options/{seed}"))
    for check in CHECKS:
        fault = check(asked, narrative)
        if fault:
            raise RejectedError(fault)
    return asked


def _read(reply: str, category: str, rng: random.Random) -> Asked:
    found = _JSON.search(reply)
    try:
        told = json.loads(found.group(0) if found else reply)
        options = [str(told["answer"]).strip(), *(str(d).strip() for d in told["distractors"])]
        rng.shuffle(options)
        asked = Asked(
            category=category,
            question=str(told["question"]).strip(),
            options=tuple(options),
            answer=str(told["answer"]).strip(),
            evidence_s=(float(told["start_s"]), float(told["end_s"])),
        )
        # Half of a character, which JSON can say, cannot be written down.
        "".join([asked.question, *asked.options]).encode()
        return asked
    # Of replies without an end: brackets in brackets, and numbers of hundreds of digits.
    except (ValueError, LookupError, TypeError, RecursionError, OverflowError) as error:
        fault = f"the reply is not the JSON that was asked for ({error!r:.200})"
        raise RejectedError(fault) from error


def plain(text: str) -> str:
    """A text as the checks compare it: lower case, words and numbers only."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _options_fault(asked: Asked, narrative: Narrative) -> str | None:
    """Options must be four, different, and none of them a part of another."""
    texts = [plain(option) for option in asked.options]
    if len(texts) != OPTIONS or not all(texts):
        return f"{len(texts)} options, {OPTIONS} are asked"
    if len(set(texts)) < len(texts):
        return "two options say the same"
    right = plain(asked.answer)
    part = [
        t for t in texts if t != right and (f" {t} " in f" {right} " or f" {right} " in f" {t} ")
    ]
    if part:
        return "a wrong option holds the right one, or is a part of it"
    if any(_ALL.search(option) for option in asked.options):
        return "an option is about the other options"
    return None


def _length_fault(asked: Asked, narrative: Narrative) -> str | None:
    """The right option must not stand out by its length."""
    right = len(asked.answer)
    wrong = [len(option) for option in asked.options if option != asked.answer]
    if right > TELLING * max(wrong) or TELLING * right < min(wrong):
        return "the length of the right option gives it away"
    return None


def _question_fault(asked: Asked, narrative: Narrative) -> str | None:
    """The question must not say its answer."""
    if not asked.question:
        return "there is no question"
    if f" {plain(asked.answer)} " in f" {plain(asked.question)} ":
        return "the question says its answer"
    return None


def _evidence_fault(asked: Asked, narrative: Narrative) -> str | None:
    """What shows the answer must lie in the video."""
    start, end = asked.evidence_s
    if not 0 <= start < end <= narrative.duration_s + 0.5:
        return f"evidence at {start:g} to {end:g} s of a video of {narrative.duration_s:g} s"
    return None


CHECKS: tuple[Callable[[Asked, Narrative], str | None], ...] = (
    _question_fault, _options_fault, _length_fault, _evidence_fault,
)  # fmt: skip


def guessed(asked: Asked, guesses: Sequence[str]) -> bool:
    """Whether a model that saw no video got the question right every time that it was asked."""
    right = plain(asked.answer)
    return bool(guesses) and all(f" {right} " in f" {plain(guess)} " for guess in guesses)


def blind_prompt(asked: Asked) -> str:
    """The question as a model without the video is asked it."""
    options = "\n".join(asked.options)
    return (
        f"{asked.question}\n{options}\nAnswer with the text of one option, even if you must guess."
    )


_ORDER = dealt(shares(), BLOCK)
