r"""VRBench multiple choice: accuracy by a cascade of patterns; the open questions need a judge.

Document: `options` (letter → text), `answer` (letter), `reasoning_type`. A document without
`options` is an open question of the process half: only a judge could tell.

The official cascade, first step that finds something: (1) `\boxed{B}`; (2) `<Answer> B`; (3) a line
"B. text"; (4) "Answer: B" and its kin; (5) "B.", else "B)", else "B:" anywhere; (6) a letter
followed by blanks and another letter or the line's end; (7) a lone letter once punctuation is
removed; (8) a lone capital. Of several finds in one step the last counts, in (1) and (2) the first.
Case is ignored, so words count: the "a" in "a dog" is an answer of steps 6 and 7.

Official quirk about categories: a category whose judged half is missing or zero takes its
multiple-choice half alone. Scores here are that half.
"""

import re
from collections.abc import Callable, Sequence

from .averages import field
from .multiple_choice import MultipleChoice
from .result import Benchmark, Doc, Outcome, Rule, Score

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


_CHOICE = MultipleChoice(
    name="vrbench",
    sources=("OpenGVLab/VRBench@47a22db:evaluation/calculate_scores.py",),
    truth=lambda doc: str(doc["answer"]).strip().upper(),
    options=lambda doc: [str(text) for _, text in sorted(doc["options"].items())],
    n_options=5,
    read=read,
    families=field("reasoning_type"),
)


def score(doc: Doc, text: str, rule: Rule) -> Score:
    """Score a multiple-choice reply; an open one needs a judge."""
    if not doc.get("options"):
        return Score(None, None, Outcome.JUDGE_NEEDED)
    return _CHOICE.score(doc, text, rule)


BENCHMARK = Benchmark(
    name="vrbench",
    score=score,
    aggregate=_CHOICE.mean_over_questions,
    sources=_CHOICE.sources,
    options=_CHOICE.options,
    truth=_CHOICE.truth,
)
