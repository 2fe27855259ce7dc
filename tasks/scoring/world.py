"""The scale world's suites: choices by letter or option text, numbers, spans of time.

There is no outside authority here, so `official` is the strict reading that the world's prompts
ask for (only the answer, nothing else) and `plain` is what a careful reader would take from any
wording.

- choice: the letter or the option's text; 1 or 0.
- number: the first word of the reply must be the number, as in VSI-Bench
  (vision-x-nyu/thinking-in-space@51e089c:lmms_eval/tasks/vsibench/utils.py); counts are exact,
  families in `RELATIVE_FAMILIES` earn mean relative accuracy.
- span: `4 - 9` in seconds; intersection over union. A reversed span earns 0 officially, and is put
  in order by the plain reader.
"""

from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from .averages import field, mean, summarise
from .choice import read_plain, read_strict
from .numeric import iou, mean_relative_accuracy, read_number, read_span, to_number
from .result import (
    Benchmark,
    Doc,
    Row,
    Rule,
    Score,
    ScoringError,
    TaskResult,
    answered,
    unreadable,
)
from .text import unmark

SUITES = (
    "world_long",
    "world_ego",
    "world_short",
    "world_grounding",
    "world_spatial",
    "world_manyq",
)
RELATIVE_FAMILIES = frozenset({"distance"})
"""Families of numbers that are measured, not counted."""
RECALL_THRESHOLDS = (0.3, 0.5, 0.7)


def score(doc: Doc, text: str, rule: Rule) -> Score:
    """Score one reply against a world document.

    Raises:
        ScoringError: The document has no known `answer_type` or lacks what that type needs.
    """
    readers = {"choice": _choice, "number": _number, "span": _span}
    kind = doc.get("answer_type")
    if kind not in readers:
        raise ScoringError(
            f"document {doc.get('id')!r} has answer_type {kind!r}; expected {', '.join(readers)}"
        )
    return readers[kind](doc, text, rule)


def _choice(doc: Doc, text: str, rule: Rule) -> Score:
    options: list[str] | None = doc["options"]
    if not options:
        raise ScoringError(f"document {doc.get('id')!r} is a choice without options")
    if rule == "official":
        index = read_strict(text, options)
    else:
        index = read_plain(text, len(options), options)
    if index is None:
        return unreadable()
    return answered(options[index] == doc["answer"], ascii_uppercase[index])


def _number(doc: Doc, text: str, rule: Rule) -> Score:
    truth = float(doc["answer"])
    words = text.split()
    if rule == "plain":
        value = read_number(text)
    else:
        value = to_number(words[0].rstrip(".")) if words else None
    if value is None:
        return unreadable()
    if doc["family"] in RELATIVE_FAMILIES:
        return answered(mean_relative_accuracy(value, truth), value)
    return answered(value == truth, value)


def _span(doc: Doc, text: str, rule: Rule) -> Score:
    truth = read_span(str(doc["answer"]))
    if truth is None:
        raise ScoringError(f"document {doc.get('id')!r}: answer {doc['answer']!r} is no span")
    span = read_span(text)
    if span is None:
        return unreadable()
    if rule == "plain":
        span = (min(span), max(span))
    return answered(iou(span, truth), list(span))


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average over all questions, with means by family and by video length."""
    kinds = {doc.get("answer_type") for doc, _ in rows}
    extra: dict[str, float | None] = {}
    if kinds == {"span"}:
        for threshold in RECALL_THRESHOLDS:
            hits = [float((score.value or 0.0) >= threshold) for _, score in rows]
            extra[f"R1@{threshold}"] = mean(hits)
    names = {"span": "mIoU", "choice": "accuracy"}
    metric = names.get(str(kinds.pop()), "score") if len(kinds) == 1 else "score"
    return summarise(
        benchmark,
        rows,
        rule,
        metric=metric,
        families=field("family"),
        length_s=lambda doc: doc.get("length_s"),
        extra=extra,
    )


def _benchmark(name: str) -> Benchmark:
    def score_text(doc: Doc, prediction: Any, rule: Rule) -> Score:
        return score(doc, unmark(prediction) if rule == "official" else prediction, rule)

    return Benchmark(name=name, score=score_text, aggregate=aggregate, sources=(__name__,))


BRIEF = "world_brief"
"""Long videos with short events (tasks/brief.py), scored by the same rules."""

BENCHMARKS = tuple(_benchmark(name) for name in (*SUITES, BRIEF))
