"""Numbers and time spans: reading them from text, and how near they are to the truth."""

import math
import re
from collections.abc import Sequence

from .text import final_answer

_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?", re.ASCII
)
_CARDINALS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty"),
)
_WORDS = {word: float(value) for value, word in enumerate(_CARDINALS)}
_WORDS |= {"none": 0.0, "no": 0.0, "once": 1.0, "twice": 2.0}
_WORD = re.compile(r"[a-z]+")

MRA_THRESHOLDS = (*(0.5 + i * ((0.95 - 0.5) / 9) for i in range(9)), 0.95)
"""Confidence thresholds .50, .55 … .95 of mean relative accuracy (VSI-Bench).

The same floating-point numbers as the official `numpy.linspace`: an error of exactly one tenth is
within the threshold of .90 there.
"""


def to_number(text: str) -> float | None:
    """Return the text as a finite number, or `None`."""
    try:
        value = float(text.strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_number(text: str) -> float | None:
    """Read the number that a reply states: the only one after "answer", or the only one.

    Digits with an optional sign, decimals, thousands separators and exponent, or a number word up
    to twenty. Units may follow.
    """
    text = final_answer(text)
    exact = to_number(text.rstrip("."))
    if exact is not None:
        return exact
    after_answer = re.split(r"\banswer\b(?:\s+is)?\s*:?", text, flags=re.IGNORECASE)[-1]
    for part in (after_answer, text):
        values = {v for v in map(_value, _NUMBER.findall(part)) if v is not None}
        values = values or {_WORDS[w] for w in _WORD.findall(part.casefold()) if w in _WORDS}
        if len(values) == 1:
            return values.pop()
    return None


def _value(digits: str) -> float | None:
    return to_number(digits.replace(",", ""))


def mean_relative_accuracy(predicted: float, truth: float) -> float:
    """Return the share of thresholds t with `|predicted - truth| / truth <= 1 - t`, 0 to 1.

    Source: VSI-Bench (vision-x-nyu/thinking-in-space@51e089c:lmms_eval/tasks/vsibench/utils.py).
    A truth of 0 has no relative error: 1 if the prediction is 0 as well, else 0.
    """
    if truth == 0:
        return float(predicted == 0)
    error = abs(predicted - truth) / abs(truth)
    return sum(error <= 1 - t for t in MRA_THRESHOLDS) / len(MRA_THRESHOLDS)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return intersection over union of two spans `[start_s, end_s]`; 0 for a reversed span."""
    intersection = min(a[1], b[1]) - max(a[0], b[0])
    if a[1] < a[0] or b[1] < b[0] or intersection <= 0:
        return 0.0
    union = max(a[1], b[1]) - min(a[0], b[0])
    return intersection / union


_CLOCK = re.compile(r"(?<![\w:.])(?:([0-9]{1,2}):)?([0-9]{1,2}):([0-9]{2}(?:\.[0-9]+)?)(?![\w:])")
_SECONDS = re.compile(r"(?<![\w.:-])([0-9]+(?:\.[0-9]+)?)\s*(?:s|sec|secs|seconds?)?(?![\w:])",
                      re.ASCII | re.IGNORECASE)  # fmt: skip
_PAIR = re.compile(
    r"(?<![\w.:])([0-9]+(?:\.[0-9]+)?)\s*(?:s|sec|seconds?)?\s*"
    r"(?:-|–|—|~|to|until|till|and|,)\s*([0-9]+(?:\.[0-9]+)?)",
    re.ASCII | re.IGNORECASE,
)


def read_span(text: str) -> tuple[float, float] | None:
    """Read one span of time in seconds: clock times, then "a - b", then the only two numbers."""
    text = final_answer(text)
    clocks = [_clock_seconds(m) for m in _CLOCK.finditer(text)]
    if len(clocks) >= 2:
        return clocks[0], clocks[1]
    pair = _PAIR.search(text)
    if pair:
        return _finite_pair(float(pair.group(1)), float(pair.group(2)))
    numbers = [float(m.group(1)) for m in _SECONDS.finditer(text)]
    return _finite_pair(numbers[0], numbers[1]) if len(numbers) == 2 else None


def _clock_seconds(match: re.Match[str]) -> float:
    hours, minutes, seconds = match.groups()
    return 3600.0 * float(hours or 0) + 60.0 * float(minutes) + float(seconds)


def _finite_pair(start_s: float, end_s: float) -> tuple[float, float] | None:
    return (start_s, end_s) if math.isfinite(start_s) and math.isfinite(end_s) else None
