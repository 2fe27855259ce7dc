"""Video-MME-v2: eight options, four questions a group, a non-linear score per group.

Document: `options` (one text, "A. …" lines), `answer` (letter), `group_type` (relevance or logic),
`group_structure` (for logic: [1, 2, 3, 4], [1, [2, 3], 4] or [[1, 2], 3, 4]), `level`,
`second_head`, `third_head`, `video_id`, `question_id`.

A relevance group scores (right / 4)², a logic group by the length of its chain of right answers;
the benchmark's number is the mean over groups.

Official quirks, copied: an unreadable answer is -1, which is true in a logic chain (four of them
score 1) and is summed in a relevance group. The plain rule counts unreadable answers as wrong.
A question that was not answered at all, its video damaged say, is wrong by both rules.
Officially a group is four neighbouring rows, which are one video's in the complete data; here they
are four rows of one video also where rows are missing or in another order. Groups of fewer than
four rows (a limited or unfinished run) have no score; their number is in `extra`.
"""

import ast
from collections.abc import Sequence
from typing import Any

from .averages import field, mean, summarise
from .letters import first_capital, lettered_options, public_letter
from .multiple_choice import MultipleChoice
from .result import Doc, Headline, Outcome, Row, Rule, ScoringError, TaskResult, Unit

GROUP = 4
PREFIXES = (
    "Final Answer:",
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
    "Answer:",
    "Option:",
)
CHAINS: dict[str, tuple[float, ...]] = {
    "[1, 2, 3, 4]": (0.0, 1 / 16, 4 / 16, 9 / 16, 1.0),
    "[1, [2, 3], 4]": (0.0, 1 / 12, 4 / 12, 7 / 12, 1.0),
    "[[1, 2], 3, 4]": (0.0, 1 / 10, 2 / 10, 5 / 10, 1.0),
}
"""Score of a logic group by the length of its chain, 0 to 4."""


def _read(text: str, doc: Doc) -> str | None:
    return first_capital(text, "ABCDEFGH", PREFIXES)


def relevance(marks: Sequence[int]) -> float:
    """Return the score of a relevance group; marks are 1, 0 or (officially, unreadable) -1."""
    right = sum(marks)
    return right * right / 16 if right >= 0 else 0.0


def logic(marks: Sequence[int], structure: Any) -> float:
    """Return the score of a logic group.

    The chain ends at the first mark of 0. Where two questions are parallel, either of them
    continues it: with [1, [2, 3], 4] question 3 if 2 is wrong, with [[1, 2], 3, 4] question 2 if 1
    is wrong; the chain goes no further then.

    Raises:
        ScoringError: An unknown structure.
    """
    form = str(_parsed(structure))
    if form not in CHAINS:
        raise ScoringError(f"unknown group_structure {structure!r}; known: {', '.join(CHAINS)}")
    chain = next((i for i, mark in enumerate(marks) if not mark), len(marks))
    parallel = (form == "[1, [2, 3], 4]" and chain == 1 and marks[2]) or (
        form == "[[1, 2], 3, 4]" and chain == 0 and marks[1]
    )
    return CHAINS[form][chain + bool(parallel)]


def _parsed(structure: Any) -> Any:
    try:
        return ast.literal_eval(structure) if isinstance(structure, str) else structure
    except (ValueError, SyntaxError):
        return structure


def _group_score(rows: Sequence[Row], rule: Rule) -> float:
    doc = rows[-1][0]
    marks = [_mark(row, rule) for row in rows]
    if doc["group_type"] == "relevance":
        return relevance(marks)
    if doc["group_type"] == "logic":
        return logic(marks, doc["group_structure"])
    raise ScoringError(f"unknown group_type {doc['group_type']!r}; known: relevance, logic")


def _mark(row: Row, rule: Rule) -> int:
    score = row[1]
    if rule == "official" and score.outcome is Outcome.UNREADABLE:
        return -1
    return int(bool(score.value))


def _groups(rows: Sequence[Row], rule: Rule) -> list[Sequence[int]]:
    """Return the indices of each group's rows; groups of an unfinished run may be incomplete."""
    by_video: dict[str, list[int]] = {}
    for index, (doc, _) in enumerate(rows):
        by_video.setdefault(str(doc["video_id"]), []).append(index)
    groups = [sorted(group, key=lambda i: _place(rows[i][0])) for group in by_video.values()]
    if rule != "official":
        return list(groups)
    return [group[i : i + GROUP] for group in groups for i in range(0, len(group), GROUP)]


def _units(rows: Sequence[Row], rule: Rule) -> list[Unit]:
    return [
        Unit(group[-1], "", _group_score([rows[i] for i in group], rule))
        for group in _groups(rows, rule)
        if len(group) == GROUP
    ]


HEADLINE = Headline(_units, lambda means, rule: means.get(""))


def _place(doc: Doc) -> tuple[int, str]:
    last = str(doc["question_id"]).rsplit("-", 1)[-1]
    return (int(last) if last.isascii() and last.isdecimal() else 0, last)


def _level(doc: Doc) -> str:
    """Return a document's level; tables that have rows without one hold it as 1.0."""
    return str(doc.get("level")).removesuffix(".0")


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average over groups; beside it by type and level of group, and question accuracy."""
    groups = len(_groups(rows, rule))
    whole = [(rows[unit.row][0], unit.value) for unit in _units(rows, rule)]
    read = [s.value for _, s in rows if s.outcome is Outcome.ANSWERED]
    extra: dict[str, float | None] = {
        "accuracy": mean(score.value for _, score in rows),
        "accuracy of readable answers": mean(read),
    }
    for kind in ("relevance", "logic"):
        extra[kind] = mean(value for doc, value in whole if doc["group_type"] == kind)
    for level in ("1", "2", "3"):
        extra[f"level_{level}"] = mean(v for doc, v in whole if _level(doc) == level)
    if len(whole) < groups:
        extra["incomplete groups"] = float(groups - len(whole))
    return summarise(
        benchmark,
        rows,
        rule,
        metric="group score",
        value=mean(value for _, value in whole),
        families=field("second_head", "group_type"),
        extra=extra,
    )


BENCHMARK = MultipleChoice(
    name="videomme_v2",
    sources=("MME-Benchmarks/Video-MME-v2@b24176a:evaluation/test_video_mme_v2.py",),
    truth=lambda doc: public_letter(doc["answer"]),
    options=lambda doc: lettered_options(str(doc.get("options") or "")),
    n_options=8,
    read=_read,
    aggregate=aggregate,
    headline=HEADLINE,
).build()
