"""What is kept for training, as pure functions whose every drop has a reason.

Filters read rollouts that are on disk, so that another threshold needs no new sampling. A rollout
row has `id`, `benchmark` and `doc` (what the scorers read) and `predictions`; section 4.3 has the
thresholds.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internvideo3.tasks.scoring.entry import score
from internvideo3.tasks.scoring.result import ScoringError
from internvideo3.training.curation.records import DataError, Row, media_of, user_text
from internvideo3.training.curation.synthesis import plain

LOW_IOU, HIGH_IOU = 0.1, 0.7
RIGHT = 0.5
"""A score from here on counts as right."""
SHINGLE = 5
"""Words of a shingle; texts are compared by the shingles that they share."""
NEAR = 0.8
"""Share of common shingles from which two questions about one video are the same question."""
LEAKED = 0.5
"""Share of a benchmark question's shingles from which a training question repeats it."""
_OPTION_LINE = re.compile(r"^[ \t]*(\([A-J]\)|[A-J][.)])[ \t].*$", re.MULTILINE)
_OPTIONS_INLINE = re.compile(r"[ \t]\(A\)[ \t].*$", re.MULTILINE)
_QUOTED = r"(?:'[^'\n]*'|\"[^\"\n]*\")"
_OPTIONS_LIST = re.compile(rf"\[\s*{_QUOTED}(?:\s*,\s*{_QUOTED})+\s*\]")
_OPTIONS_HEAD = re.compile(
    r"(?:^|(?<=[?.!:\u3002\uff1f\uff01\uff1a]))[ \t]*(?:answer )?(?:options|choices|candidates)"
    r"[ \t]*:?[ \t]*$", re.MULTILINE | re.IGNORECASE
)  # fmt: skip
_STYLES = (r"\({}\)", r"{}[.)]", r"{}:")
_LETTERS = (string.ascii_uppercase, string.ascii_lowercase)
_NUMBERS = tuple(str(n) for n in range(1, 27))
_AT_LINE = (r"(?m:^)[ \t]*", r"(?m:^)[ \t]*")
_IN_LINE = (r"(?<=[?.!:\u3002\uff1f\uff01\uff1a])[ \t]*", r"[ \t]")
"""What stands before the first option's label, and before the next ones'."""
_TAG = re.compile(r"<[^<>\s]{1,40}>")
"""A place of media in a text, such as `<VIDEO_CONTEXT>`."""
_SENTENCE_END = re.compile(r"[?\uff1f]+|[.!:]+(?=\s|$)|[\u3002\uff01\uff1a]|\n")
LISTED = 2
"""So many lines or more behind the first one may be options, whatever they look like."""


@dataclass(frozen=True)
class Kept:
    """What a filter kept, and why it dropped the rest."""

    rows: tuple[Row, ...]
    dropped: dict[str, str]
    """id → reason."""

    def or_fail(self, what: str) -> Kept:
        """Itself.

        Raises:
            DataError: Nothing is left.
        """
        if self.rows:
            return self
        reasons = sorted({reason for reason in self.dropped.values()})
        raise DataError(
            f"{what} kept none of {len(self.dropped)} rows; reasons: {'; '.join(reasons[:5])}. "
            "Nothing was written."
        )


def by_iou(rows: Sequence[Row], low: float = LOW_IOU, high: float = HIGH_IOU) -> Kept:
    """Grounding examples that the model half solves: IoU from `low` to `high`, both included.

    A row that its rule cannot score is dropped.

    Raises:
        DataError: A row is no rollout, or has not exactly one prediction.
    """

    def reason(row: Row) -> str | None:
        (iou,) = _scores(row, 1)
        if iou < low:
            return f"IoU {iou:.3f} below {low:g}: too far off to teach"
        return f"IoU {iou:.3f} above {high:g}: solved" if iou > high else None

    return _filtered(rows, reason)


def by_mixed_answers(rows: Sequence[Row]) -> Kept:
    """Multiple-choice questions that temperature-1 samples answer both right and wrong.

    A row that its rule cannot score, such as a description, is dropped.

    Raises:
        DataError: A row is no rollout, or was not sampled at temperature 1, or less than twice.
    """

    def reason(row: Row) -> str | None:
        if row.get("temperature") != 1.0:
            raise DataError(
                f"row {row['id']} was sampled at temperature {row.get('temperature')}; sample at 1"
            )
        right = [value >= RIGHT for value in _scores(row, 2)]
        if all(right):
            return f"right in all {len(right)} samples"
        return f"wrong in all {len(right)} samples" if not any(right) else None

    return _filtered(rows, reason)


def by_gap(rows: Sequence[Row]) -> Kept:
    """Questions for distillation: the teacher's answer is good and the student's is not.

    A row has `teacher` and `student`, a prediction each. Where there is a `reference` (a long
    description), good means more complete: more of the reference's words, by a tenth at least.
    Any other row that its rule cannot score is dropped.

    Raises:
        DataError: A row is no rollout, or lacks one of the predictions.
    """

    def reason(row: Row) -> str | None:
        missing = [key for key in ("teacher", "student") if key not in row]
        if missing:
            raise DataError(f"row {row['id']} has no {' and no '.join(missing)} prediction")
        if "reference" in row:
            told = [coverage(row[who], row["reference"]) for who in ("teacher", "student")]
            more = round(told[0] - told[1], 9)  # 0.3 is a little less than 0.2 + 0.1
            return None if more >= 0.1 else "the teacher says no more than the student"
        teacher, student = (_score(row, row[who]) for who in ("teacher", "student"))
        if teacher < RIGHT:
            return "the teacher is wrong"
        return "the student is right as well" if student >= RIGHT else None

    return _filtered(rows, reason)


def coverage(text: str, reference: str) -> float:
    """Share of a reference's different words that a text has."""
    wanted = set(plain(reference).split())
    return len(wanted & set(plain(text).split())) / max(1, len(wanted))


def sampled(rows: Sequence[Row], count: int, seed: int) -> Kept:
    """So many of the rows, drawn by a seed; all of them where there are no more."""
    if len(rows) <= count:
        return Kept(tuple(rows), {})
    chosen = set(random.Random(f"sample/{seed}").sample(range(len(rows)), count))
    return Kept(
        tuple(row for n, row in enumerate(rows) if n in chosen),
        {row["id"]: "not drawn" for n, row in enumerate(rows) if n not in chosen},
    )


def without_repeats(rows: Sequence[Row], prints: Mapping[str, Sequence[str]]) -> Kept:
    """The first of each group of rows that ask the same of the same videos and pictures.

    The questions must be alike, and so must all that is said with them: options alone, which may be
    longer than the questions, make no repeat.

    Args:
        rows: Rows in the chat form.
        prints: id → names of what the row shows, by content: of videos by `fingerprints.py`.
    """
    asked: dict[tuple[str, ...], list[tuple[str, tuple[frozenset[str], ...]]]] = {}

    def reason(row: Row) -> str | None:
        shown, names = _media_words(row), tuple(prints[str(row["id"])])
        if shown and not names:  # nobody knows of what it asks
            return None
        text = user_text(row)
        mine = (shingles(stem(text)), shingles(text))
        seen = asked.setdefault(names, [])
        for other, theirs in seen:
            pairs = zip(mine, theirs, strict=True)
            if all(len(a & b) >= NEAR * len(a | b) for a, b in pairs):
                return f"asks what {other} asks{shown}"
        seen.append((str(row["id"]), mine))
        return None

    return _filtered(rows, reason)


def _media_words(row: Row) -> str:
    """What a row shows, in words; empty where it is text alone."""
    kinds = Counter(kind for kind, _ in media_of(row))
    words = [f"{kind}{'s' if count > 1 else ''}" for kind, count in kinds.items()]
    return f" of the same {' and '.join(words)}" if words else ""


def without_benchmarks(
    rows: Sequence[Row],
    prints: Mapping[str, Sequence[str]],
    benchmark_videos: Mapping[str, str],
    benchmark_questions: Mapping[str, str],
) -> Kept:
    """Rows that share neither a video nor a question with a benchmark.

    Args:
        rows: Rows in the chat form.
        prints: id → names of the row's videos.
        benchmark_videos: Such a name → which benchmark video shows the same.
        benchmark_questions: Name of a benchmark question → its text, with options or without.
    """
    held = _Questions(benchmark_questions)

    def reason(row: Row) -> str | None:
        for name in prints[str(row["id"])]:
            if name in benchmark_videos:
                return f"its video is {benchmark_videos[name]}"
        hit = held.repeated_by(user_text(row))
        return f"repeats the question {hit}" if hit else None

    return _filtered(rows, reason)


class _Texts:
    """Texts of at least `SHINGLE` words, found by the shingles that they share with another."""

    def __init__(self) -> None:
        self.index: dict[str, list[int]] = {}
        self.named: list[tuple[str, int]] = []
        """Name of each text, and how many shingles it has."""

    def add(self, name: str, text: str) -> None:
        """Take in a text, unless it is shorter."""
        if _is_long(text):
            parts = shingles(text)
            for part in parts:
                self.index.setdefault(part, []).append(len(self.named))
            self.named.append((name, len(parts)))

    def within(self, text: str) -> str | None:
        """The first one of which a text repeats enough."""
        return self._first(shingles(text), 0)

    def like(self, text: str) -> str | None:
        """The first one of which a text repeats enough, and says not much more."""
        parts = shingles(text)
        return self._first(parts, len(parts)) if _is_long(text) else None

    def _first(self, parts: frozenset[str], fewest: int) -> str | None:
        shared = Counter(place for part in parts for place in self.index.get(part, ()))
        found = [
            place for place, count in shared.items()
            if count >= LEAKED * max(fewest, self.named[place][1])
        ]  # fmt: skip
        return self.named[min(found)][0] if found else None


class _Questions:
    """Questions of benchmarks by what of a text gives a repetition away.

    A question of at least `SHINGLE` words is repeated where enough of its shingles are. A shorter
    one has none: it is repeated where a text has it as a sentence, a line, or all that is asked;
    within a longer sentence its few words are another question's.

    Where options are in a form that `stem` does not know, a question seems to be longer than it is,
    and nobody repeats enough of it. So what asks in it (`_asking`) is also compared alone, and then
    both must have enough in common: "What is the man doing?" is in many a longer question, which it
    is not. A sentence that is in several questions, such as an instruction, is none of them.
    """

    def __init__(self, questions: Mapping[str, str]) -> None:
        self.short: dict[str, str] = {}
        self.whole, self.asking = _Texts(), _Texts()
        found_in: dict[str, dict[str, str]] = {}
        for name, text in questions.items():
            asked = stem(text)
            if len(plain(asked).split()) < SHINGLE:
                self.short.setdefault(plain(asked), name)
            self.whole.add(name, asked)
            head, *parts = _asking(asked)
            self.asking.add(name, head)
            for part in map(plain, parts):
                found_in.setdefault(part, {})[plain(head or asked)] = name
        for part, names in found_in.items():
            if len(names) == 1 and part not in names:
                (name,) = names.values()
                self.asking.add(name, part)

    def repeated_by(self, text: str) -> str | None:
        """The name of a question that a text repeats."""
        asked = stem(text)
        pieces = [asked, *asked.splitlines(), *_SENTENCE_END.split(asked)]
        for piece in map(plain, pieces):
            if piece and piece in self.short:
                return self.short[piece]
        alike = (self.asking.like(part) for part in (asked, *_asking(asked)))
        return self.whole.within(text) or next(filter(None, alike), None)


def _is_long(text: str) -> bool:
    return len(plain(text).split()) >= SHINGLE


def _asking(asked: str) -> list[str]:
    """What of a text may be its question, in whatever form options follow.

    First all up to its last question mark, empty where it has none. Then each sentence that ends in
    one, for options and instructions may have their own; without any, the first of several lines.
    """
    if not (marks := list(re.finditer("[?\uff1f]", asked))):
        lines = [line for line in asked.splitlines() if line.strip()]
        return ["", *lines[:1]] if len(lines) > LISTED else [""]
    sentences, at = [], 0
    for end in _SENTENCE_END.finditer(asked):
        if end[0][0] in "?\uff1f":
            sentences.append(asked[at : end.start()])
        at = end.end()
    return [asked[: marks[-1].end()], *sentences]


def stem(text: str) -> str:
    """What is asked, without options and places of media; all where nothing is left."""
    return _without_options(_TAG.sub(" ", text)).strip() or text


def _without_options(text: str) -> str:
    """A text without options: by letters or numbers, below one another or in line, or as a list."""
    kept = _OPTION_LINE.sub("", _OPTIONS_LIST.sub("", text))
    kept = _OPTIONS_INLINE.sub("", kept)
    for labels in _LETTERS:
        kept = _without_runs(kept, labels, _AT_LINE)
        kept = _without_runs(kept, labels, _IN_LINE)
    if kept == text:  # numbers beside letters are what the letters choose from
        kept = _without_runs(kept, _NUMBERS, _AT_LINE)
    return kept if kept == text else _OPTIONS_HEAD.sub("", kept.rstrip())


def _without_runs(text: str, labels: Sequence[str], before: tuple[str, str]) -> str:
    """A text without what stands behind labels that follow one another, two at least."""
    for style in _STYLES:
        at = 0
        while found := _run(text, at, [style.format(label) for label in labels], before):
            start, at = found
            # Questions one below another are no options.
            if "?" not in text[start:at]:
                text, at = text[:start] + text[at:], start
    return text


def _run(
    text: str, at: int, labels: Sequence[str], before: tuple[str, str]
) -> tuple[int, int] | None:
    """From the first label to the end of the last one's line, at a place or behind it."""
    second = None
    for first in re.finditer(f"{before[0]}{labels[0]}(?!\\d)", text):
        if first.start() < at:
            continue
        following = re.compile(f"{before[1]}{labels[1]}(?!\\d)").search(text, first.end())
        if following is None or (second is not None and following.start() != second.start()):
            break
        start, second = first.start(), following
    if second is None:
        return None
    last = second
    for label in labels[2:]:
        following = re.compile(f"{before[1]}{label}(?!\\d)").search(text, last.end())
        if following is None:
            break
        last = following
    end = text.find("\n", last.end())
    return start, len(text) if end < 0 else end


def shingles(text: str) -> frozenset[str]:
    """Runs of `SHINGLE` words of a text; the whole text where it is shorter."""
    words = plain(text).split()
    count = max(1, len(words) - SHINGLE + 1)
    return frozenset(" ".join(words[n : n + SHINGLE]) for n in range(count))


def _filtered(rows: Sequence[Row], reason: Callable[[Row], str | None]) -> Kept:
    kept, dropped = [], {}
    for row in rows:
        try:
            why = reason(row)
        except ScoringError as error:
            why = f"cannot be scored: {error}"
        if why is None:
            kept.append(row)
        else:
            dropped[str(row["id"])] = why
    return Kept(tuple(kept), dropped)


def _scores(row: Row, fewest: int) -> list[float]:
    predictions: Sequence[str] = row.get("predictions", ())
    if len(predictions) < fewest or (fewest == 1 and len(predictions) != 1):
        raise DataError(
            f"row {row.get('id')} has {len(predictions)} predictions; "
            f"{'exactly one is' if fewest == 1 else f'at least {fewest} are'} needed"
        )
    return [_score(row, prediction) for prediction in predictions]


def _score(row: Row, prediction: Any) -> float:
    """By the careful reader's rule, as rewards are; an answer that the rule drops counts 0."""
    missing = [key for key in ("benchmark", "doc") if key not in row]
    if missing:
        raise DataError(
            f"row {row['id']} has no {' and no '.join(missing)} to be scored by; `data sample` "
            "writes them"
        )
    return score(row["benchmark"], row["doc"], str(prediction), rule="plain").value or 0.0
