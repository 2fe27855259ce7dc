"""Video-MME: multiple choice A-D, micro accuracy over the answers that could be read.

Document: `answer` (letter), `options` (list, "A. text"), `duration` (short, medium, long),
`task_type`.

Official quirks, copied: two missing commas fuse "The best option is" with "The correct option is"
and "Best answer:" with "Best option:", so that these four are not deleted; the first capital A-D
anywhere is the answer, inside words too; a reply without one leaves the denominator.
"""

from collections.abc import Sequence

from .averages import field, mean, summarise
from .letters import first_capital, option_text, public_letter
from .multiple_choice import MultipleChoice
from .result import Doc, Outcome, Row, Rule, TaskResult

PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
)


def _read(text: str, doc: Doc) -> str | None:
    return first_capital(text, "ABCD", PREFIXES)


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average over all questions, and over those of each duration."""
    extra = {
        duration: mean(score.value for doc, score in rows if doc.get("duration") == duration)
        for duration in ("short", "medium", "long")
    }
    present = {name: value for name, value in extra.items() if value is not None}
    return summarise(benchmark, rows, rule, families=field("task_type"), extra=dict(present))


BENCHMARK = MultipleChoice(
    name="videomme",
    sources=(
        "thanku-all/parse_answer@afd52cf:eval_your_results.py",
        "BradyFU/Video-MME@4e7566d:evaluation/eval_your_results.py",
    ),
    truth=lambda doc: public_letter(doc["answer"]),
    options=lambda doc: [option_text(str(option)) for option in doc.get("options") or ()],
    n_options=4,
    read=_read,
    unread=Outcome.DROPPED,
    aggregate=aggregate,
).build()
