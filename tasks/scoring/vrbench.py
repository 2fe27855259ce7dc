r"""VRBench: accuracy by a cascade of patterns; the reasoning behind a reply needs a judge.

Document: `options` (letter → text), `answer` (letter), `reasoning_type`. A document without
`options` is an open question: only a judge could tell. Where the document holds the annotated
`reasoning_process`, the process half of the benchmark counts too: a judge rates the reasoning of
the same reply from 0 to 10, and its rating stands in the document as `rate`, as in the official
evaluation file.

The official cascade, first step that finds something: (1) `\boxed{B}`; (2) `<Answer> B`; (3) a line
"B. text"; (4) "Answer: B" and its kin; (5) "B.", else "B)", else "B:" anywhere; (6) a letter
followed by blanks and another letter or the line's end; (7) a lone letter once punctuation is
removed; (8) a lone capital. Of several finds in one step the last counts, in (1) and (2) the first.
Case is ignored, so words count: the "a" in "a dog" is an answer of steps 6 and 7.

`Score` and the headline are the multiple-choice half; `judge_needed` counts ratings that are still
missing. `extra` has the mean rating (`process`, 0 to 1), `overall`, the mean of both halves, and
both halves' mean for each kind of question (`combined …`).

Official quirks, copied: kinds of question that are never sent to the judge count as rated 0 in
`process`; a kind whose judged half or multiple-choice half is missing or zero takes the other half
alone in `combined`. The plain rule leaves the former out.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from .averages import field, group_means, mean
from .letters import public_letter
from .multiple_choice import MultipleChoice
from .result import Benchmark, Doc, Outcome, Row, Rule, Score, TaskResult

UNIQUE = frozenset(
    ("Event Attribution", "Multi-element Inference", "Implicit Inference", "Logical Linkage")
)
"""Kinds of question with one right answer, as the official judge has them."""
SUMMARISED = frozenset(("Hypothetical Reasoning", "Event Prediction"))
"""Kinds of question whose judge is shown the video's summary too."""

_I = re.IGNORECASE
_BOXED = re.compile(r"\\boxed\{([A-E])\}", _I)
_TAGGED = re.compile(r"<Answer>\s*([A-E])", _I)
_LINE = re.compile(r"^([A-E])\.\s*(?:.+)$", _I | re.MULTILINE)
_AFTER = tuple(
    re.compile(rf"{words}[:\s]+([A-E])(?:\s|$|\.|,)", _I)
    for words in ("Answer", "answer is", "correct answer", "final answer", "final", "therefore",
                  "conclusion")
)  # fmt: skip
_LABELS = tuple(re.compile(rf"([A-E]){mark}", _I) for mark in (r"\.", r"\)", ":"))
_SPACED = re.compile(r"(?:^|\n|\s)([A-E])\s+(?=[A-Z]|$|\n)", _I | re.MULTILINE)
_LONE = re.compile(r"\b([A-E])\b", _I)
_LONE_CAPITAL = re.compile(r"\b([A-E])\b")
_GROUPED_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The official call passes re.UNICODE (32) where the number of replacements belongs.
_PERIODS_REMOVED = 32


def _all_after(text: str) -> list[str]:
    return [found for pattern in _AFTER for found in pattern.findall(text)]


def _labelled(text: str) -> list[str]:
    return next((found for pattern in _LABELS if (found := pattern.findall(text))), [])


def _without_punctuation(text: str) -> list[str]:
    """Find lone letters after punctuation is deleted (beside blanks) or turned into blanks."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    grouped = _GROUPED_DIGITS.search(text) is not None
    cleaned = text
    for char in _PUNCTUATION:
        beside_blank = f"{char} " in text or f" {char}" in text
        cleaned = cleaned.replace(char, "" if beside_blank or grouped else " ")
    cleaned = _PERIOD.sub("", cleaned, count=_PERIODS_REMOVED)
    return _LONE.findall(cleaned.strip("'").strip('"').strip(")").strip("(").strip().lower())


def _capital(text: str) -> list[str]:
    if not _LONE_CAPITAL.search(text):
        return []
    return _LONE.findall(text.lower()[-50:]) or _LONE_CAPITAL.findall(text)


_STEPS: tuple[Callable[[str], Sequence[str]], ...] = (
    lambda text: _BOXED.findall(text)[:1],
    lambda text: _TAGGED.findall(text)[:1],
    lambda text: _LINE.findall(text.strip()),
    _all_after,
    _labelled,
    _SPACED.findall,
    _without_punctuation,
    _capital,
)


def read(text: str, doc: Doc) -> str | None:
    """Return the letter that the official cascade reads."""
    for step in _STEPS:
        found = step(text)
        if found:
            return found[-1].upper()
    return None


def _options(doc: Doc) -> list[str]:
    """Return the options' texts; a column that other documents need stands as `None`."""
    return [str(text) for _, text in sorted(doc["options"].items()) if text is not None]


_CHOICE = MultipleChoice(
    name="vrbench",
    sources=("OpenGVLab/VRBench@47a22db:evaluation/calculate_scores.py",),
    truth=lambda doc: public_letter(doc["answer"]),
    options=_options,
    n_options=5,
    read=read,
    families=field("reasoning_type"),
)


def score(doc: Doc, text: str, rule: Rule) -> Score:
    """Score a multiple-choice reply; an open one needs a judge."""
    if not doc.get("options") or not _options(doc):
        return Score(None, None, Outcome.JUDGE_NEEDED)
    return _CHOICE.score(doc, text, rule)


def has_process(doc: Doc) -> bool:
    """Whether the official code sends the reasoning of a reply to this question to its judge."""
    kinds = UNIQUE | SUMMARISED
    return doc.get("reasoning_process") is not None and doc.get("reasoning_type") in kinds


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average the multiple-choice half, and the judged half as far as there is one."""
    result = _CHOICE.mean_over_questions(benchmark, rows, rule)
    open_rows = [row for row in rows if has_process(row[0]) and row[0].get("rate") is None]
    counted = (Outcome.ERROR, Outcome.JUDGE_NEEDED)
    needed = sum(found.outcome not in counted for _, found in open_rows)
    result = replace(result, judge_needed=result.judge_needed + needed)
    if not any(doc.get("rate") is not None for doc, _ in rows):
        return result
    rated = [(doc, _rating(doc, found, rule)) for doc, found in rows]
    process = mean(rating for _, rating in rated)
    halves = {"process": process, "overall": mean((result.value, process))}
    judged = [(doc, Score(rating, None, Outcome.ANSWERED)) for doc, rating in rated]
    for kind, group in group_means(judged, field("reasoning_type")).items():
        both = [half for half in (result.by_family[kind].value, group.value) if half]
        halves[f"combined {kind}"] = mean(both) or 0.0
    return replace(result, extra=result.extra | halves)


def _rating(doc: Doc, found: Score, rule: Rule) -> float | None:
    if doc.get("rate") is not None:
        return float(doc["rate"]) / 10
    if found.outcome is Outcome.ERROR:
        return 0.0
    never_judged = doc.get("reasoning_type") not in UNIQUE | SUMMARISED
    return 0.0 if rule == "official" and never_judged else None


BENCHMARK = Benchmark(
    name="vrbench",
    score=score,
    aggregate=aggregate,
    sources=(
        *_CHOICE.sources,
        "OpenGVLab/VRBench@d45ed2f:evaluation/batch_evaluation_api_mp_time_sync.py",
    ),
    options=_CHOICE.options,
    truth=_CHOICE.truth,
)
