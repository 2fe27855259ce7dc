"""How numbers and names are written, the same in the terminal, Markdown, CSV and page."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from internvideo3.reports.stats import Difference, Interval
from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS, SUBTITLED

if TYPE_CHECKING:
    from internvideo3.reports.summary import Cell

SUITE_TITLES = {
    "world_long": "Long video",
    "world_ego": "Egocentric",
    "world_short": "Short motion",
    "world_grounding": "Grounding",
    "world_spatial": "Spatial",
    "world_manyq": "Many questions",
}
MODEL_TITLES = {
    "scale:base": "GQA base",
    "scale:m2la": "M²LA",
    "scale:control": "GQA control",
}


COUNTS = ("incomplete groups",)
"""Further numbers of a benchmark that are no fractions."""
FAMILY_TITLES = {"attime": "at a time", "ground_flash": "flash", "ground_object": "object"}


def family(name: str) -> str:
    """Return a question family's name for readers."""
    return FAMILY_TITLES.get(name, name.replace("_", " "))


def suite_title(name: str) -> str:
    """Return a suite's name for readers."""
    benchmark = BENCHMARKS.get(name.removesuffix(SUBTITLED))
    if benchmark is None:
        return SUITE_TITLES.get(name, name)
    return benchmark.title + (" with subtitles" if name.endswith(SUBTITLED) else "")


_COMMANDS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return text without what commands a terminal or turns lines round, as U+FFFD each."""
    return _COMMANDS.sub("\ufffd", text)


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as percent without the sign, `–` for none."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def marked(cell: "Cell") -> str:
    """Return a score in percent, after `≈` where guessing reaches it, before `†` with a caveat."""
    floor = "≈" if cell.above_floor is False else ""
    return f"{floor}{percent(cell.value)}{'†' if cell.note else ''}"


def further(numbers: Mapping[str, float]) -> list[str]:
    """Return a benchmark's other numbers, `R1@0.5: 61.2`; those in `COUNTS` as they are."""
    return [
        f"{name}: {number:g}" if name in COUNTS else f"{name}: {percent(number)}"
        for name, number in numbers.items()
    ]


def points(value: float) -> str:
    """Return a signed difference in percentage points, with a true minus sign."""
    text = f"{100 * value:+.1f}"
    return text.replace("-", "−") if text not in ("+0.0", "-0.0") else "0.0"


def span(interval: Interval) -> str:
    """Return an interval as `58.9–63.6`."""
    return f"{percent(interval.low)}–{percent(interval.high)}"


def signed_span(interval: Interval) -> str:
    """Return an interval of a difference as `−2.1 … +0.4`."""
    return f"{points(interval.low)} … {points(interval.high)}"


def p_value(difference: Difference) -> str:
    """Return McNemar's p-value, `<0.001` at the small end."""
    p = difference.p_mcnemar
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def count(number: int | None) -> str:
    """Return a whole number with thin thousands separators."""
    return "–" if number is None else f"{number:,}".replace(",", "\u2009")


def quantity(number: float | None) -> str:
    """Return a large number with a unit prefix, `4.7 M`."""
    if number is None:
        return "–"
    for limit, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g} {prefix}"
    return f"{number:.3g}"


def length(band: str) -> str:
    """Return a length band as `8–16 s`, the outer ones as `≤ 8 s` and `> 128 s`."""
    if band.endswith("+"):
        return f"> {band[:-1]} s"
    low, high = band.split("-")
    return f"≤ {high} s" if low == "0" else f"{low}–{high} s"
