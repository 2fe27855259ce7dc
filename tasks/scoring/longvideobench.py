"""LongVideoBench: multiple choice with up to five options, micro accuracy.

Document: `option0` … `option4` ("N/A" ends the list), `correct_choice` (index), `duration_group`,
`question_category`. The benchmark has no scorer of its own; its README sends to lmms-eval.

Official quirk not copied: a reply without a letter draws one at random; here it is unreadable, 0.
"""

from collections.abc import Sequence

from .averages import field, group_means, summarise
from .letters import first_capital, indexed_letter
from .multiple_choice import MultipleChoice
from .result import Doc, Row, Rule, TaskResult

PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)


def _options(doc: Doc) -> list[str]:
    options: list[str] = []
    for i in range(5):
        option = doc.get(f"option{i}")
        if option in (None, "N/A"):
            break
        options.append(str(option))
    return options


def _read(text: str, doc: Doc) -> str | None:
    return first_capital(text, "ABCDE", PREFIXES)


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average over all questions, by question category, and by duration group."""
    groups = group_means(rows, field("duration_group"))
    extra = {f"duration {name}": group.value for name, group in groups.items()}
    return summarise(benchmark, rows, rule, families=field("question_category"), extra=extra)


BENCHMARK = MultipleChoice(
    name="longvideobench",
    sources=("EvolvingLMMs-Lab/lmms-eval@v0.7.3:lmms_eval/tasks/longvideobench/utils.py",),
    truth=lambda doc: indexed_letter(doc["correct_choice"]),
    options=_options,
    n_options=5,
    read=_read,
    aggregate=aggregate,
).build()
