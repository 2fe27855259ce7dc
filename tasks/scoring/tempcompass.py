"""TempCompass: four kinds of question; rules first, and a judge for what they do not match.

Document: `qtype` (multi-choice, yes_no, caption_matching, captioning), `question` (with its options
on the lines after the first), `answer` ("B. text", "yes", "Caption B: text"), `dim`.

A reply that the rules do not match needs a judge and has no value here; captioning always does. The
official scripts have a switch that gives such replies 0: that number is in `extra`.

Official quirks, copied: "</s>" is deleted; any text that begins with "no" is no and with "yes" is
yes, longer words included; in caption matching the text behind the first ") " may be the caption.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .averages import field, group_means, mean, summarise
from .choice import read_plain
from .letters import letter, lettered_options
from .result import (
    Benchmark,
    Doc,
    Outcome,
    Row,
    Rule,
    Score,
    ScoringError,
    TaskResult,
    answered,
    unreadable,
)
from .text import final_answer, fold

_YES_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def _multi_choice(doc: Doc, text: str) -> Score | None:
    truth = str(doc["answer"])
    if text == truth:
        return answered(1, truth[:1])
    for mark in (".", ")"):
        if text[:1] in tuple("ABCD") and text[1:2] in ("", mark):
            return answered(text[0] == truth[:1], text[0])
    return None


def _yes_no(doc: Doc, text: str) -> Score | None:
    said = next((word for word in ("yes", "no") if text.lower().startswith(word)), None)
    return None if said is None else answered(said == doc["answer"], said)


@dataclass(frozen=True, slots=True)
class _Caption:
    """An option such as `Caption A: a man runs`."""

    whole: str
    label: str
    sentence: str

    @classmethod
    def parse(cls, line: str) -> "_Caption":
        """Split a line as the official code does: at ": ", the parts after the second are lost."""
        parts = line.split(": ")
        return cls(line, parts[0], parts[1] if len(parts) > 1 else "")

    @property
    def forms(self) -> set[str]:
        return {form for form in (self.whole, self.label, self.sentence) if form}


def _captions(doc: Doc) -> list[_Caption]:
    return [_Caption.parse(line) for line in str(doc["question"]).split("\n")[1:] if line]


def _caption_matching(doc: Doc, text: str) -> Score | None:
    behind_bracket = text.split(") ")[1] if ") " in text else text
    said = None
    # Later forms overrule earlier ones, as in the official loops.
    for caption in _captions(doc):
        said = caption.whole if caption.whole == text else said
    for caption in _captions(doc):
        said = caption.sentence if caption.sentence in {text, behind_bracket} - {""} else said
    for caption in _captions(doc):
        said = caption.label if caption.label in {text, text.replace(".", "")} else said
    if said is None:
        return None
    return answered(said in _Caption.parse(str(doc["answer"])).forms, said)


_RULES: dict[str, Callable[[Doc, str], Score | None]] = {
    "multi-choice": _multi_choice,
    "yes_no": _yes_no,
    "caption_matching": _caption_matching,
    "captioning": lambda doc, text: None,
}


def _plain_multi_choice(doc: Doc, text: str) -> Score | None:
    options = lettered_options(str(doc["question"]))
    index = read_plain(text, len(options) or 4, options)
    if index is None:
        return None
    return answered(letter(index) == str(doc["answer"])[:1], letter(index))


def _plain_yes_no(doc: Doc, text: str) -> Score | None:
    words = [word.lower() for word in _YES_NO.findall(final_answer(text))]
    first = _YES_NO.match(final_answer(text))
    said = first.group(1).lower() if first else (words[0] if len(set(words)) == 1 else None)
    return None if said is None else answered(said == str(doc["answer"]).lower(), said)


def _plain_caption_matching(doc: Doc, text: str) -> Score | None:
    captions = _captions(doc)
    said = fold(final_answer(text))
    exact = {c for c in captions if said in {fold(f) for f in (*c.forms, _last_word(c.label))}}
    named = exact or {c for c in captions if any(f" {fold(f)} " in f" {said} " for f in c.forms)}
    if not said or len(named) != 1:
        return None
    caption = named.pop()
    return answered(caption.whole == doc["answer"], caption.label)


def _last_word(label: str) -> str:
    """Return the A of `Caption A`, which may stand alone as an answer."""
    return label.split()[-1] if label.split() else label


_PLAIN_RULES: dict[str, Callable[[Doc, str], Score | None]] = {
    "multi-choice": _plain_multi_choice,
    "yes_no": _plain_yes_no,
    "caption_matching": _plain_caption_matching,
    "captioning": lambda doc, text: None,
}


def score(doc: Doc, text: str, rule: Rule) -> Score:
    """Score a reply by the rules of its kind of question.

    Raises:
        ScoringError: An unknown `qtype`.
    """
    kind = doc["qtype"]
    if kind not in _RULES:
        raise ScoringError(f"unknown qtype {kind!r}; known: {', '.join(_RULES)}")
    if rule == "official":
        found = _RULES[kind](doc, text.replace("</s>", ""))
    else:
        found = _PLAIN_RULES[kind](doc, text)
    if found is not None:
        return found
    judged = rule == "official" or kind == "captioning"
    return Score(None, None, Outcome.JUDGE_NEEDED) if judged else unreadable()


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average over the matched replies; by kind of question, and with unmatched ones as 0."""
    extra = {name: g.value for name, g in group_means(rows, field("qtype")).items()}
    extra["unmatched as 0"] = mean(score.value or 0.0 for _, score in rows)
    return summarise(benchmark, rows, rule, families=field("dim"), extra=extra)


BENCHMARK = Benchmark(
    name="tempcompass",
    score=score,
    aggregate=aggregate,
    sources=tuple(f"llyx97/TempCompass@e1b4631:eval_{kind}.py" for kind in _RULES),
    options=lambda doc: lettered_options(str(doc["question"])),
    truth=lambda doc: str(doc["answer"])[:1] if doc["qtype"] == "multi-choice" else None,
)
