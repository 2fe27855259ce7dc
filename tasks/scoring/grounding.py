"""Temporal grounding: TimeLens-Bench, and the classic Charades-STA and ActivityNet Captions.

One scorer for `timelens`, `charades_sta` and `activitynet_captions`; the official one is that of
TimeLens.

Document: the true span in seconds, as `span` ([[start, end]] or [start, end]), `timestamp`
([start, end]) or `timestamps` ([[start, end], …], the first counts).

Official reading: pairs of clock times, else "a - b", else "a to b", else the numbers in pairs; the
first pair counts. Official quirks, copied: both ends are rounded to whole seconds (halves to even)
before the overlap, so that short spans can become empty; the union is the hull of both spans; a
reversed span scores 0; a unit glued to a number hides the number. `extra` has mIoU and R1 without
the rounding. An empty prediction on an equal empty truth scores 0 (the official code divides by 0).

The plain rule does not round, and puts reversed spans in order.
"""

import ast
import math
import re
from collections.abc import Sequence
from typing import Any

from .averages import mean, summarise
from .numeric import iou, read_span
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

THRESHOLDS = (0.3, 0.5, 0.7)
Span = tuple[float, float]
_CLOCK = re.compile(r"\b(\d{1,2}:\d{2}:\d{2}(?:\.\d+)?|\d{1,2}:\d{2}(?:\.\d+)?)\b")
# A run of digits is entered at its start only: what matches is the same, in linear time.
_NUMBER = r"(?<!\d)(\d+(?:\.\d*)?)"
_RANGES = (
    re.compile(_NUMBER + r"\s*-\s*(\d+(?:\.\d*)?)"),
    re.compile(_NUMBER + r"\s+to\s+(\d+(?:\.\d*)?)"),
)
_LONE_NUMBER = re.compile(r"\b\d+(?:\.\d*)?\b")


def read_official(text: str) -> Span | None:
    """Return the first span in the text as TimeLens reads it, not yet rounded."""
    text = text.lower()
    times = [_seconds(clock) for clock in _CLOCK.findall(text)]
    if len(times) >= 2:
        return _finite(times[0], times[1])
    for pattern in _RANGES:
        match = pattern.search(text)
        if match:
            return _finite(float(match.group(1)), float(match.group(2)))
    numbers = _LONE_NUMBER.findall(text)
    return _finite(float(numbers[0]), float(numbers[1])) if len(numbers) >= 2 else None


def _seconds(clock: str) -> float:
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _finite(start_s: float, end_s: float) -> Span | None:
    return (start_s, end_s) if math.isfinite(start_s) and math.isfinite(end_s) else None


def true_span(doc: Doc) -> Span:
    """Return the document's span.

    Raises:
        ScoringError: No field with a span, or one that holds none.
    """
    for name in ("span", "timestamp", "timestamps"):
        value = doc.get(name)
        if value is not None:
            return _as_span(value, name)
    raise ScoringError(f"document has none of span, timestamp, timestamps; it has {sorted(doc)}")


def _as_span(value: Any, name: str) -> Span:
    try:
        pair = ast.literal_eval(value) if isinstance(value, str) else value
        if isinstance(pair[0], (list, tuple)):
            pair = pair[0]
        return float(pair[0]), float(pair[1])
    except (ValueError, SyntaxError, TypeError, IndexError) as error:
        raise ScoringError(f"{name} {value!r} is no span [start, end] in seconds") from error


def score(doc: Doc, text: str, rule: Rule) -> Score:
    """Score a reply by intersection over union, 0 to 1."""
    truth = true_span(doc)
    span = read_official(text) if rule == "official" else read_span(text)
    if span is None:
        return unreadable()
    if rule == "official":
        return answered(iou((round(span[0]), round(span[1])), truth), list(span))
    return answered(iou((min(span), max(span)), truth), [min(span), max(span)])


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average the overlaps: mIoU and R1 at three thresholds, officially also unrounded."""
    overlaps = {"": [score.value for _, score in rows]}
    if rule == "official":
        overlaps[" unrounded"] = [
            None if s.value is None else iou(s.parsed, true_span(doc)) if s.parsed else s.value
            for doc, s in rows
        ]
    extra: dict[str, float | None] = {}
    for name, values in overlaps.items():
        for threshold in THRESHOLDS:
            hits = [None if v is None else float(v >= threshold) for v in values]
            extra[f"R1@{threshold}{name}"] = mean(hits)
        if name:
            extra[f"mIoU{name}"] = mean(values)
    return summarise(
        benchmark,
        rows,
        rule,
        metric="mIoU",
        length_s=lambda doc: doc.get("duration"),
        extra=extra,
    )


SOURCES = (
    "TencentARC/TimeLens@5d90c06:evaluation/eval_dataloader.py",
    "TencentARC/TimeLens@5d90c06:evaluation/compute_metrics.py",
)
BENCHMARKS = tuple(
    Benchmark(name=name, score=score, aggregate=aggregate, sources=SOURCES)
    for name in ("timelens", "charades_sta", "activitynet_captions")
)
