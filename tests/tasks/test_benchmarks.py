"""Run with: pytest tests/tasks/test_benchmarks.py -q.

Expected values come from the official scorers as documented in each benchmark's file.
"""

import json
import random
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvideo3.tasks.scoring import (
    Outcome,
    Score,
    ScoringError,
    aggregate,
    benchmark_names,
    headline,
    score,
    sources,
)
from internvideo3.tasks.scoring.text import strip_thinking

OPTIONS = ["a dog", "red circle", "blue square", "green star"]
LETTERED = [f"{letter}. {text}" for letter, text in zip("ABCD", OPTIONS, strict=True)]
QUESTION = "What is it?\n" + "\n".join(LETTERED)
FIVE = [*OPTIONS, "yellow ring"]

DOCS: dict[str, dict[str, Any]] = {
    "videomme": {"answer": "B", "options": LETTERED, "duration": "short", "task_type": "Counting"},
    "videomme_v2": {"answer": "B", "options": "\n".join(LETTERED), "group_type": "relevance",
                    "group_structure": "None", "level": 1, "second_head": "x",
                    "video_id": "001", "question_id": "001-1"},
    "longvideobench": {**{f"option{i}": o for i, o in enumerate(OPTIONS)}, "option4": "N/A",
                       "correct_choice": 1, "duration_group": 60, "question_category": "S2E"},
    "mlvu": {"question": QUESTION, "answer": "B", "task_type": "ego"},
    "lvbench": {"question": QUESTION, "answer": "B", "question_type": ["event", "summary"]},
    "vrbench": {"options": dict(zip("ABCD", OPTIONS, strict=True)), "answer": "B",
                "reasoning_type": "Event Prediction"},
    "egoschema": {"option": [f"{x}. {o}" for x, o in zip("ABCDE", FIVE, strict=True)],
                  "answer": "1", "video_idx": "v"},
    "nextqa": {**{f"a{i}": o for i, o in enumerate(FIVE)}, "answer": 1, "type": "TP"},
    "perceptiontest": {"options": OPTIONS[:3], "answer_id": "1", "area": "physics"},
    "mvbench": {"candidates": OPTIONS, "answer": "red circle", "task_type": "Action Count"},
    "tomato": {"options": OPTIONS, "answer": 1, "reason_type": "rotation"},
    "motionbench": {"options": [{"label": x, "text": o} for x, o in zip("ABCD", OPTIONS,
                                                                       strict=True)],
                    "answer": "B", "question_type": "Camera Motion"},
    "tempcompass": {"qtype": "multi-choice", "question": QUESTION, "answer": "B. red circle",
                    "dim": "action"},
    "timelens": {"span": [[12.4, 20.6]], "query": "q", "duration": 60},
    "charades_sta": {"timestamp": [12.4, 20.6], "caption": "q"},
    "activitynet_captions": {"timestamps": [[12.4, 20.6]], "duration": 60},
    "qvhighlights": {"relevant_windows": [[10, 20], [40, 60]], "qid": 1, "duration": 150},
    "vsibench": {"question_type": "object_rel_distance", "ground_truth": "B",
                 "options": LETTERED},
    "mmsi_bench": {"question": QUESTION, "answer": "B", "question_type": "MSR"},
    "mmsi_video": {"ground_truth": "B", "type": "Planning"},
    "dsi_bench": {"GT": "B", "cate": 0, "options": "A. x B. y", "aug": "std"},
}  # fmt: skip
CHOICE = [b for b in DOCS if b not in ("timelens", "charades_sta", "activitynet_captions",
                                       "qvhighlights")]  # fmt: skip
PROMPTED = {"dsi_bench": "<answer>B</answer>", "mvbench": "(B) red circle"}
"""A reply in the form that the benchmark's own prompt asks for, where it is not a bare letter."""


def value(benchmark: str, reply: Any, rule: Any = "official", **changes: Any) -> float | None:
    return score(benchmark, DOCS[benchmark] | changes, reply, rule=rule).value


def test_the_issue_names_are_all_known() -> None:
    wanted = (
        "videomme videomme_v2 longvideobench mlvu lvbench vrbench egoschema nextqa perceptiontest "
        "mvbench tomato motionbench tempcompass timelens charades_sta activitynet_captions "
        "qvhighlights vsibench mmsi_bench mmsi_video dsi_bench"
    )
    assert set(wanted.split()) == set(DOCS) <= set(benchmark_names())


@pytest.mark.parametrize("benchmark", DOCS)
def test_sources_are_cited_with_commit_and_path(benchmark: str) -> None:
    for source in sources(benchmark):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@(?:[0-9a-f]{7}|v[0-9.]+):[\w./-]+", source)


@pytest.mark.parametrize("benchmark", CHOICE)
def test_the_prompted_form_is_right_under_both_rules(benchmark: str) -> None:
    right = PROMPTED.get(benchmark, "B")
    wrong = right.replace("B", "C").replace("red circle", "blue square")
    for rule in ("official", "plain"):
        assert value(benchmark, right, rule) == 1
        assert value(benchmark, wrong, rule) == 0
        assert value(benchmark, f"<think>maybe C</think>\n{right}", rule) == 1
        rules: Any = rule
        unclosed = score(benchmark, DOCS[benchmark], f"<think>{right}", rule=rules)
        assert (unclosed.value, unclosed.outcome) == (0, Outcome.UNREADABLE)


WORDED = [
    *("The answer is B.", "**B**", r"The final result: $\boxed{B}$", "(b)", "b", "red circle"),
    *("B) red circle", "Answer: B because A dog leaves", "I think that it is the red circle."),
    *("<answer>B</answer>", "the answer is b", "option b", "answer: b", "{'answer': 'B'}"),
    *("B because A is a dog", "A is wrong; B is right", "B, as C is a square", "B - red circle"),
    "In the end a dog runs, but the answer is the red circle",
    *("The answer is 'B'", "The answer is ‘B’.", "Ｂ", "（B）", "答案：B", "B\u200b", "\u202eB"),
    *("A: no. B: yes.", "A? No, B.", "A is incorrect. C is incorrect. Therefore B.", "\ufeffb)"),
    *("Not A, not C, not D. B.", "The answer isn't A; it's B.", "```json\n{'answer': 'B'}\n```"),
    *("Answer: (B) because A is wrong and C is not visible.", "B\n\nExplanation: A dog is absent."),
    *(r"\boxed{\textbf{(B)}}", "<|begin_of_box|>B<|end_of_box|>", "B" + " because it moves" * 2000),
]


@pytest.mark.parametrize("reply", WORDED)
@pytest.mark.parametrize("benchmark", [b for b in CHOICE if b not in ("mmsi_video", "dsi_bench")])
def test_plain_reads_worded_answers_everywhere(benchmark: str, reply: str) -> None:
    assert value(benchmark, reply, "plain") == 1


SEVERAL = ["\n".join(LETTERED), "A or B", "B and C", "A B C D", "Both A and B", "none of these"]


@pytest.mark.parametrize("reply", SEVERAL)
@pytest.mark.parametrize("benchmark", ["videomme", "mlvu", "tomato", "vsibench", "motionbench"])
def test_plain_takes_no_letter_where_a_reply_names_several_or_none(
    benchmark: str, reply: str
) -> None:
    found = score(benchmark, DOCS[benchmark], reply, rule="plain")
    assert (found.value, found.outcome) == (0, Outcome.UNREADABLE)


READINGS = [
    # Negated letters are no answers, whatever the words of negation.
    ("The answer can't be A", None), ("The answer cannot be A", None), ("It's hardly B", None),
    ("The answer can’t be (A)", None), ("It is unlikely to be A", None), ("It's never A", None),
    ("It can't be A or B", None), ("A can't be right", None), ("A isn't right", None),
    ("The answer cannot be A; it is C.", "C"), ("It can't be A or B, so C", "C"),
    ("The answer isn't A or B but D", "D"), ("The answer is B, not A or C", "B"),
    # One of several is none of them.
    ("The answer is A or B", None), ("The answer is A and B", None), ("Answer: A/B", None),
    ("The answer is (A) or (B)", None), ("The answer is A, B or C", None),
    ("The answer is A, B, and C.", None), ("The answer is B or A", None),
    ("The answer is A or B. In the end the answer is B.", "B"),
    ("The answer is A or B. Finally: the answer is C or D.", None),
    # What follows may be of another sentence.
    ("The answer is B and A dog is no part of it", "B"), ("The answer is B and I am sure", "B"),
    ("The answer is A and B shows something else", "A"), ("The answer is A and B is wrong", "A"),
    ("The answer is B, and A and C are wrong.", "B"), ("The answer is B, C and D are wrong.", "B"),
    ("The answer is B and C are shown earlier.", "B"), ("The answer is B, not A and C", "B"),
    ("The correct answer is B, A and D never appear in the video.", "B"),
    ("The answer is B and C. They are shown.", None), ("It is not A and B is right", "B"),
    ("The answer is A or B, and C is clearly wrong.", None), ("not A or B is the answer", None),
    ("The answer is A or D, and B and C are ruled out.", None),
    ("Answer: A, B and C are all plausible.", None), ("The answer is A or B will do.", None),
    ("The answer is A and B are both correct.", None), ("The answer is A or B might be.", None),
    ("The answer is B or C, A is wrong.", None),
    # A correction replaces what was stated.
    ("The answer is A. Correction: D", "D"), ("The answer is A. Correction: (b).", "B"),
    ("The answer is A. Correction: the answer is D.", "D"),
]  # fmt: skip


def test_degenerate_replies_are_read_at_once() -> None:
    started = time.process_time()
    for part in (" and B", " or B", ", B", ", and B", " not B"):
        for opening in ("It is not A", "The answer is A"):
            score("videomme", DOCS["videomme"], opening + part * 10_000, rule="plain")
    assert time.process_time() - started < 5


@pytest.mark.parametrize(("reply", "letter"), READINGS)
def test_plain_reads_no_negated_letter_no_one_of_several_and_the_correction(
    reply: str, letter: str | None
) -> None:
    for benchmark in ("videomme", "mlvu", "tomato"):
        assert score(benchmark, DOCS[benchmark], reply, rule="plain").parsed == letter


def test_options_in_one_line_are_told_apart() -> None:
    asked = "How do you move?\nOptions: A: Left, while turning, B: Forward, C: Back; D: Up"
    doc = {"question": asked, "answer": "A", "question_type": "MSR"}
    assert score("mmsi_bench", doc, "Left, while turning", rule="plain").parsed == "A"
    assert score("mmsi_bench", doc, "I go forward.", rule="plain").parsed == "B"
    where = {"GT": "D", "options": "A. Above B. Under C. Front D. Behind"}
    assert score("dsi_bench", where, "It is behind.", rule="plain").value == 1
    video = {"ground_truth": "B", "type": "Planning", "user_prompt": QUESTION}
    assert score("mmsi_video", video, "the red circle", rule="plain").value == 1


OFFICIAL = [
    # (benchmark, reply, value); None where the official rule gives no value.
    ("videomme", "The answer is B because Anna leaves the room.", 1),
    ("videomme", "the second one", None),
    ("videomme", "", None),
    ("videomme", "b", None),
    ("videomme", "Both", 1),
    # The fused prefixes are not deleted, so that the capitals in what remains are read.
    ("videomme", "Best answer: C", 1),
    ("videomme", "Best answer:Best option: C", 0),
    ("videomme", "The correct option is B", 1),
    ("videomme", "A dog; B", 0),
    ("videomme_v2", "Final Answer: <B>.", 1),
    ("videomme_v2", "Hence the first", 0),
    ("videomme_v2", "none of them", 0),
    ("longvideobench", "The best option is B", 1),
    ("longvideobench", "Answer: B", 0),
    ("longvideobench", "b", 0),
    ("mlvu", "B) red circle", 1),
    ("mlvu", "(B) red circle", 1),
    ("mlvu", "B.", 0),
    ("mlvu", "B ", 0),
    ("mlvu", "The answer is B", 0),
    ("mlvu", "the red one (B)", 1),
    ("lvbench", "B.", 0),
    ("lvbench", "The answer is B", 0),
    ("vrbench", r"first A. then \boxed{B}", 1),
    ("vrbench", "<Answer> B </Answer> or C.", 1),
    ("vrbench", "A. a dog\nB. red circle", 1),
    ("vrbench", "Answer: C. final answer B", 1),
    ("vrbench", "it is (B)", 1),
    ("vrbench", "a dog", 0),
    ("vrbench", "none", 0),
    ("egoschema", "1", 1),
    ("egoschema", "(B)", 1),
    ("egoschema", "(A) no, (B)", 1),
    ("egoschema", "I would say it is the red circle here", 1),
    ("egoschema", "B: red", 0),
    ("nextqa", "1", 1),
    ("nextqa", "C is wrong, B is right", 1),
    ("perceptiontest", "A person moves: B", 0),
    ("perceptiontest", "It is B", 1),
    ("mvbench", "B) red circle", 1),
    ("mvbench", "b", 1),
    ("mvbench", "", 1),
    ("mvbench", "(", 1),
    ("mvbench", ")", 1),
    ("mvbench", " \n", 1),
    ("mvbench", " C", 0),
    ("mvbench", "\n(C) blue square", 0),
    ("mvbench", " B. red circle", 1),
    ("mvbench", "B\nThe red circle is seen at the end.", 1),
    ("mvbench", "(C)\nand not (B)", 0),
    ("mvbench", "The answer is B", 0),
    ("tomato", "b", 1),
    ("tomato", "Answer is:(B)", 1),
    ("tomato", "Answer is: (B)", None),
    ("tomato", "no idea", 0),
    ("motionbench", "B.", 0),
    ("motionbench", "a dog", 0),
    ("tempcompass", "B. red circle", 1),
    ("tempcompass", "B</s>", 1),
    ("tempcompass", "B) whatever", 1),
    ("tempcompass", "A. red circle", 0),
    ("tempcompass", "the red circle", None),
    ("vsibench", "B. red circle", 1),
    ("vsibench", "b", 1),
    ("vsibench", "(B)", 0),
    ("vsibench", "The answer is B", 0),
    ("mmsi_bench", "``B``", 1),
    ("mmsi_bench", "A bike, so B", 1),
    ("mmsi_bench", "b", 0),
    ("mmsi_bench", "`C` but B", 0),
    ("mmsi_video", r"$\boxed{B}$", 1),
    ("mmsi_video", '{"answer": "B", "why": 1}', 1),
    ("mmsi_video", "The answer is B, because", 1),
    ("mmsi_video", "B. red", 1),
    ("mmsi_video", "Answer B", 0),
    ("mmsi_video", "B but no answer", 0),
    ("dsi_bench", "so <answer> b </answer>", 1),
    ("dsi_bench", "B", 0),
]


@pytest.mark.parametrize(("benchmark", "reply", "expected"), OFFICIAL)
def test_official_readings_and_quirks(benchmark: str, reply: str, expected: float | None) -> None:
    assert value(benchmark, reply) == expected


def test_outcomes_say_why_there_is_no_value() -> None:
    assert score("videomme", DOCS["videomme"], "?").outcome is Outcome.DROPPED
    assert score("tomato", DOCS["tomato"], "Probably B").outcome is Outcome.JUDGE_NEEDED
    assert score("tomato", DOCS["tomato"], "?").outcome is Outcome.UNREADABLE
    open_question = {"answer": "x", "reasoning_type": "r"}
    assert score("vrbench", open_question, "long text").outcome is Outcome.JUDGE_NEEDED
    hidden = DOCS["egoschema"] | {"answer": None}
    assert score("egoschema", hidden, "B") == Score(None, "B", Outcome.NO_TRUTH)
    unknown = DOCS["longvideobench"] | {"correct_choice": -1}
    assert score("longvideobench", unknown, "B").outcome is Outcome.NO_TRUTH


@pytest.mark.parametrize("benchmark", DOCS)
def test_a_failed_sample_is_an_error_worth_zero(benchmark: str) -> None:
    assert score(benchmark, DOCS[benchmark], None) == Score(0.0, None, Outcome.ERROR)


CAPTIONS = "Which caption?\nCaption A: a cat sits\nCaption B: a dog runs"


@pytest.mark.parametrize(
    ("kind", "answer", "reply", "official", "plain"),
    [
        ("yes_no", "no", "No.", 1, 1),
        ("yes_no", "no", "Nothing moves, yes", 1, 0),
        ("yes_no", "yes", "yesterday", 1, 0),
        ("yes_no", "yes", "I would say yes", None, 1),
        ("yes_no", "yes", "hm", None, 0),
        ("caption_matching", "Caption B: a dog runs", "Caption B", 1, 1),
        ("caption_matching", "Caption B: a dog runs", "Caption B.", 1, 1),
        ("caption_matching", "Caption B: a dog runs", "a dog runs", 1, 1),
        ("caption_matching", "Caption B: a dog runs", "2) a dog runs", 1, 1),
        ("caption_matching", "Caption B: a dog runs", "Caption A: a cat sits", 0, 0),
        ("caption_matching", "Caption B: a dog runs", "b", None, 1),
        ("caption_matching", "Caption B: a dog runs", "I choose caption b here", None, 1),
        ("caption_matching", "Caption B: a dog runs", "", None, 0),
        ("captioning", "x", "A dog runs.", None, None),
    ],
)
def test_tempcompass_kinds(
    kind: str, answer: str, reply: str, official: float | None, plain: float | None
) -> None:
    doc = {"qtype": kind, "question": CAPTIONS, "answer": answer, "dim": "order"}
    assert score("tempcompass", doc, reply).value == official
    assert score("tempcompass", doc, reply, rule="plain").value == plain


def test_tempcompass_counts_what_a_judge_would_have_to_read() -> None:
    doc = DOCS["tempcompass"]
    rows = [(doc, score("tempcompass", doc, reply)) for reply in ("B", "A", "it is red", "B.")]
    result = aggregate("tempcompass", rows)
    assert (result.judge_needed, result.n_scored) == (1, 3)
    assert result.value == pytest.approx(2 / 3)
    assert result.extra["unmatched as 0"] == pytest.approx(0.5)
    with pytest.raises(ScoringError, match="qtype"):
        score("tempcompass", doc | {"qtype": "essay"}, "B")


@pytest.mark.parametrize("benchmark", ["timelens", "charades_sta", "activitynet_captions"])
def test_grounding_rounds_officially_and_not_plainly(benchmark: str) -> None:
    # 12 - 21 against 12.4 - 20.6: 8.2 of 9 seconds.
    assert value(benchmark, "12.4 - 20.6 seconds") == pytest.approx(8.2 / 9)
    assert value(benchmark, "12.4 - 20.6 seconds", "plain") == pytest.approx(1)
    rows = [(DOCS[benchmark], score(benchmark, DOCS[benchmark], "12.4 - 20.6"))]
    result = aggregate(benchmark, rows)
    assert result.metric == "mIoU" and result.value == pytest.approx(8.2 / 9)
    assert result.extra["mIoU unrounded"] == pytest.approx(1)
    assert result.extra["R1@0.7"] == 1


@pytest.mark.parametrize(
    ("reply", "span"),
    [
        ("The event happens in 0:12 - 0:20 seconds", [12, 20]),
        ("00:00:12.5 to 00:01:00", [12.5, 60]),
        ("from 12 to 20", [12, 20]),
        ("12.5s to 18s", None),
        ("between 12 and 20", [12, 20]),
        ("person 2 runs 12-20", [12, 20]),
        ("person 2 at 12", [2, 12]),
        ("12 — 20", [12, 20]),
        ("20 - 12.5", [20, 12.5]),
        ("at 12", None),
        ("1:05", [1, 5]),
        ("9" * 400 + " - 3", None),
    ],
)
def test_timelens_reading(reply: str, span: list[float] | None) -> None:
    assert score("timelens", DOCS["timelens"], reply).parsed == span


def test_reversed_and_empty_spans_score_zero_officially() -> None:
    assert value("timelens", "20 - 12.5") == 0
    assert value("timelens", "20.6 - 12.4", "plain") == pytest.approx(1)
    assert value("timelens", "3 - 3", span=[[3, 3]]) == 0
    # Rounding empties a short span.
    assert value("timelens", "5.6 - 6.4", span=[[5.6, 6.4]]) == 0


def test_grounding_truth_comes_in_several_layouts() -> None:
    for doc in ({"span": "[[4, 9]]"}, {"span": [4, 9]}, {"timestamp": "[4, 9]"},
                {"timestamps": [[4, 9], [20, 30]]}):  # fmt: skip
        assert score("timelens", doc, "4 - 9").value == 1
    with pytest.raises(ScoringError, match="none of span"):
        score("timelens", {"query": "q"}, "4 - 9")
    with pytest.raises(ScoringError, match="no span"):
        score("timelens", {"span": "soon"}, "4 - 9")


def test_vsibench_numbers() -> None:
    doc = {"question_type": "object_counting", "ground_truth": "4"}
    expected = {"4": 1, "4.": 1, "4 chairs": 1, "1e1": 0, "about 4": 0, "four": 0, "4chairs": 0,
                "5": 0.6, "3.6": 0.9, "nan": 0, "inf": 0}  # fmt: skip
    for reply, official in expected.items():
        assert score("vsibench", doc, reply).value == pytest.approx(official), reply
    worded = ("about 4", "four", "**4** chairs", "The answer is 4.", "~4", r"$\boxed{4\text{ m}}$")
    for reply in (*worded, "4%", "4.0 meters", "4m", '{"answer": 4}', "There are four of them."):
        assert score("vsibench", doc, reply, rule="plain").value == 1
    # An error of exactly a tenth is within .90 in the official floating-point numbers.
    ten = {"question_type": "room_size_estimation", "ground_truth": 10}
    assert score("vsibench", ten, "9").value == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("reply", "official", "plain"),
    [
        ("1,234.5", None, 1234.5), ("4,500", None, 4500), ("1e3", 1000, 1000), ("-4.5", -4.5, -4.5),
        # A comma that is not before three digits is no part of a number.
        ("4,5", None, None), ("4,5 m", None, None), ("1.234,5", None, None), ("1,2,3", None, None),
        ("4-5", None, None), ("4 to 5", 4, None), ("4.5.6", None, None), ("4..5", None, None),
        ("twenty-one", None, 21), ("two hundred and three", None, 203), ("three four", None, None),
        ("four and a half", None, None), ("a dozen", None, None), ("no", None, 0),
        ("There are no chairs.", None, 0), ("I have no idea", None, None),
        ("I cannot tell which one", None, None), ("one of the chairs", None, None),
        ("one", None, 1), ("", None, None), ("٤", 4, 4), ("4.5 (approx.)", 4.5, 4.5),
    ],
)  # fmt: skip
def test_numbers_with_commas_ranges_and_words(
    reply: str, official: float | None, plain: float | None
) -> None:
    doc = {"question_type": "object_abs_distance", "ground_truth": "4.5"}
    assert score("vsibench", doc, reply).parsed == official
    assert score("vsibench", doc, reply, rule="plain").parsed == plain


@pytest.mark.parametrize(
    ("reply", "official", "plain"),
    [
        ("0:12 - 0:20", [12, 20], [12, 20]), ("1:02:03 to 1:02:09.5", [3723, 3729.5],
                                              [3723, 3729.5]),
        ("12.5s to 18s", None, [12.5, 18]), ("12,5 - 20,5", [5, 20], [12.5, 20.5]),
        ("1,000 - 1,010", [0, 1], [1000, 1010]), ("1,000s to 1,010s.", [1, 1], [1000, 1010]),
        ("1,000.5 - 1,010.25 seconds", [0.5, 1], [1000.5, 1010.25]),
        ("0,500 - 0,750", [500, 0], [0.5, 0.75]), ("12,125 - 20,5", [125, 20], [12.125, 20.5]),
        ("[100,200]", [100, 200], [100, 200]),
        ("1 minute 5 seconds to 1 minute 20 seconds", [1, 5], [65, 80]),
        ("1m5s - 1m20s", None, [65, 80]), ("2 minutes to 3 minutes", [2, 3], [120, 180]),
        ("[12.0,20.0]", [12, 20], [12, 20]), ('{"start": 12, "end": 20}', [12, 20], [12, 20]),
        ("12 - 20 and 30 - 40", [12, 20], [12, 20]), ("20 - 12", [20, 12], [12, 20]),
        ("<think>3 - 5</think>12 - 20", [12, 20], [12, 20]), ("at 12 s", None, None),
    ],
)  # fmt: skip
def test_spans_of_time_in_many_forms(
    reply: str, official: list[float] | None, plain: list[float] | None
) -> None:
    assert score("timelens", DOCS["timelens"], reply).parsed == official
    assert score("timelens", DOCS["timelens"], reply, rule="plain").parsed == plain


def rows_of(benchmark: str, plan: Sequence[tuple[dict[str, Any], str]]) -> list[Any]:
    docs = [(DOCS[benchmark] | changes, reply) for changes, reply in plan]
    return [(doc, score(benchmark, doc, reply)) for doc, reply in docs]


def test_vsibench_is_the_mean_of_tasks() -> None:
    kinds = ["object_rel_direction_easy", "object_rel_direction_medium",
             "object_rel_direction_hard", "object_rel_distance", "route_planning",
             "obj_appearance_order"]  # fmt: skip
    plan = [({"question_type": kind}, "B") for kind in kinds]
    plan += [({"question_type": "object_rel_distance"}, "C")] * 3
    rows = rows_of("vsibench", plan)
    result = aggregate("vsibench", rows)
    assert result.value == pytest.approx((1 + 0.25 + 1 + 1) / 4)
    # Without the three direction levels the official code counts them as 0; plain does not.
    few = rows[3:]
    assert aggregate("vsibench", few).value == pytest.approx((0 + 0.25 + 1 + 1) / 4)
    assert aggregate("vsibench", few, rule="plain").value == pytest.approx((0.25 + 1 + 1) / 3)


def test_videomme_drops_unread_rows_and_shows_both_denominators() -> None:
    rows = rows_of("videomme", [({}, "B"), ({"duration": "long"}, "C"), ({}, "?"), ({}, "...")])
    result = aggregate("videomme", rows)
    assert (result.n, result.n_scored, result.dropped) == (4, 2, 2)
    assert result.value == 0.5
    assert result.extra["mean with dropped rows as 0"] == 0.25
    assert (result.extra["short"], result.extra["long"]) == (1, 0)


def test_videomme_v2_relevance_is_quadratic() -> None:
    for right, expected in enumerate((0, 1 / 16, 4 / 16, 9 / 16, 1)):
        replies = ["B"] * right + ["A"] * (4 - right)
        result = aggregate("videomme_v2", rows_of("videomme_v2", [({}, r) for r in replies]))
        assert result.value == pytest.approx(expected)
        assert result.extra["accuracy"] == pytest.approx(right / 4)


@pytest.mark.parametrize(
    ("structure", "replies", "expected"),
    [
        ("[1, 2, 3, 4]", "BBBA", 9 / 16),
        ("[1, 2, 3, 4]", "ABBB", 0),
        ("[1, [2, 3], 4]", "BABB", 4 / 12),
        ("[1, [2, 3], 4]", "BBAB", 4 / 12),
        ("[1, [2, 3], 4]", "BBBA", 7 / 12),
        ("[[1, 2], 3, 4]", "ABBB", 1 / 10),
        ("[[1, 2], 3, 4]", "BBAB", 2 / 10),
        ("[[1, 2], 3, 4]", "BBBB", 1),
    ],
)
def test_videomme_v2_logic_chains(structure: str, replies: str, expected: float) -> None:
    changes = {"group_type": "logic", "group_structure": structure}
    rows = rows_of("videomme_v2", [(changes, reply) for reply in replies])
    assert aggregate("videomme_v2", rows).value == pytest.approx(expected)


def test_videomme_v2_official_quirk_about_unreadable_answers() -> None:
    logic = {"group_type": "logic", "group_structure": "[1, 2, 3, 4]"}
    unread = rows_of("videomme_v2", [(logic, "?")] * 4)
    assert aggregate("videomme_v2", unread).value == 1
    assert aggregate("videomme_v2", unread, rule="plain").value == 0
    failed = rows_of("videomme_v2", [(logic, None)] * 4)
    assert aggregate("videomme_v2", failed).value == 0
    three = rows_of("videomme_v2", [({}, "B")] * 3 + [({}, "?")])
    assert aggregate("videomme_v2", three).value == pytest.approx(4 / 16)
    assert aggregate("videomme_v2", three, rule="plain").value == pytest.approx(9 / 16)


def test_videomme_v2_limited_runs_and_bad_documents() -> None:
    rows = rows_of("videomme_v2", [({}, "B")] * 6)
    result = aggregate("videomme_v2", rows)
    assert result.value == 1 and result.extra["incomplete groups"] == 1
    bad = rows_of("videomme_v2", [({"group_type": "logic", "group_structure": "?"}, "B")] * 4)
    with pytest.raises(ScoringError, match="group_structure"):
        aggregate("videomme_v2", bad)
    with pytest.raises(ScoringError, match="group_type"):
        aggregate("videomme_v2", rows_of("videomme_v2", [({"group_type": "x"}, "B")] * 4))


def _videomme_v2_plan() -> list[tuple[dict[str, Any], str]]:
    """Ten videos, every other one answered rightly."""
    return [
        ({"video_id": f"{v:03d}", "question_id": f"{v:03d}-{q}"}, "AB"[v % 2])
        for v in range(10)
        for q in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("rule", ["official", "plain"])
def test_videomme_v2_groups_never_mix_videos(rule: Any) -> None:
    plan = _videomme_v2_plan()
    assert aggregate("videomme_v2", rows_of("videomme_v2", plan), rule).value == 0.5
    torn = plan[:1] + plan[3:]  # the first video lacks two questions
    result = aggregate("videomme_v2", rows_of("videomme_v2", torn), rule)
    assert (result.value, result.extra["incomplete groups"]) == (pytest.approx(5 / 9), 1)
    # Two shards took turns; a retried question came last.
    mixed = plan[1::2] + plan[2::2] + plan[:1]
    result = aggregate("videomme_v2", rows_of("videomme_v2", mixed), rule)
    assert result.value == 0.5 and "incomplete groups" not in result.extra


@pytest.mark.parametrize("rule", ["official", "plain"])
def test_videomme_v2_chains_follow_the_questions_and_not_the_order_of_answers(rule: Any) -> None:
    logic = {"group_type": "logic", "group_structure": "[1, 2, 3, 4]"}
    chain = [(logic | {"question_id": f"001-{q}"}, r) for q, r in zip((1, 2, 3, 4), "BBAB",
                                                                     strict=True)]  # fmt: skip
    for order in (chain, chain[::-1], chain[2:] + chain[:2]):
        found = aggregate("videomme_v2", rows_of("videomme_v2", order), rule)
        assert found.value == pytest.approx(4 / 16)


def test_mlvu_is_macro_over_the_tasks_present() -> None:
    plan = [({"task_type": "ego"}, "B")] * 3 + [({"task_type": "count"}, "A")]
    result = aggregate("mlvu", rows_of("mlvu", plan))
    assert result.value == 0.5 and result.metric == "M-Avg"
    assert result.extra["accuracy over questions"] == 0.75


VARIED: dict[str, list[dict[str, Any]]] = {
    "videomme_v2": [
        {"video_id": str(i // 4), "question_id": f"{i // 4}-{i % 4 + 1}",
         "group_type": ("relevance", "logic")[i // 4 % 2], "group_structure": "[1, [2, 3], 4]"}
        for i in range(24)
    ],
    "vsibench": [{"question_type": f"object_rel_direction_{one}"} for one in ("easy", "hard")]
    + [{"question_type": one} for one in ("object_rel_distance", "route_planning")],
    "mlvu": [{"task_type": one} for one in ("ego", "count", "count")],
    "qvhighlights": [{"relevant_windows": one} for one in ([[10, 20]], [], [[5, 45]])],
}  # fmt: skip


@pytest.mark.parametrize("rule", ["official", "plain"])
@pytest.mark.parametrize("benchmark", DOCS)
def test_the_headline_is_what_its_units_combine_to(benchmark: str, rule: Any) -> None:
    """Reports resample the units; what they combine to must be what `aggregate` says."""
    changes = VARIED.get(benchmark, [{}])
    replies = ["B", "C", "hm", "4 - 9 s", "[[10, 20, 0.9], [12, 44, 0.5]]", "B", "B"]
    rows = []
    for i in range(24):
        doc = DOCS[benchmark] | changes[i % len(changes)]
        rows.append((doc, score(benchmark, doc, replies[i % 7], rule=rule)))
    for part in (rows, rows[4:16], rows[:3], []):
        expected = aggregate(benchmark, part, rule=rule).value
        assert headline(benchmark).value(part, rule) == pytest.approx(expected, abs=1e-12)


def test_lvbench_question_counts_in_each_of_its_types() -> None:
    plan = [({"question_type": ["event", "summary"]}, "B"), ({"question_type": ["event"]}, "A")]
    result = aggregate("lvbench", rows_of("lvbench", plan))
    assert result.value == 0.5
    assert (result.by_family["event"].value, result.by_family["event"].n) == (0.5, 2)
    assert result.by_family["summary"].value == 1


def test_nextqa_groups() -> None:
    plan = [({"type": t}, r) for t, r in (("TP", "B"), ("TN", "A"), ("CW", "B"), ("DO", "A"))]
    result = aggregate("nextqa", rows_of("nextqa", plan))
    assert (result.by_family["TN"].value, result.by_family["TN"].n) == (0.5, 2)
    assert result.extra == {"Acc_C": 1, "Acc_T": 0.5, "Acc_D": 0}


def test_motionbench_counts_hidden_answers_officially() -> None:
    plan = [({}, "B"), ({}, "A"), ({"answer": "NA"}, "B"), ({"answer": "NA"}, "A")]
    rows = rows_of("motionbench", plan)
    result = aggregate("motionbench", rows)
    assert result.value == 0.25 and result.no_truth == 2
    assert result.extra["accuracy where the answer is public"] == 0.5
    plain = [(doc, score("motionbench", doc, r, rule="plain")) for (doc, _), (_, r) in
             zip(rows, plan, strict=True)]  # fmt: skip
    assert aggregate("motionbench", plain, rule="plain").value == 0.5


def test_dsi_bench_groups_views() -> None:
    right, wrong = "<answer>B</answer>", "<answer>C</answer>"
    views = ("std", "reverse", "hflip", "reverse_hflip")
    marks = ((right, right), (right, wrong), (right, wrong), (wrong, right))
    plan = [({"aug": v}, r) for v, two in zip(views, marks, strict=True) for r in two]
    result = aggregate("dsi_bench", rows_of("dsi_bench", plan))
    assert result.value == pytest.approx(5 / 8)
    assert result.extra["group-wise accuracy"] == 0.5
    unnamed = rows_of("dsi_bench", [({"aug": None}, r) for _, r in plan])
    assert aggregate("dsi_bench", unnamed).extra["group-wise accuracy"] == 0.5
    named = [({"aug": None, "relative_path": f"{i}.mp4", "question": "q"}, marks[v][i])
             for i in range(2) for v in range(4)]  # fmt: skip
    assert aggregate("dsi_bench", rows_of("dsi_bench", named)).extra["group-wise accuracy"] == 0.5
    one_view = rows_of("dsi_bench", [({"aug": "std"}, right)] * 8)
    assert aggregate("dsi_bench", one_view).extra["group-wise accuracy"] is None


@pytest.mark.parametrize("fields", [("row",), ("relative_path", "question")])
def test_dsi_bench_pairs_only_views_of_one_question(fields: tuple[str, ...]) -> None:
    """A question without a view counts nowhere, and lends its views to no other question."""
    right, wrong = "<answer>B</answer>", "<answer>C</answer>"
    views = ("std", "reverse", "hflip", "reverse_hflip")
    place = [{"row": i, "relative_path": f"{i}.mp4", "question": f"q{i}"} for i in range(3)]
    asked = [("std", 0, wrong), *((view, 1, right) for view in views[:3]), (views[3], 1, wrong)]
    # Question 2 lacks the first view, so that every view has one more or less.
    asked += [(view, 2, right) for view in views[1:]]
    plan = [({"aug": v, **{f: place[i][f] for f in fields}}, r) for v, i, r in asked]
    for order in (plan, plan[::-1], sorted(plan, key=lambda one: views.index(one[0]["aug"]))):
        extra = aggregate("dsi_bench", rows_of("dsi_bench", order)).extra
        assert extra == {"group-wise accuracy": 1, "incomplete groups": 2}
    whole = aggregate("dsi_bench", rows_of("dsi_bench", plan[1:5])).extra
    assert whole == {"group-wise accuracy": 1}


def test_dsi_bench_pairs_by_place_what_names_no_question() -> None:
    """Documents of older runs: all views equally long, or nobody knows what is missing."""
    views = ("std", "reverse", "hflip", "reverse_hflip")
    plan = [({"aug": v}, "<answer>B</answer>") for v in views for _ in range(2)]
    assert aggregate("dsi_bench", rows_of("dsi_bench", plan)).extra["group-wise accuracy"] == 1
    extra = aggregate("dsi_bench", rows_of("dsi_bench", plan[1:])).extra
    assert extra == {"group-wise accuracy": None, "incomplete groups": 2}
    unnamed = [({"aug": None}, reply) for _, reply in plan[1:]]
    extra = aggregate("dsi_bench", rows_of("dsi_bench", unnamed)).extra
    assert extra == {"group-wise accuracy": None, "incomplete groups": 2}


def test_qvhighlights_r1_takes_the_first_listed_window() -> None:
    windows = [[12, 20, 0.1], [40, 60, 0.9]]
    assert value("qvhighlights", windows) == pytest.approx(0.8)
    assert value("qvhighlights", windows, "plain") == 1
    assert value("qvhighlights", json.dumps(windows)) == pytest.approx(0.8)


def test_qvhighlights_average_precision_by_hand() -> None:
    doc = DOCS["qvhighlights"]
    # By confidence: a hit, a miss, a hit. Precision 1, 1/2, 2/3; recall steps at ranks 1 and 3.
    windows = [[100, 110, 0.5], [10, 20, 0.9], [40, 60, 0.2]]
    rows = [(doc, score("qvhighlights", doc, windows))]
    result = aggregate("qvhighlights", rows)
    assert result.metric == "mAP"
    assert result.value == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert result.extra["R1@0.5"] == 0
    assert result.extra["mAP short"] == pytest.approx(1)
    assert result.extra["mAP middle"] == pytest.approx(1 / 3)
    assert result.extra["mAP long"] is None


def test_qvhighlights_counts_only_ten_listed_windows() -> None:
    doc = {"relevant_windows": [[10, 20]], "qid": 1}
    windows = [[100 + i, 101 + i, 0.5] for i in range(10)] + [[10, 20, 0.9]]
    rows = [(doc, score("qvhighlights", doc, windows))]
    assert aggregate("qvhighlights", rows).value == 0
    plain = [(doc, score("qvhighlights", doc, windows, rule="plain"))]
    assert aggregate("qvhighlights", plain, rule="plain").value == 1


@pytest.mark.parametrize(
    "windows",
    [
        [[10, 20, 0.9]], ((10, 20),), [10, 20, 0.9], np.array([[10, 20, 0.9]]),
        "[[10, 20, 0.9]]", "```json\n[[10, 20, 0.9], [70, 80, 0.1]]\n```", "[10, 20]",
        "Scene [1]: [[10, 20, 0.5]]", "10 - 20 seconds, then 70 - 80", "from 10s to 20.0 s",
        "[10, 20], [70, 80]", "(10, 20)", "0:10 - 0:20, 1:10 - 1:20", "[[10, 20, 0.9], [70, 8",
        '[{"start": 10, "end": 20}]', "[ [10, 20.0, 0.9] ]", '{"windows": [[10, 20]]}',
    ],
)  # fmt: skip
def test_ranked_windows_are_read_from_lists_json_and_words(windows: Any) -> None:
    for rule in ("official", "plain"):
        assert value("qvhighlights", windows, rule) == 1


@pytest.mark.parametrize(
    "windows",
    [[], "nothing", "[1, 2", [["a", 1, 2]], [[float("nan"), 1, 2]], [[1]], {"a": 1}, 3, [None],
     [[10**400, 1, 1]], "[" * 10_000],
)  # fmt: skip
def test_invalid_windows_are_unreadable(windows: Any) -> None:
    got = score("qvhighlights", DOCS["qvhighlights"], windows)
    assert got == Score(0.0, None, Outcome.UNREADABLE)
    aggregate("qvhighlights", [(DOCS["qvhighlights"], got)])


def test_windows_for_a_text_benchmark_are_unreadable() -> None:
    assert score("videomme", DOCS["videomme"], [[1, 2, 3]]).outcome is Outcome.UNREADABLE


def test_documents_without_their_fields_are_named() -> None:
    with pytest.raises(ScoringError, match="answer"):
        score("videomme", {"id": "x"}, "B")
    with pytest.raises(ScoringError, match="none of"):
        score("mvbench", DOCS["mvbench"] | {"answer": "purple"}, "B")
    with pytest.raises(ScoringError, match="question_type"):
        score("vsibench", DOCS["vsibench"] | {"question_type": "smell"}, "B")
    with pytest.raises(ScoringError, match="no number"):
        score("vsibench", {"question_type": "object_counting", "ground_truth": "many"}, "4")


PIECES = st.lists(
    st.sampled_from(
        ["A", "b", "(C)", "B)", "answer is", "Answer:", "<think>", "</think>", "<answer>", "red",
         "</answer>", "boxed{", "}", "`", "``", "4", "-", "9.5", "1:02", "to", " ", "\n", "</s>",
         "yes", "no", ".", ",", ") ", ": ", "Caption A", '"answer":', "1e5", "[[1,2,3]]", "٣"]
    ),
    max_size=24,
).map("".join)  # fmt: skip


THINKING = ["{}", "<think>It is A or C.</think>{}", "<think>\nA\n</think>\n\n{}", "C?</think> {}"]
STATED = ["{}", "The answer is {}", "the answer is {}.", "Answer: {}", "Final answer: ({})", "({})"]
MARKED = [
    "{}",
    "**{}**",
    r"\boxed{{{}}}",
    r"$\boxed{{\text{{{}}}}}$",
    "<answer>{}</answer>",
    "`{}`",
]
PROSE = ["", ".", "\n", ".\n\nThe picture shows why.", "<|im_end|>", "</s>", " "]


@settings(max_examples=300, deadline=None)
@given(
    letter=st.sampled_from("ABCD"),
    thinking=st.sampled_from(THINKING),
    stated=st.sampled_from(STATED),
    marked=st.sampled_from(MARKED),
    prose=st.sampled_from(PROSE),
    lower=st.booleans(),
)
def test_any_dress_of_a_letter_is_that_letter_to_a_plain_reader(
    letter: str, thinking: str, stated: str, marked: str, prose: str, lower: bool
) -> None:
    said = letter.lower() if lower else letter
    # A bare lower-case a before prose is a word, not an answer.
    if lower and stated == marked == "{}" and "picture" in prose:
        return
    reply = thinking.format(stated.format(marked.format(said)) + prose)
    for benchmark in ("videomme", "mlvu", "mmsi_bench", "tomato", "nextqa"):
        found = score(benchmark, DOCS[benchmark], reply, rule="plain")
        assert found.parsed == letter, (benchmark, reply)
        assert found.value == float(letter == "B")


@settings(max_examples=400, deadline=None)
@given(reply=PIECES)
def test_vrbench_and_timelens_read_what_lmms_evals_ports_of_the_official_code_read(
    reply: str,
) -> None:
    from lmms_eval.tasks.timelens.utils import extract_time
    from lmms_eval.tasks.vrbench.utils import extract_mcq_answer

    text = strip_thinking(reply)
    if text is None:
        return
    assert score("vrbench", DOCS["vrbench"], reply).parsed == extract_mcq_answer(text)
    spans = extract_time(text)
    found = score("timelens", DOCS["timelens"], reply).parsed
    assert found == (list(spans[0]) if spans else None)


@settings(max_examples=250, deadline=None)
@given(
    reply=st.one_of(st.text(max_size=80), PIECES),
    benchmark=st.sampled_from(sorted(DOCS)),
    rule=st.sampled_from(["official", "plain"]),
)
def test_arbitrary_text_never_raises_nor_draws(reply: str, benchmark: str, rule: Any) -> None:
    state = random.getstate()
    doc = DOCS[benchmark]
    first = score(benchmark, doc, reply, rule=rule)
    assert score(benchmark, doc, reply, rule=rule) == first
    assert random.getstate() == state
    assert first.value is None or 0 <= first.value <= 1
    if first.outcome is Outcome.UNREADABLE:
        assert first.value == 0
    assert Score.from_dict(json.loads(json.dumps(first.as_dict()))) == first
    result = aggregate(benchmark, [(doc, first)] * 4, rule=rule)
    assert result.n == 4
    json.dumps(result.as_dict(), allow_nan=False)


FILLERS = ["A", "1", "1.", "B ", "(", "answer is ", "\\boxed{", "<answer>", "1:00 ", "1 - ", "a.",
           "`", ") ", "Answer:", "-1 ", "\t", "answer is A, ", "not A or ",
           "A, ", "A or ", "1,000 - ", ",000"]  # fmt: skip


@pytest.mark.parametrize("filler", FILLERS)
def test_long_replies_take_linear_time(filler: str) -> None:
    reply = filler * (8_000 // len(filler)) + "x"
    start = time.process_time()
    for benchmark, doc in DOCS.items():
        for rule in ("official", "plain"):
            score(benchmark, doc, reply, rule=rule)
    assert time.process_time() - start < 5
