"""Run with: pytest tests/tasks/test_scoring.py -q."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvideo3.tasks.scoring import (
    Outcome,
    Score,
    ScoringError,
    aggregate,
    benchmark_names,
    score,
    world,
)
from internvideo3.tasks.scoring.averages import length_band
from internvideo3.tasks.scoring.numeric import iou, mean_relative_accuracy
from internvideo3.tasks.scoring.text import strip_thinking
from internvideo3.tasks.world.questions import FAMILIES
from internvideo3.tasks.world.suites import SUITES, draw_suite


def choice(**changes: Any) -> dict[str, Any]:
    doc = {
        "id": "world_long/000001",
        "family": "order",
        "length_s": 12.0,
        "answer_type": "choice",
        "options": ["green star", "red circle", "blue square", "red"],
        "answer": "red circle",
        "answer_letter": "B",
    }
    return doc | changes


def number(family: str = "count", answer: str = "3") -> dict[str, Any]:
    return choice(answer_type="number", options=None, family=family, answer=answer)


def span(answer: str = "4 - 9") -> dict[str, Any]:
    return choice(answer_type="span", options=None, family="ground", answer=answer)


SRC = Path(__file__).parents[2] / "src"
STRICT_RIGHT = ["B", "b", "(B)", "B.", " B) ", "red circle", "Red  Circle.", "B. red circle",
                "(B) red circle", "<think>A?</think>\nB", "**B**", "B<|im_end|>", r"\boxed{B}",
                "A is wrong</think> B"]  # fmt: skip


@pytest.mark.parametrize("reply", STRICT_RIGHT)
def test_choice_is_read_by_both_rules(reply: str) -> None:
    for rule in ("official", "plain"):
        assert score("world_long", choice(), reply, rule=rule) == Score(1.0, "B", Outcome.ANSWERED)


WORDED = {
    "The answer is B because A cat leaves.": "B",
    "It is the red circle, not the green star? No: Answer: (b).": "B",
    "I think the correct option is C.": "C",
    "A red circle appears": "B",
    "Not A, B": "B",
    "a dog": None,
    "I do not know": None,
    "A or B": None,
    "green star and red circle": None,
    r"so \(\boxed{\text{C}}\) it is": "C",
    "<answer>d</answer>": "D",
    "B. blue square": None,
    "E": None,
    "": None,
    "...": None,
}


@pytest.mark.parametrize(("reply", "letter"), WORDED.items())
def test_plain_reads_what_a_careful_reader_would(reply: str, letter: str | None) -> None:
    got = score("world_long", choice(), reply, rule="plain")
    assert got.parsed == letter
    assert got.outcome == (Outcome.UNREADABLE if letter is None else Outcome.ANSWERED)


@pytest.mark.parametrize("reply", ["The answer is B", "B because", "x", "B. blue square", "F"])
def test_official_world_rule_reads_only_bare_answers(reply: str) -> None:
    assert score("world_long", choice(), reply) == Score(0.0, None, Outcome.UNREADABLE)


def test_wrong_choice_is_answered_and_zero() -> None:
    assert score("world_long", choice(), "A") == Score(0.0, "A", Outcome.ANSWERED)
    assert score("world_long", choice(), "red") == Score(0.0, "D", Outcome.ANSWERED)


@pytest.mark.parametrize("rule", ["official", "plain"])
def test_unclosed_thinking_is_unreadable(rule: Any) -> None:
    got = score("world_long", choice(), "<think>I see B. The answer is B", rule=rule)
    assert got == Score(0.0, None, Outcome.UNREADABLE)


@pytest.mark.parametrize(
    ("reply", "left"),
    [
        ("plain text ", "plain text "),
        ("<think>x</think> \n B ", "B "),
        ("<THINK>x</THINK>B", "B"),
        ("<think>a</think><analysis>b</analysis>C", "C"),
        ("<think>a <think>b</think> c</think>D", "D"),
        ("<think>a</think>B<think>c</think>", "B"),
        ("<think>open", None),
        ("done</think>E", "E"),
    ],
)
def test_strip_thinking(reply: str, left: str | None) -> None:
    assert strip_thinking(reply) == left


def test_counts_are_exact_and_distances_relative() -> None:
    assert score("world_spatial", number(), "3").value == 1
    assert score("world_spatial", number(), "3.0 circles").value == 1
    assert score("world_spatial", number(), "4").value == 0
    assert score("world_spatial", number("distance", "4.0"), "4.0").value == 1
    # 25 % off: right at the thresholds .50, .55 … .75, six of ten.
    assert score("world_spatial", number("distance", "4.0"), "5").value == pytest.approx(0.6)
    assert score("world_spatial", number("distance", "4.0"), "9").value == 0


@pytest.mark.parametrize(
    ("reply", "official", "plain"),
    [
        ("3", 3, 3),
        ("3.", 3, 3),
        ("about 3", None, 3),
        ("three", None, 3),
        ("There are 2 red ones; the answer is 3", None, 3),
        ("2 or 3", 2, None),
        ("1e999", None, None),
        ("nan", None, None),
        ("9" * 5000, None, None),
        ("-1,234.5 cm", None, -1234.5),
    ],
)
def test_numbers_are_read(reply: str, official: float | None, plain: float | None) -> None:
    assert score("world_spatial", number(), reply).parsed == official
    assert score("world_spatial", number(), reply, rule="plain").parsed == plain


@pytest.mark.parametrize(
    ("reply", "official", "plain"),
    [
        ("4 - 9", 1.0, 1.0),
        ("from 4s to 9s", 1.0, 1.0),
        ("4.0–9.0 seconds", 1.0, 1.0),
        ("00:04 - 00:09", 1.0, 1.0),
        ("6 - 9", 0.6, 0.6),
        ("9 - 4", 0.0, 1.0),
        ("12 - 20", 0.0, 0.0),
        ("start: 4, end: 9", 1.0, 1.0),
    ],
)
def test_spans_by_iou(reply: str, official: float, plain: float) -> None:
    assert score("world_grounding", span(), reply).value == pytest.approx(official)
    assert score("world_grounding", span(), reply, rule="plain").value == pytest.approx(plain)


def test_span_without_two_numbers_is_unreadable() -> None:
    assert score("world_grounding", span(), "at 4").outcome == Outcome.UNREADABLE


def test_iou_and_relative_accuracy_closed_forms() -> None:
    assert iou((0, 10), (5, 15)) == pytest.approx(1 / 3)
    assert iou((0, 10), (10, 20)) == 0
    assert iou((0, 0), (0, 0)) == 0
    assert mean_relative_accuracy(0, 0) == 1
    assert mean_relative_accuracy(1, 0) == 0
    assert mean_relative_accuracy(-4, 4) == 0


DOCS = [choice(), number(), number("distance", "4.5"), span()]


@settings(max_examples=150, deadline=None)
@given(
    reply=st.text(max_size=200),
    doc=st.sampled_from(DOCS),
    rule=st.sampled_from(["official", "plain"]),
)
def test_arbitrary_text_never_raises_and_is_deterministic(reply: str, doc: Any, rule: Any) -> None:
    state = random.getstate()
    first = score("world_long", doc, reply, rule=rule)
    assert random.getstate() == state
    assert score("world_long", doc, reply, rule=rule) == first
    assert first.value is not None and 0 <= first.value <= 1
    assert Score.from_dict(json.loads(json.dumps(first.as_dict()))) == first


PIECES = st.lists(
    st.sampled_from(
        ["A", "b", "(C)", "answer is", "<think>", "</think>", "red circle", "**", r"\boxed{", "}",
         "4", "-", "9.5", "1:02", "not", "<answer>", "</answer>", "\n", " ", "<script>", "e5", "_"]
    ),
    max_size=30,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(pieces=PIECES, doc=st.sampled_from(DOCS), rule=st.sampled_from(["official", "plain"]))
def test_answer_like_text_never_raises(pieces: list[str], doc: Any, rule: Any) -> None:
    got = score("world_long", doc, "".join(pieces), rule=rule)
    assert got.value is not None and 0 <= got.value <= 1
    assert (got.parsed is None) == (got.outcome is Outcome.UNREADABLE)


@pytest.mark.parametrize("filler", ["A", "(", "answer is ", "\\boxed{", "<think>", "1,", "4 - ",
                                    "red circle ", "<answer>", "*_"])  # fmt: skip
def test_long_replies_are_read_in_linear_time(filler: str) -> None:
    reply = filler * (10_000 // len(filler))
    start = time.process_time()
    for doc in DOCS:
        for rule in ("official", "plain"):
            score("world_long", doc, reply, rule=rule)
    assert time.process_time() - start < 5


def test_failed_samples_are_counted_not_dropped() -> None:
    rows = [
        (choice(), score("world_long", choice(), "B")),
        (choice(), score("world_long", choice(), None)),
        (choice(length_s=40.0), score("world_long", choice(), "??")),
        (choice(family="count", length_s=40.0), score("world_long", choice(), "A")),
    ]
    result = aggregate("world_long", rows)
    assert (result.value, result.n, result.n_scored) == (0.25, 4, 4)
    assert (result.unreadable, result.errors, result.metric) == (1, 1, "accuracy")
    assert result.by_family["order"].value == pytest.approx(1 / 3)
    assert result.by_family["order"].n == 3
    assert list(result.by_length) == ["8-16", "32-64"]
    json.dumps(result.as_dict(), allow_nan=False)


def test_grounding_result_has_recall() -> None:
    doc = span()
    rows = [(doc, score("world_grounding", doc, r)) for r in ("4 - 9", "6 - 9", "20 - 30")]
    result = aggregate("world_grounding", rows)
    assert result.metric == "mIoU"
    assert result.value == pytest.approx(1.6 / 3)
    assert result.extra["R1@0.5"] == pytest.approx(2 / 3)
    assert result.extra["R1@0.7"] == pytest.approx(1 / 3)


def test_empty_suite_has_no_value() -> None:
    result = aggregate("world_long", [])
    assert result.value is None and result.n == 0


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(ScoringError, match="world_long"):
        score("world_lnog", choice(), "A")
    with pytest.raises(ScoringError, match="official, plain"):
        score("world_long", choice(), "A", rule="strict")  # type: ignore[arg-type]
    with pytest.raises(ScoringError, match="answer_type"):
        score("world_long", choice(answer_type="essay"), "A")
    with pytest.raises(ScoringError, match="options"):
        score("world_long", choice(options=None), "A")
    with pytest.raises(ScoringError, match="span"):
        score("world_grounding", span("soon"), "4 - 9")


def test_length_bands() -> None:
    assert [length_band(s) for s in (2, 8, 8.1, 16, 100, 128, 4000)] == [
        "0-8", "0-8", "8-16", "8-16", "64-128", "64-128", "128+"]  # fmt: skip


def test_every_world_suite_and_measured_family_is_known() -> None:
    assert set(SUITES) == set(world.SUITES)
    assert set(SUITES) <= set(benchmark_names())
    assert set(FAMILIES) >= world.RELATIVE_FAMILIES


def test_every_world_question_is_right_with_its_own_answer() -> None:
    for suite in SUITES.values():
        spec, asked = next(draw_suite(suite, limit_videos=1))
        assert spec.length_s > 0
        for question in asked:
            doc = {"family": question.family, "answer_type": question.answer_type,
                   "options": question.options, "answer": question.answer}  # fmt: skip
            for rule in ("official", "plain"):
                got = score(suite.name, doc, question.answer, rule=rule)
                assert got.value == 1, (question, rule)
            if question.answer_letter:
                assert score(suite.name, doc, question.answer_letter).value == 1


def test_import_is_light() -> None:
    code = (
        "import sys, time; t = time.process_time(); import internvideo3.tasks.scoring;"
        "heavy = {'torch', 'numpy', 'transformers', 'lmms_eval'} & set(sys.modules);"
        "print(time.process_time() - t, heavy or 'none')"
    )
    seconds, heavy = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(SRC)},
    ).stdout.split(maxsplit=1)
    assert heavy.strip() == "none"
    assert float(seconds) < 0.3
