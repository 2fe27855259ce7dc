"""Averages that benchmarks share: the mean of all rows, and the mean of each group of rows."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from .result import Doc, Group, Outcome, Row, Rule, Score, TaskResult, Unit

LENGTH_BANDS_S = (8.0, 16.0, 32.0, 64.0, 128.0)
"""Upper ends of the bands of video length, in seconds."""


def seconds_of(value: object) -> float | None:
    """Return a document's length as a number; `None` where it tells none (empty, a word)."""
    try:
        seconds = float(str(value))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


def length_band(length_s: float) -> str:
    """Return the band of a video length, `8-16` for 12 s; the upper end belongs to the band."""
    low = 0.0
    for high in LENGTH_BANDS_S:
        if length_s <= high:
            return f"{low:g}-{high:g}"
        low = high
    return f"{low:g}+"


def band_order(band: str) -> float:
    """Return a sort key that puts bands in order of length."""
    return float(band.rstrip("+").split("-")[0])


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not `None`, or `None` if there is none."""
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def group_means(rows: Sequence[Row], keys: Callable[[Doc], Iterable[str]]) -> dict[str, Group]:
    """Return the mean and size of every group; a row may belong to several groups or to none."""
    values: dict[str, list[float | None]] = {}
    for doc, score in rows:
        for name in keys(doc):
            values.setdefault(name, []).append(score.value)
    return {name: Group(mean(v), len(v)) for name, v in sorted(values.items())}


def group_units(rows: Sequence[Row], keys: Callable[[Doc], Iterable[str]]) -> list[Unit]:
    """Return every row that has a value as a unit of each of its groups."""
    return [
        Unit(index, name, score.value)
        for index, (doc, score) in enumerate(rows)
        if score.value is not None
        for name in keys(doc)
    ]


def field(*names: str) -> Callable[[Doc], tuple[str, ...]]:
    """Return a function from a document to its groups: the first of the fields that is there.

    A list gives several groups.
    """

    def groups(doc: Doc) -> tuple[str, ...]:
        for name in names:
            value = doc.get(name)
            if value is not None:
                return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)
        return ()

    return groups


def _unread(score: Score) -> bool:
    """Whether nothing could be read, also where the truth is hidden; a dropped row is another."""
    hidden = score.outcome is Outcome.NO_TRUTH and score.parsed is None
    return hidden or score.outcome is Outcome.UNREADABLE


def summarise(
    benchmark: str,
    rows: Sequence[Row],
    rule: Rule,
    *,
    metric: str = "accuracy",
    value: float | None | Literal["mean"] = "mean",
    families: Callable[[Doc], Iterable[str]] = lambda doc: (),
    length_s: Callable[[Doc], object] = lambda doc: None,
    extra: dict[str, float | None] | None = None,
) -> TaskResult:
    """Build a `TaskResult`: outcome counts, group means, and the mean unless a value is given.

    A value of `None` is one: a benchmark's own average that these rows do not determine.
    """
    outcomes = Counter(score.outcome for _, score in rows)

    def band(doc: Doc) -> tuple[str, ...]:
        seconds = seconds_of(length_s(doc))
        return () if seconds is None else (length_band(seconds),)

    by_length = group_means(rows, band)
    extra = dict(extra or {})
    if outcomes[Outcome.DROPPED]:
        # Where a rule drops rows, both denominators are shown.
        extra["mean with dropped rows as 0"] = mean(
            0.0 if s.outcome is Outcome.DROPPED else s.value for _, s in rows
        )
    return TaskResult(
        benchmark=benchmark,
        rule=rule,
        metric=metric,
        value=mean(score.value for _, score in rows) if value == "mean" else value,
        n=len(rows),
        n_scored=sum(score.value is not None for _, score in rows),
        unreadable=sum(_unread(score) for _, score in rows),
        errors=outcomes[Outcome.ERROR],
        dropped=outcomes[Outcome.DROPPED],
        judge_needed=outcomes[Outcome.JUDGE_NEEDED],
        no_truth=outcomes[Outcome.NO_TRUTH],
        by_family=group_means(rows, families),
        by_length={k: by_length[k] for k in sorted(by_length, key=band_order)},
        extra=extra,
    )
