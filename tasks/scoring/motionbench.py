"""MotionBench: multiple choice up to A-F, accuracy over all questions.

Document: `answer` (letter, "NA" where it is not public), `options` (list of {label, text}),
`question_type`.

Official quirks, copied: replies are compared as they are, so that only a bare letter can be right;
rows with answer "NA" are never right and stay in the denominator of `acc`. The plain rule gives
such rows no value. Submit development rows only, and the two denominators agree.
"""

from collections.abc import Sequence

from .averages import field, mean, summarise
from .multiple_choice import MultipleChoice, only_letter
from .result import Benchmark, Doc, Outcome, Row, Rule, Score, TaskResult


def _options(doc: Doc) -> list[str]:
    given = doc.get("options") or ()
    return [str(o["text"]) if isinstance(o, dict) else str(o) for o in given]


def _truth(doc: Doc) -> str | None:
    answer = str(doc["answer"]).strip()
    return None if answer == "NA" else answer


_CHOICE = MultipleChoice(
    name="motionbench",
    sources=("THUDM/MotionBench@dcc9b07:motionbench/metrics/compute_accuracy.py",),
    truth=_truth,
    options=_options,
    n_options=6,
    read=lambda text, doc: only_letter(text, 26),
)


def score(doc: Doc, text: str, rule: Rule) -> Score:
    """Score a reply by raw equality (official) or by what it says (plain)."""
    found = _CHOICE.score(doc, text, rule)
    if rule == "official" and found.outcome is Outcome.NO_TRUTH:
        return Score(0.0, found.parsed, Outcome.NO_TRUTH)
    return found


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average over all questions; beside it, over those whose answer is public."""
    public = [row for row in rows if row[1].outcome is not Outcome.NO_TRUTH]
    extra = {"accuracy where the answer is public": mean(s.value for _, s in public)}
    result = summarise(benchmark, rows, rule, extra=extra)
    result.by_family.update(
        summarise(benchmark, public, rule, families=field("question_type")).by_family
    )
    return result


BENCHMARK = Benchmark(
    name="motionbench",
    score=score,
    aggregate=aggregate,
    sources=_CHOICE.sources,
    options=_CHOICE.options,
    truth=_CHOICE.truth,
)
