"""What all multiple-choice benchmarks share; each benchmark's file says only where it differs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from .averages import summarise
from .choice import letter_index, read_plain
from .result import (
    MEAN,
    AggregateFunction,
    Benchmark,
    Doc,
    Headline,
    Outcome,
    Row,
    Rule,
    Score,
    TaskResult,
    answered,
    unreadable,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MultipleChoice:
    """A multiple-choice benchmark."""

    name: str
    sources: tuple[str, ...]
    """The official code as repository@commit:path."""
    truth: Callable[[Doc], str | None]
    """The right letter; `None` where it is not public."""
    options: Callable[[Doc], Sequence[str]]
    """Texts of the options in order; empty where the document does not tell them apart."""
    n_options: int
    """Number of options where `options` is empty."""
    read: Callable[[str, Doc], str | None]
    """The official reading: what the reply says, compared with the truth; `None` if nothing."""
    unread: Outcome = Outcome.UNREADABLE
    """`DROPPED` where the official code leaves unread rows out of the denominator."""
    families: Callable[[Doc], Iterable[str]] = lambda doc: ()
    aggregate: AggregateFunction | None = None
    """Where there is more to say than the mean over questions."""
    headline: Headline = MEAN

    def build(self) -> Benchmark:
        """Return the benchmark for the registry."""
        return Benchmark(
            name=self.name,
            score=self.score,
            aggregate=self.aggregate or self.mean_over_questions,
            headline=self.headline,
            sources=self.sources,
            options=self.options,
            truth=self.truth,
        )

    def score(self, doc: Doc, prediction: Any, rule: Rule) -> Score:
        """Score a reply by letter."""
        truth = self.truth(doc)
        read = self.read_plainly(prediction, doc) if rule == "plain" else self.read(prediction, doc)
        if truth is None:
            return Score(None, read, Outcome.NO_TRUTH)
        if read is None:
            drop = rule == "official" and self.unread is Outcome.DROPPED
            return Score(None, None, Outcome.DROPPED) if drop else unreadable()
        return answered(read == truth, read)

    def read_plainly(self, text: str, doc: Doc) -> str | None:
        """Read the letter that a careful reader would see."""
        options = self.options(doc)
        index = read_plain(text, len(options) or self.n_options, options)
        return None if index is None else ascii_uppercase[index]

    def mean_over_questions(self, benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
        """Average over all questions that have a value."""
        return summarise(benchmark, rows, rule, families=self.families)


def only_letter(text: str, n_options: int) -> str | None:
    """Return the text if it is exactly one capital option letter, as raw equality would need."""
    known = letter_index(text, n_options) is not None and text.isupper()
    return text if known else None
