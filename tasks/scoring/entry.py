"""`score` and `aggregate`: find the benchmark by name and apply its rule."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from . import (
    dsi_bench,
    egoschema,
    grounding,
    longvideobench,
    lvbench,
    mlvu,
    mmsi_bench,
    mmsi_video,
    motionbench,
    mvbench,
    nextqa,
    perceptiontest,
    qvhighlights,
    tempcompass,
    tomato,
    videomme,
    videomme_v2,
    vrbench,
    vsibench,
    world,
)
from .result import (
    RULES,
    Benchmark,
    Doc,
    Headline,
    Outcome,
    Row,
    Rule,
    Score,
    ScoringError,
    TaskResult,
    unreadable,
)
from .text import strip_thinking

_BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        *world.BENCHMARKS,
        *grounding.BENCHMARKS,
        dsi_bench.BENCHMARK,
        egoschema.BENCHMARK,
        longvideobench.BENCHMARK,
        lvbench.BENCHMARK,
        mlvu.BENCHMARK,
        mmsi_bench.BENCHMARK,
        mmsi_video.BENCHMARK,
        motionbench.BENCHMARK,
        mvbench.BENCHMARK,
        nextqa.BENCHMARK,
        perceptiontest.BENCHMARK,
        qvhighlights.BENCHMARK,
        tempcompass.BENCHMARK,
        tomato.BENCHMARK,
        videomme.BENCHMARK,
        videomme_v2.BENCHMARK,
        vrbench.BENCHMARK,
        vsibench.BENCHMARK,
    )
}


def benchmark_names() -> tuple[str, ...]:
    """Return the names that `score` and `aggregate` accept, in alphabetical order."""
    return tuple(sorted(_BENCHMARKS))


def sources(benchmark: str) -> tuple[str, ...]:
    """Return the official code that a benchmark's scorer follows, as repository@commit:path."""
    return _find(benchmark, "official").sources


def options(benchmark: str, doc: Doc) -> tuple[str, ...]:
    """Return the texts of a document's options, empty where it has none."""
    return tuple(_find(benchmark, "official").options(doc))


def truth(benchmark: str, doc: Doc) -> str | None:
    """Return the letter of a document's right option, if it has one and it is public."""
    return _find(benchmark, "official").truth(doc)


def score(benchmark: str, doc: Doc, prediction: Any, *, rule: Rule = "official") -> Score:
    """Score one prediction.

    Thinking (`<think>…</think>` and its kin) is removed first; a thinking block that never closes
    makes the answer unreadable. Arbitrary text never raises and nothing is drawn at random.

    Args:
        benchmark: One of `benchmark_names()`.
        doc: The benchmark's document, with the fields that its scorer names.
        prediction: The model's text, or ranked windows `[start_s, end_s, confidence]` where the
            benchmark takes them; `None` for a sample that failed before it was answered.
        rule: `official` is what the benchmark's own code computes, `plain` what a careful reader
            would say.

    Returns:
        The score, with the reading and the outcome.

    Raises:
        ScoringError: Unknown benchmark or rule, or a document without the fields that it needs.
    """
    scorer = _find(benchmark, rule)
    if prediction is None:
        return Score(0.0, None, Outcome.ERROR)
    if isinstance(prediction, str):
        prediction = strip_thinking(prediction)
        if prediction is None:
            return unreadable()
    elif not scorer.ranked_windows:
        return unreadable()
    with _layout_explained(benchmark, doc):
        return scorer.score(doc, prediction, rule)


def aggregate(benchmark: str, scored_rows: Iterable[Row], rule: Rule = "official") -> TaskResult:
    """Average scored rows by the benchmark's official averages.

    Args:
        benchmark: One of `benchmark_names()`.
        scored_rows: `(doc, Score)` in dataset order; some benchmarks group neighbouring rows.
        rule: The rule that the scores were made with.

    Returns:
        The result; its `value` is `None` when no row has a value.

    Raises:
        ScoringError: Unknown benchmark or rule, or a document without the fields that it needs.
    """
    scorer, rows = _find(benchmark, rule), list(scored_rows)
    with _layout_explained(benchmark):
        return scorer.aggregate(benchmark, rows, rule)


def headline(benchmark: str) -> Headline:
    """Return what a benchmark's headline number is made of, for resampling.

    Its `units` take `(doc, Score)` rows as `aggregate` does, and `aggregate(…).value` is its value.

    Raises:
        ScoringError: Unknown benchmark.
    """
    return _find(benchmark, "official").headline


@contextlib.contextmanager
def _layout_explained(benchmark: str, doc: Doc | None = None) -> Iterator[None]:
    """Say in words what a document of another layout causes.

    Texts of models cause no errors (tests/tasks/test_benchmarks.py), so the document is the cause.
    """
    which = "a document" if doc is None else f"document {doc.get('id')!r}"
    fields = "" if doc is None else f"; it has {sorted(doc)}"
    try:
        yield
    except ScoringError:
        raise
    except KeyError as error:
        raise ScoringError(f"{benchmark}: {which} lacks the field {error}{fields}") from error
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ScoringError(
            f"{benchmark}: {which} has a field of another form than the benchmark's "
            f"({error}){fields}"
        ) from error


def _find(benchmark: str, rule: Rule) -> Benchmark:
    if rule not in RULES:
        raise ScoringError(f"unknown rule {rule!r}; the rules are {', '.join(RULES)}")
    scorer = _BENCHMARKS.get(benchmark)
    if scorer is None:
        near = difflib.get_close_matches(benchmark, _BENCHMARKS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "known: " + ", ".join(_BENCHMARKS)
        raise ScoringError(f"unknown benchmark {benchmark!r}; {hint}")
    return scorer
