"""DSI-Bench: four views of each question; sample-wise and group-wise accuracy.

Document: `GT` (letter), `cate`, `options` (one text, "A. … B. …"), and the view in `aug` (std,
reverse, hflip, reverse_hflip). Without `aug` the rows with one `relative_path` and `question` are a
question's views, if there are four of each; else the rows are the four views one after the other.

Official reading: `<answer>B</answer>` only, case ignored. A reply without it gets the answer "E"
after ten tries, which is never right: unreadable, 0. Sample-wise accuracy pools all views; a
question is group-wise right if at least three of its four views are.
"""

import re
from collections.abc import Sequence

from .averages import field, mean, summarise
from .letters import options_in, public_letter
from .multiple_choice import MultipleChoice
from .result import Doc, Row, Rule, TaskResult

VIEWS = 4
ROBUST = 3
_ANSWER = re.compile(r"<answer>\s*([A-D])\s*</answer>", re.IGNORECASE)


def _read(text: str, doc: Doc) -> str | None:
    match = _ANSWER.search(text)
    return match.group(1).upper() if match else None


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the views of each question; incomplete questions of a limited run are left out."""
    views = _by(rows, "aug")
    columns = list(views.values())
    if set(views) == {("None",)}:
        questions = list(_by(rows, "relative_path", "question").values())
        if all(len(group) == VIEWS for group in questions):
            return questions
        size = len(rows) // VIEWS
        columns = [list(rows[i * size : (i + 1) * size]) for i in range(VIEWS)]
    return [list(group) for group in zip(*columns, strict=False) if len(group) == VIEWS]


def _by(rows: Sequence[Row], *fields: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[0].get(name)) for name in fields), []).append(row)
    return found


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average over samples; beside it over questions whose views mostly agree with the truth."""
    groups = _groups(rows)
    robust = [float(sum(score.value or 0.0 for _, score in g) >= ROBUST) for g in groups]
    return summarise(
        benchmark,
        rows,
        rule,
        metric="sample-wise accuracy",
        families=field("cate"),
        extra={"group-wise accuracy": mean(robust)},
    )


BENCHMARK = MultipleChoice(
    name="dsi_bench",
    sources=(
        "SpatialVision/dsibench@af90adc:qwen_inference_code.py",
        "SpatialVision/dsibench@af90adc:evaluate.py",
    ),
    truth=lambda doc: public_letter(doc["GT"]),
    options=lambda doc: options_in(str(doc.get("options") or "")),
    n_options=4,
    read=_read,
    aggregate=aggregate,
).build()
