"""DSI-Bench: four views of each question; sample-wise and group-wise accuracy.

Document: `GT` (letter), `cate`, `options` (one text, "A. … B. …"), the view in `aug` (std, reverse,
hflip, reverse_hflip), and which question it is: `row`, its place in its view's file, by which the
official code pairs the views; where that is not known, `relative_path` and `question`. Documents of
older runs tell neither: they are paired by position, in `aug` or in the four quarters of the rows,
and only where all views are equally long.

Official reading: `<answer>B</answer>` only, case ignored. A reply without it gets the answer "E"
after ten tries, which is never right: unreadable, 0. Sample-wise accuracy pools all views; a
question is group-wise right if at least three of its four views are. Questions of which a view was
not asked (a limited run) do not count there; their number is in `extra`.
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
    """Return the rows of each question; a limited run's questions may lack views."""
    for names in (("row",), ("relative_path", "question")):
        if rows and all(row[0].get(name) is not None for row in rows for name in names):
            return list(_by(rows, *names).values())
    views = list(_by(rows, "aug").values())
    if len(views) == 1 and views[0][0][0].get("aug") is None:
        size = -(-len(rows) // VIEWS)
        views = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
    if len({len(view) for view in views}) > 1:
        # Nothing tells which view of which question is missing.
        return [[row] for row in max(views, key=len)]
    return [list(group) for group in zip(*views, strict=True)]


def _whole(group: Sequence[Row]) -> bool:
    views = [row[0].get("aug") for row in group]
    return len(group) == VIEWS and (views == [None] * VIEWS or len(set(views)) == VIEWS)


def _by(rows: Sequence[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(str(row[0].get(name)) for name in names), []).append(row)
    return found


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average over samples; beside it over questions whose views mostly agree with the truth."""
    groups = _groups(rows)
    whole = [group for group in groups if _whole(group)]
    robust = [float(sum(score.value or 0.0 for _, score in g) >= ROBUST) for g in whole]
    extra = {"group-wise accuracy": mean(robust)}
    if len(whole) < len(groups):
        extra["incomplete groups"] = float(len(groups) - len(whole))
    return summarise(
        benchmark,
        rows,
        rule,
        metric="sample-wise accuracy",
        families=field("cate"),
        extra=extra,
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
