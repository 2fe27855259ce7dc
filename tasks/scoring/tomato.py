"""TOMATO: multiple choice, pooled accuracy.

Document: `options` (list), `answer` (index), `reason_type`, `demonstration_type`.

Official reading: one letter in either case, "A: text" in capitals, or "Answer is:(A)" (the pattern
has no room for a blank before the letter). Everything else goes to a language model, and to a
random letter if that fails. Here such a reply needs a judge (no value) where a careful reader can
tell the answer, and is unreadable (0) where not.
"""

import re

from .averages import field
from .letters import indexed_letter, letter
from .multiple_choice import MultipleChoice
from .result import Benchmark, Doc, Outcome, Rule, Score

_ANSWER_IS = re.compile(r"Answer is:?[(]?([A-Fa-f])[)]?")


def _options(doc: Doc) -> list[str]:
    return [str(option) for option in doc["options"]]


def _read(text: str, doc: Doc) -> str | None:
    text = text.strip()
    options = _options(doc)
    letters = [letter(i) for i in range(len(options))]
    stated = _ANSWER_IS.fullmatch(text)
    if len(text) == 1:
        found = text.upper()
    elif text.upper() in [f"{a}: {b}" for a, b in zip(letters, options, strict=True)]:
        found = text[0].upper()
    else:
        found = stated.group(1).upper() if stated else ""
    return found if found in letters else None


_CHOICE = MultipleChoice(
    name="tomato",
    sources=(
        "yale-nlp/TOMATO@fe2025f:src/parse_result.py",
        "yale-nlp/TOMATO@fe2025f:src/get_categorized_score.py",
    ),
    truth=lambda doc: indexed_letter(doc["answer"]),
    options=_options,
    n_options=6,
    read=_read,
    families=field("reason_type"),
)


def score(doc: Doc, text: str, rule: Rule) -> Score:
    """Score a reply; officially, what only the language model could read has no value."""
    found = _CHOICE.score(doc, text, rule)
    if rule == "official" and found.outcome is Outcome.UNREADABLE:
        likely = _CHOICE.read_plainly(text, doc)
        if likely is not None:
            return Score(None, likely, Outcome.JUDGE_NEEDED)
    return found


BENCHMARK = Benchmark(
    name="tomato",
    score=score,
    aggregate=_CHOICE.mean_over_questions,
    sources=_CHOICE.sources,
    options=_CHOICE.options,
    truth=_CHOICE.truth,
)
