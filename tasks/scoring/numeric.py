"""Numbers and time spans: reading them from text, and how near they are to the truth."""

import math
import re
from collections.abc import Sequence

from .text import final_answer

_NUMBER = re.compile(r"(?<![\w.,])[-+]?[0-9.,]*[0-9](?:[eE][-+]?[0-9]{1,3})?", re.ASCII)
_PLAIN_NUMBER = re.compile(
    r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", re.ASCII
)
"""A number as English writes it: a comma stands before three digits, else it is none of a number
("4,5" may be four and a half, or two numbers)."""
_CARDINALS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: value for value, word in enumerate(_CARDINALS)}
_WORDS |= {word: 20 + 10 * step for step, word in enumerate(_TENS)}
_WORDS |= {"hundred": 100, "thousand": 1000}
_ANY_WORD = "|".join(sorted(_WORDS, key=len, reverse=True))
_WORDED = re.compile(rf"\b(?:{_ANY_WORD})(?:(?:-|\s(?:and\s)?)(?:{_ANY_WORD}))*\b")
# "Which one", "one of them": no number.
_PRONOUN = re.compile(
    r"\b(?:any|another|correct|each|every|first|last|next|other|right|same|that|the|this|which)"
    r"\sone\b|\bone\s(?:of|can|could|cannot)\b|\bno\sone\b"
)
_FRACTION = re.compile(r"\b(?:half|quarters?|thirds?|dozens?|millions?)\b")
_NONE = re.compile(r"(?:there\s(?:is|are)\s)?(?:none|no|no\s(?:[a-z]+\s){0,2}[a-z]+s)[.!]?")

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

    Digits with an optional sign, decimals, thousands separators and exponent, or a number in words
    below a million. Units may follow. "4,5", "4-5" and "four and a half" are not read.
    """
    text = final_answer(text)
    exact = to_number(text.rstrip("."))
    if exact is not None:
        return exact
    after_answer = re.split(r"\banswer\b(?:\s+is)?\s*:?", text, flags=re.IGNORECASE)[-1]
    for part in (after_answer, text):
        digits = [_value(found) for found in _NUMBER.findall(part)]
        values = set(digits or _worded(part.casefold()))
        if len(values) == 1:
            return values.pop()
    return None


def _value(digits: str) -> float | None:
    return to_number(digits.replace(",", "")) if _PLAIN_NUMBER.fullmatch(digits) else None


def _worded(text: str) -> list[float | None]:
    """Return the numbers that stand in words, `None` for words that make none together."""
    if _NONE.fullmatch(text.strip()):
        return [0.0]
    if _FRACTION.search(text):
        return []
    once = [float(count) for count, word in ((1, "once"), (2, "twice")) if word in text.split()]
    return [*once, *(_word_value(run) for run in _WORDED.findall(_PRONOUN.sub(" ", text)))]


def _word_value(run: str) -> float | None:
    """Return the number that words make in order: twenty one, two hundred and three."""
    total = current = 0
    for word in re.findall(_ANY_WORD, run):
        value = _WORDS[word]
        if value == 1000:
            total, current = total + max(current, 1) * 1000, 0
        elif value == 100:
            current = max(current, 1) * 100
        else:
            room = 100 if value >= 10 else 10
            if current % room or 0 < current % 100 < 20:
                return None
            current += value
    return float(total + current)


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
    r"(?:-|–|—|~|to|until|till|and|,\s)\s*([0-9]+(?:\.[0-9]+)?)(?![.,:]?[0-9])",
    re.ASCII | re.IGNORECASE,
)


_DURATION = re.compile(
    r"(?<![\w.:])(?:([0-9]{1,2})\s*h(?:ours?|rs?)?\s*)?([0-9]{1,3}(?:\.[0-9]+)?)\s*m(?:in(?:ute)?s?)?\b"
    r"(?:\s*(?:and\s+)?([0-9]{1,2}(?:\.[0-9]+)?)\s*s(?:ec(?:ond)?s?)?\b)?"
    r"|(?<![\w.:])([0-9]{1,3})m([0-9]{1,2}(?:\.[0-9]+)?)s\b",
    re.ASCII | re.IGNORECASE,
)
"""Minutes, with hours before them and seconds behind, as `1 minute 5 seconds` or `1m5s`."""
_THOUSANDS = re.compile(
    r"(?<![\w.,:])([1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?\s*(?:s|sec|seconds?)?"
    r"\s*(?:-|–|—|~|to|bis)\s*[1-9][0-9]{0,2}(?:,[0-9]{3})+)(?![0-9:]|,[0-9])",
    re.ASCII | re.IGNORECASE,
)
"""`1,000 - 1,010`: three digits behind all commas of a range, and no leading 0, are thousands."""
_DECIMAL_COMMAS = re.compile(
    r"(?<![\w.,:])([0-9]+),([0-9]+)(\s*(?:s|sec|seconds?)?\s*(?:-|–|—|~|to|bis)\s*)"
    r"([0-9]+),([0-9]+)(?![\w,:])",
    re.ASCII | re.IGNORECASE,
)
"""`12,5 - 20,5`: other commas on both sides of a range can only be decimal ones."""


def _duration(match: re.Match[str]) -> str:
    hours, minutes, seconds, bare_minutes, bare_seconds = match.groups()
    total = 3600 * float(hours or 0) + 60 * float(minutes or bare_minutes)
    return repr(total + float(seconds or bare_seconds or 0))


def read_span(text: str) -> tuple[float, float] | None:
    """Read one span of time in seconds: clock times, then "a - b", then the only two numbers.

    Minutes in words are minutes; a comma between digits is a decimal one only in `12,5 - 20,5`, and
    one of thousands only in `1,000 - 1,010`.
    """
    spans = read_spans(text)
    return spans[0] if spans else None


def read_spans(text: str) -> list[tuple[float, float]]:
    """Read all spans of time in seconds, in the order and by the forms of `read_span`."""
    text = _DURATION.sub(_duration, final_answer(text))
    text = _THOUSANDS.sub(lambda found: found.group().replace(",", ""), text)
    text = _DECIMAL_COMMAS.sub(r"\1.\2\3\4.\5", text)
    clocks = [_clock_seconds(m) for m in _CLOCK.finditer(text)]
    if len(clocks) >= 2:
        return list(zip(clocks[::2], clocks[1::2], strict=False))
    pairs = [(float(a), float(b)) for a, b in _PAIR.findall(text)]
    if not pairs:
        numbers = [float(m.group(1)) for m in _SECONDS.finditer(text)]
        pairs = [(numbers[0], numbers[1])] if len(numbers) == 2 else []
    return [pair for pair in pairs if all(map(math.isfinite, pair))]


def _clock_seconds(match: re.Match[str]) -> float:
    hours, minutes, seconds = match.groups()
    return 3600.0 * float(hours or 0) + 60.0 * float(minutes) + float(seconds)
