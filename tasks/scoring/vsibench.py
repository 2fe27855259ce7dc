"""VSI-Bench: choices by the first word, numbers by mean relative accuracy, mean of eight tasks.

Document: `question_type`, `ground_truth` (letter or number), `options` ("A. text").

Official reading: the text up to the first blank, without trailing dots; a choice must equal the
letter (case ignored), a number must be one for `float()`. Unreadable is 0. Overall is the mean of
eight tasks, where relative direction is the mean of its three levels.

Official quirk, copied: a level of relative direction that is absent (a limited run) counts as 0,
and relative direction as a task even if all are absent. The plain rule averages what is there.
"""

from collections.abc import Mapping, Sequence

from .averages import field, group_units, mean, summarise
from .choice import read_plain
from .letters import letter, option_text, public_letter
from .numeric import mean_relative_accuracy, read_number
from .result import (
    Benchmark,
    Doc,
    Headline,
    Row,
    Rule,
    Score,
    ScoringError,
    TaskResult,
    answered,
    unreadable,
)

DIRECTION = "object_rel_direction"
DIRECTIONS = tuple(f"{DIRECTION}_{level}" for level in ("easy", "medium", "hard"))
CHOICES = (*DIRECTIONS, "object_rel_distance", "route_planning", "obj_appearance_order")
NUMBERS = (
    "object_abs_distance",
    "object_counting",
    "object_size_estimation",
    "room_size_estimation",
)


def score(doc: Doc, text: str, rule: Rule) -> Score:
    """Score a reply by its kind of question.

    Raises:
        ScoringError: An unknown `question_type`, or a true value that is no number.
    """
    kind = doc["question_type"]
    if kind in CHOICES:
        return _choice(doc, text, rule)
    if kind in NUMBERS:
        return _number(doc, text, rule)
    raise ScoringError(f"unknown question_type {kind!r}; known: {', '.join((*CHOICES, *NUMBERS))}")


def _first_word(text: str) -> str:
    return text.split(" ")[0].rstrip(".").strip()


def _choice(doc: Doc, text: str, rule: Rule) -> Score:
    options = [option_text(str(option)) for option in doc.get("options") or ()]
    if rule == "official":
        word = _first_word(text).upper()
        known = len(word) == 1 and word in {letter(i) for i in range(len(options) or 4)}
        found = word if known else None
    else:
        index = read_plain(text, len(options) or 4, options)
        found = None if index is None else letter(index)
    if found is None:
        return unreadable()
    return answered(found == str(doc["ground_truth"]).upper(), found)


def _number(doc: Doc, text: str, rule: Rule) -> Score:
    try:
        truth = float(doc["ground_truth"])
    except (TypeError, ValueError) as error:
        raise ScoringError(f"ground_truth {doc['ground_truth']!r} is no number") from error
    value = _as_float(_first_word(text)) if rule == "official" else read_number(text)
    if value is None:
        return unreadable()
    return answered(mean_relative_accuracy(value, truth), value)


def _as_float(word: str) -> float | None:
    """Return what `float()` makes of a word; infinite and undefined values are unreadable."""
    try:
        value = float(word)
    except ValueError:
        return None
    return value if value - value == 0 else None


def _mean_of_tasks(means: Mapping[str, float | None], rule: Rule) -> float | None:
    tasks = [means[name] for name in sorted(means) if name not in DIRECTIONS]
    return mean((*tasks, _direction(means, rule))) if means else None


HEADLINE = Headline(lambda rows, rule: group_units(rows, field("question_type")), _mean_of_tasks)


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average the tasks, each with the same weight."""
    levels = {
        name: mean(score.value for doc, score in rows if doc["question_type"] == name)
        for name in DIRECTIONS
    }
    return summarise(
        benchmark,
        rows,
        rule,
        metric="mean of tasks",
        value=HEADLINE.value(rows, rule),
        families=field("question_type"),
        extra={
            DIRECTION: _direction(levels, rule) if rows else None,
            "mean over questions": mean(s.value for _, s in rows),
        },
    )


def _direction(means: Mapping[str, float | None], rule: Rule) -> float | None:
    values = [means.get(name) for name in DIRECTIONS]
    if rule == "official":
        return sum(value or 0.0 for value in values) / len(values)
    return mean(values)


BENCHMARK = Benchmark(
    name="vsibench",
    score=score,
    aggregate=aggregate,
    headline=HEADLINE,
    sources=("vision-x-nyu/thinking-in-space@51e089c:lmms_eval/tasks/vsibench/utils.py",),
    options=lambda doc: [option_text(str(option)) for option in doc.get("options") or ()],
    truth=lambda doc: public_letter(doc["ground_truth"]) if doc.get("options") else None,
)
