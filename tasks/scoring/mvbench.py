"""MVBench: twenty tasks of 200 questions, pooled accuracy (which equals the mean of the tasks).

Document: `candidates` (list), `answer` (text of the right one), and the task's name in `task_type`
or `sub_task` where the runner adds it.

Official reading: the reply's first line, blanks around it removed. Official quirks, copied: its
first word and the truth as "(b)" are compared as substrings of one another, case ignored; so empty
text, "(" and ")" are right. (The notebook has its own model go on after "Best option:(" and puts
that bracket before the reply; here replies bring their own.)
"""

from .averages import field
from .letters import letter
from .multiple_choice import MultipleChoice
from .result import Benchmark, Doc, Rule, Score, ScoringError, answered, unreadable


def _options(doc: Doc) -> list[str]:
    return [str(candidate) for candidate in doc["candidates"]]


def _truth(doc: Doc) -> str:
    options = _options(doc)
    if doc["answer"] not in options:
        raise ScoringError(f"mvbench: answer {doc['answer']!r} is none of {options}")
    return letter(options.index(str(doc["answer"])))


def _official(doc: Doc, text: str) -> Score:
    line = text.strip().split("\n")[0]
    word = line.lower().split(" ")[0]
    truth = f"({_truth(doc).lower()})"
    right = word.replace(".", "") in truth or truth in word
    letters = {letter(i).lower() for i in range(len(_options(doc)))}
    if not right and not letters & set(word):
        return unreadable()
    return answered(right, word)


_CHOICE = MultipleChoice(
    name="mvbench",
    sources=("OpenGVLab/Ask-Anything@4dd8210:video_chat2/mvbench.ipynb",),
    truth=_truth,
    options=_options,
    n_options=4,
    read=lambda text, doc: None,
    families=field("task_type", "sub_task"),
)


def score(doc: Doc, text: str, rule: Rule) -> Score:
    """Score a reply by substring (official) or by what it says (plain)."""
    return _official(doc, text) if rule == "official" else _CHOICE.score(doc, text, rule)


BENCHMARK = Benchmark(
    name="mvbench",
    score=score,
    aggregate=_CHOICE.mean_over_questions,
    sources=_CHOICE.sources,
    options=_CHOICE.options,
    truth=_CHOICE.truth,
)
