"""What scoring hands over: `Score` for one answer, `TaskResult` for one benchmark.

Values are fractions between 0 and 1 everywhere (accuracy, IoU, relative accuracy); reports multiply
by 100. A `Score.value` of `None` means that the rule takes the row out of the average, and the
outcome says why.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeAlias

Rule: TypeAlias = Literal["official", "plain"]
Doc: TypeAlias = Mapping[str, Any]
RULES: tuple[Rule, ...] = ("official", "plain")


class ScoringError(ValueError):
    """A document, benchmark name or rule that cannot be scored; never raised for a model's text."""


class Outcome(StrEnum):
    """What happened to one answer. Every row has exactly one; nothing is dropped in silence."""

    ANSWERED = "answered"
    """An answer was read; it may be right or wrong."""
    UNREADABLE = "unreadable"
    """Text came back but no answer could be read from it. Counts as 0."""
    DROPPED = "dropped"
    """Unreadable, and the official rule leaves such a row out of the denominator."""
    JUDGE_NEEDED = "judge_needed"
    """Only a language-model judge could tell; no value."""
    NO_TRUTH = "no_truth"
    """The answer is not public (a server scores it); no value."""
    ERROR = "error"
    """The sample failed before it was answered (video, memory, time). Counts as 0."""


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one answer under one rule."""

    value: float | None
    """0 to 1, or `None` when the row has no place in the average."""
    parsed: Any
    """What was read from the text (letter, number, `[start_s, end_s]`), as plain JSON data."""
    outcome: Outcome

    def as_dict(self) -> dict[str, Any]:
        """Return the three fields as JSON data, the form that is stored per sample."""
        return {"value": self.value, "parsed": self.parsed, "outcome": str(self.outcome)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Score":
        """Read back what `as_dict` wrote."""
        return cls(data["value"], data["parsed"], Outcome(data["outcome"]))


Row: TypeAlias = tuple[Doc, Score]


@dataclass(frozen=True, slots=True)
class Group:
    """The mean score of one part of a benchmark (a question family, a length band)."""

    value: float | None
    """Mean over the rows that have a value; `None` if there is none."""
    n: int
    """Rows in the group, with or without a value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The result of one benchmark under one rule."""

    benchmark: str
    rule: Rule
    metric: str
    """Name of the headline number, for example `accuracy` or `mIoU`."""
    value: float | None
    """The headline number, 0 to 1; `None` when no row has a value."""
    n: int
    """Rows given."""
    n_scored: int
    """Rows with a value: the denominator of a plain mean."""
    unreadable: int
    """Replies that nothing could be read from; those of `dropped` are not among them, those of
    `no_truth` are."""
    errors: int
    dropped: int = 0
    judge_needed: int = 0
    no_truth: int = 0
    by_family: dict[str, Group] = field(default_factory=dict)
    by_length: dict[str, Group] = field(default_factory=dict)
    """Keys are bands of seconds as `length_band` writes them, shortest first."""
    extra: dict[str, float | None] = field(default_factory=dict)
    """Further numbers of the benchmark, for example `R1@0.5`."""

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON data."""
        return asdict(self)


class Unit(NamedTuple):
    """What a headline number averages: a question, or a group of questions."""

    row: int
    """Index of the unit's row; of its last one where it is a group."""
    part: str
    """The mean that it enters."""
    value: float


@dataclass(frozen=True, slots=True)
class Headline:
    """A benchmark's headline number: means of parts, and what the benchmark makes of them.

    In this form `aggregate` computes it once and reports resample it without scoring again.
    """

    units: Callable[[Sequence[Row], Rule], Sequence[Unit]]
    combine: Callable[[Mapping[str, float | None], Rule], float | None]
    """Means by part to the number. A part may be absent or `None`: none of its units was drawn."""

    def value(self, rows: Sequence[Row], rule: Rule) -> float | None:
        """Return the number of some rows; `None` where they do not determine it."""
        parts: dict[str, list[float]] = {}
        for unit in self.units(rows, rule):
            parts.setdefault(unit.part, []).append(unit.value)
        return self.combine({part: sum(v) / len(v) for part, v in parts.items()}, rule)


def _questions(rows: Sequence[Row], rule: Rule) -> list[Unit]:
    return [Unit(i, "", s.value) for i, (_, s) in enumerate(rows) if s.value is not None]


MEAN = Headline(_questions, lambda means, rule: means.get(""))
"""The mean over questions that have a value, as most benchmarks have it."""

ScoreFunction: TypeAlias = Callable[[Doc, Any, Rule], Score]
AggregateFunction: TypeAlias = Callable[[str, Sequence[Row], Rule], TaskResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """How one benchmark is scored. `sources` cites the official code as repository@commit:path."""

    name: str
    score: ScoreFunction
    aggregate: AggregateFunction
    sources: tuple[str, ...]
    headline: Headline = MEAN
    ranked_windows: bool = False
    """Whether a prediction may be ranked windows instead of text."""
    options: Callable[[Doc], Sequence[str]] = lambda doc: ()
    """Texts of a document's options in order; empty where it has none or does not tell them."""
    truth: Callable[[Doc], str | None] = lambda doc: None
    """The right option's letter; `None` where there is none or it is not public."""


def answered(value: float, parsed: Any) -> Score:
    """Return the score of an answer that was read."""
    return Score(float(value), parsed, Outcome.ANSWERED)


def unreadable() -> Score:
    """Return the score of an answer that could not be read: 0, and counted as such."""
    return Score(0.0, None, Outcome.UNREADABLE)
