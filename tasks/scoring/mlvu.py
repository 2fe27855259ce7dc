"""MLVU multiple choice: M-Avg, the macro mean over the tasks that are present.

Document: `question` (with its options on lines of their own), `answer` (letter), `task_type`.

Official quirks, copied: the character before the first ")" is the answer, else the whole text must
be the letter; nothing is stripped, so a trailing blank or dot is wrong. The test split has six
options.
"""

from collections.abc import Mapping, Sequence

from .averages import field, group_units, mean, summarise
from .letters import lettered_options, public_letter
from .multiple_choice import MultipleChoice, only_letter
from .result import Doc, Headline, Row, Rule, TaskResult

MOST_OPTIONS = 6


def _read(text: str, doc: Doc) -> str | None:
    end = text.find(")")
    # A text that begins with ")" has nothing before it.
    return only_letter(text if end < 0 else text[max(end - 1, 0) : end], MOST_OPTIONS)


def _mean_of_tasks(means: Mapping[str, float | None], rule: Rule) -> float | None:
    return mean(means[name] for name in sorted(means))


HEADLINE = Headline(lambda rows, rule: group_units(rows, field("task_type")), _mean_of_tasks)


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average the accuracies of the task types that are present."""
    return summarise(
        benchmark,
        rows,
        rule,
        metric="M-Avg",
        value=HEADLINE.value(rows, rule),
        families=field("task_type"),
        extra={"accuracy over questions": mean(score.value for _, score in rows)},
    )


BENCHMARK = MultipleChoice(
    name="mlvu",
    sources=("JUNJIE99/MLVU@fd060c1:evaluation/multiple_choice_evaluation/choice_bench.py",),
    truth=lambda doc: public_letter(doc["answer"]),
    options=lambda doc: lettered_options(str(doc.get("question") or "")),
    n_options=MOST_OPTIONS,
    read=_read,
    aggregate=aggregate,
    headline=HEADLINE,
).build()
