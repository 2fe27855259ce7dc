"""QVHighlights moment retrieval: R1 of the first window and mAP of the ranked windows.

Document: `relevant_windows` ([[start_s, end_s], …]). Prediction: ranked windows
[[start_s, end_s, confidence], …]; or text that holds such a list as JSON, windows in brackets, or
else clock times or spans "a - b" in seconds, the best first.

Official rule: R1 takes the first *listed* window against the true window that overlaps it most (the
union is the hull of both); mAP takes the first ten listed windows, sorts them by confidence, and
averages interpolated precision over ten overlap thresholds .50 … .95. Short, middle and long keep
the true windows of 0-10, 10-30 and 30-150 s. The plain rule sorts by confidence for R1 too, keeps
all windows, and puts reversed ones in order. The official code prints percent with two decimals;
values here are not rounded.

`Score.value` is the overlap of the R1 window; a prediction without a valid window is unreadable.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

from .averages import mean, summarise
from .numeric import iou, read_spans
from .result import (
    Benchmark,
    Doc,
    Headline,
    Row,
    Rule,
    Score,
    TaskResult,
    Unit,
    answered,
    unreadable,
)

THRESHOLDS = tuple(step / 100 for step in range(50, 100, 5))
LENGTHS_S = {"short": (0, 10), "middle": (10, 30), "long": (30, 150)}
LISTED = 10
_DECIMAL = r"([0-9]+(?:\.[0-9]+)?)"
_BRACKETED = re.compile(
    rf"[\[(]\s*{_DECIMAL}\s*,\s*{_DECIMAL}\s*(?:,\s*{_DECIMAL}\s*)?[\])]", re.ASCII
)
Window = list[float]


def read_windows(prediction: Any) -> list[Window]:
    """Return the valid windows `[start_s, end_s, confidence]` in the order listed.

    A missing confidence is 0. The official code starts from windows; the reading of text is ours:
    a JSON list of windows, else windows in brackets of their own, else clock times or spans
    "a - b". Anything else than finite numbers is left out.
    """
    if isinstance(prediction, str):
        prediction = _from_text(prediction)
    if hasattr(prediction, "tolist"):
        prediction = prediction.tolist()
    if not isinstance(prediction, (list, tuple)):
        return []
    if _numbers(prediction):
        prediction = [prediction]
    windows = []
    for item in prediction:
        numbers = _numbers(item)
        if len(numbers) >= 2:
            windows.append([*numbers[:2], numbers[2] if len(numbers) > 2 else 0.0])
    return windows


def _from_text(text: str) -> Any:
    windows = re.search(r"\[\s*\[", text)
    if windows:
        with contextlib.suppress(ValueError, RecursionError):
            return json.JSONDecoder().raw_decode(text, windows.start())[0]
    if text.rfind("[") > text.rfind("]"):
        text = text[: text.rfind("[")]  # cut off in the middle of a window
    bracketed = [[float(x) for x in window if x] for window in _BRACKETED.findall(text)]
    return bracketed or [list(span) for span in read_spans(text)]


def _numbers(item: Any) -> list[float]:
    if not isinstance(item, (list, tuple)):
        return []
    if any(isinstance(x, bool) or not isinstance(x, Real) for x in item):
        return []
    try:
        numbers = [float(x) for x in item]
    except OverflowError:
        return []
    return numbers if all(map(math.isfinite, numbers)) else []


def score(doc: Doc, prediction: Any, rule: Rule) -> Score:
    """Score ranked windows by the overlap of the one that R1 looks at."""
    windows = read_windows(prediction)
    if not windows:
        return unreadable()
    if rule == "plain":
        ordered = [[min(w[:2]), max(w[:2]), w[2]] for w in windows]
        windows = sorted(ordered, key=lambda w: -w[2])
    return answered(_best(windows[0], doc["relevant_windows"]), windows)


def _best(window: Sequence[float], truths: Sequence[Sequence[float]]) -> float:
    """Return the overlap with the true window that overlaps most, by the exact union."""
    nearest = max(truths, key=lambda truth: _exact_iou(window, truth), default=None)
    return 0.0 if nearest is None else iou(window, nearest)


def _exact_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return intersection over the sum of lengths minus intersection; 0 for two empty spans."""
    intersection = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    union = (a[1] - a[0]) + (b[1] - b[0]) - intersection
    return intersection / union if union else 0.0


def average_precisions(
    windows: Sequence[Sequence[float]], truths: Sequence[Sequence[float]]
) -> tuple[float, ...]:
    """Return interpolated average precision (VOC style) of ranked windows at each threshold."""
    ranked = sorted(windows, key=lambda w: -w[2])
    overlaps_MK = [[_exact_iou(window, truth) for truth in truths] for window in ranked]
    return tuple(_area(_hits(overlaps_MK, at), len(truths)) for at in THRESHOLDS)


def _hits(overlaps_MK: Sequence[Sequence[float]], threshold: float) -> list[bool]:
    """Return which windows, the best first, are true positives.

    A window is one for the free true window that it overlaps most, if it reaches the threshold;
    each true window is matched once.
    """
    free = set(range(len(overlaps_MK[0]) if overlaps_MK else 0))
    hits = []
    for overlaps_K in overlaps_MK:
        # Of two that it overlaps alike the later one, as the official order has it.
        best = max(free, key=lambda k: (overlaps_K[k], k), default=None)
        hit = best is not None and overlaps_K[best] >= threshold
        if hit and best is not None:
            free.discard(best)
        hits.append(hit)
    return hits


def _area(hits: Sequence[bool], n_truths: int) -> float:
    """Return the area under precision, made non-increasing, over recall."""
    found = 0
    precisions = []
    for rank, hit in enumerate(hits, start=1):
        found += hit
        precisions.append((hit, found / rank))
    area, ceiling = 0.0, 0.0
    for hit, precision in reversed(precisions):
        ceiling = max(ceiling, precision)
        area += ceiling / n_truths if hit else 0.0
    return area


def _precisions(
    rows: Sequence[Row], rule: Rule, span: tuple[int, int] | None = None
) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield the average precisions of rows that have true windows of the given lengths."""
    for index, (doc, row_score) in enumerate(rows):
        truths = doc["relevant_windows"]
        if span is not None:
            truths = [w for w in truths if span[0] < w[1] - w[0] <= span[1]]
        windows = row_score.parsed or []
        windows = windows[:LISTED] if rule == "official" else windows
        if truths:
            yield index, average_precisions(windows, truths)


def _units(rows: Sequence[Row], rule: Rule) -> list[Unit]:
    return [Unit(i, "", sum(at) / len(at)) for i, at in _precisions(rows, rule)]


HEADLINE = Headline(_units, lambda means, rule: means.get(""))


def _mean_ap(rows: Sequence[Row], rule: Rule, span: tuple[int, int]) -> float | None:
    """Return mAP over the rows that have true windows of the given lengths."""
    return mean(sum(at) / len(at) for _, at in _precisions(rows, rule, span))


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average: mAP over thresholds (the headline), mAP and R1 at some of them, mAP by length."""
    full = [at for _, at in _precisions(rows, rule)]
    extra: dict[str, float | None] = {
        "mAP@0.5": mean(at[THRESHOLDS.index(0.5)] for at in full),
        "mAP@0.75": mean(at[THRESHOLDS.index(0.75)] for at in full),
        "mIoU": mean(score.value for _, score in rows),
    }
    for threshold in (0.3, 0.5, 0.7):
        extra[f"R1@{threshold}"] = mean(float((s.value or 0.0) >= threshold) for _, s in rows)
    for name, span in LENGTHS_S.items():
        extra[f"mAP {name}"] = _mean_ap(rows, rule, span)
    return summarise(
        benchmark,
        rows,
        rule,
        metric="mAP",
        value=mean(sum(at) / len(at) for at in full),
        length_s=lambda doc: doc.get("duration"),
        extra=extra,
    )


BENCHMARK = Benchmark(
    name="qvhighlights",
    score=score,
    aggregate=aggregate,
    headline=HEADLINE,
    sources=("jayleicn/moment_detr@b7e553a:standalone_eval/eval.py",),
    ranked_windows=True,
)
