"""Formulas of the benchmarks' averages, computed a second time in another way.

Run with: pytest tests/tasks/test_averages.py -q. Definitions are those of the official code that
each scorer's file cites; here they are written out with numpy, without a line of ours.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvideo3.tasks.scoring import aggregate, score
from internvideo3.tasks.scoring.numeric import mean_relative_accuracy

SECONDS = st.integers(0, 3000).map(lambda tenths: tenths / 20)
SPANS = st.tuples(SECONDS, SECONDS).map(sorted).filter(lambda span: span[0] < span[1])


def rows_of(name: str, docs: list[dict[str, Any]], replies: list[Any], rule: Any) -> list[Any]:
    return [(d, score(name, d, r, rule=rule)) for d, r in zip(docs, replies, strict=True)]


@settings(max_examples=60, deadline=None)
@given(pairs=st.lists(st.tuples(SPANS, SPANS), min_size=1, max_size=12))
def test_timelens_with_and_without_rounding(pairs: list[Any]) -> None:
    docs = [{"span": [list(truth)], "query": "q"} for truth, _ in pairs]
    replies = [f"{start} - {end} seconds" for _, (start, end) in pairs]
    result = aggregate("timelens", rows_of("timelens", docs, replies, "official"))
    truths_N2 = np.array([truth for truth, _ in pairs])
    said_N2 = np.array([said for _, said in pairs])

    def overlaps(said_N2: Any) -> Any:
        low, high = np.minimum(said_N2, truths_N2), np.maximum(said_N2, truths_N2)
        return np.maximum(low[:, 1] - high[:, 0], 0) / (high[:, 1] - low[:, 0])

    for suffix, values_N in (("", overlaps(np.rint(said_N2))), (" unrounded", overlaps(said_N2))):
        mean = result.value if not suffix else result.extra["mIoU unrounded"]
        assert mean == pytest.approx(values_N.mean())
        for threshold in (0.3, 0.5, 0.7):
            clear = np.abs(values_N - threshold) > 1e-9
            if clear.all():
                recall = (values_N >= threshold).mean()
                assert result.extra[f"R1@{threshold}{suffix}"] == pytest.approx(recall)


def test_halves_are_rounded_to_even_seconds_as_python_does() -> None:
    doc = {"span": [[0, 100]]}
    found = {f"{a} - {b}": score("timelens", doc, f"{a} - {b}").value
             for a, b in ((0.5, 10.5), (1.5, 11.5), (2.5, 12.5))}  # fmt: skip
    assert list(found.values()) == pytest.approx([0.10, 0.10, 0.10])
    assert score("timelens", {"span": [[0, 10]]}, "0.5 - 10.5").value == 1
    assert score("timelens", {"span": [[2, 12]]}, "1.5 - 11.5").value == 1


WINDOWS = st.lists(SPANS, min_size=1, max_size=4)
RANKED = st.lists(st.tuples(SPANS, st.integers(1, 99)), min_size=1, max_size=12,
                  unique_by=lambda window: window[1])  # fmt: skip


def iou_matrix(a_M2: Any, b_K2: Any) -> Any:
    """Intersection over the sum of lengths less the intersection."""
    low = np.maximum(a_M2[:, None, 0], b_K2[None, :, 0])
    high = np.minimum(a_M2[:, None, 1], b_K2[None, :, 1])
    inter = np.clip(high - low, 0, None)
    lengths = np.diff(a_M2)[:, 0][:, None] + np.diff(b_K2)[:, 0][None]
    return inter / (lengths - inter)


def average_precision(ious_MK: Any, threshold: float) -> float:
    """ActivityNet's detection AP: greedy by rank, precision made monotone, area over recall."""
    taken: set[int] = set()
    hits = []
    for row_K in ious_MK:
        order = np.argsort(row_K, kind="stable")[::-1]
        free = [int(k) for k in order if row_K[k] >= threshold and int(k) not in taken]
        taken |= set(free[:1])
        hits.append(bool(free))
    hits_M = np.array(hits, float)
    recall = np.concatenate([[0], np.cumsum(hits_M) / ious_MK.shape[1], [1]])
    precision = np.concatenate([[0], np.cumsum(hits_M) / np.arange(1, len(hits) + 1), [0]])
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float(
        sum((b - a) * p for (a, b), p in zip(pairwise(recall), precision[1:], strict=True))
    )


@settings(max_examples=120, deadline=None)
@given(queries=st.lists(st.tuples(WINDOWS, RANKED), min_size=1, max_size=4))
def test_qvhighlights_map_and_r1(queries: list[Any]) -> None:
    docs = [{"qid": i, "relevant_windows": [list(w) for w in truths]}
            for i, (truths, _) in enumerate(queries)]  # fmt: skip
    replies = [[[*span, confidence / 100] for span, confidence in said] for _, said in queries]
    result = aggregate("qvhighlights", rows_of("qvhighlights", docs, replies, "official"))
    thresholds = [round(0.5 + 0.05 * i, 2) for i in range(10)]
    table, first = [], []
    for doc, listed in zip(docs, replies, strict=True):
        truths_K2 = np.array(doc["relevant_windows"], float)
        ranked = np.array(sorted(listed[:10], key=lambda window: -window[2]))
        ious_MK = iou_matrix(ranked[:, :2], truths_K2)
        table.append([average_precision(ious_MK, t) for t in thresholds])
        top_2 = np.array(listed[0][:2])
        best_2 = truths_K2[iou_matrix(top_2[None], truths_K2)[0].argmax()]
        hull = max(top_2[1], best_2[1]) - min(top_2[0], best_2[0])
        first.append(max(0.0, min(top_2[1], best_2[1]) - max(top_2[0], best_2[0])) / hull)
    assert result.value == pytest.approx(np.mean(table))
    assert result.extra["mAP@0.5"] == pytest.approx(np.mean([row[0] for row in table]))
    assert result.extra["mAP@0.75"] == pytest.approx(np.mean([row[5] for row in table]))
    for threshold in (0.5, 0.7):
        expected = np.mean(np.array(first) >= threshold)
        assert result.extra[f"R1@{threshold}"] == pytest.approx(expected)


def test_a_window_that_overlaps_two_true_ones_alike_takes_the_later() -> None:
    doc = {"relevant_windows": [[10, 20], [20, 30]]}
    windows = [[10, 30, 0.9], [10, 20, 0.5]]
    rows = [(doc, score("qvhighlights", doc, windows))]
    assert aggregate("qvhighlights", rows).extra["mAP@0.5"] == 1


POINTS = {"[1, 2, 3, 4]": (0, 1, 4, 9, 16), "[1, [2, 3], 4]": (0, 1, 4, 7, 12),
          "[[1, 2], 3, 4]": (0, 1, 2, 5, 10)}  # fmt: skip
"""Points by length of the chain, of as many as the last."""


def chain(marks: tuple[bool, ...], structure: str) -> int:
    """How many steps of the chain are right; one of two parallel questions is one step."""
    steps = next((i for i, mark in enumerate(marks) if not mark), 4)
    parallel = {"[1, [2, 3], 4]": (1, 2), "[[1, 2], 3, 4]": (0, 1)}.get(structure)
    return steps + (parallel is not None and steps == parallel[0] and marks[parallel[1]])


GROUPS = st.lists(
    st.tuples(st.sampled_from(["relevance", *POINTS]), st.tuples(*[st.booleans()] * 4)),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(groups=GROUPS)
def test_videomme_v2_group_score(groups: list[Any]) -> None:
    docs, replies, expected = [], [], []
    for number, (kind, marks) in enumerate(groups):
        for question, mark in enumerate(marks, start=1):
            docs.append({"video_id": str(number), "question_id": f"{number}-{question}",
                         "options": "A. x\nB. y", "answer": "B", "level": number % 3 + 1,
                         "group_type": "relevance" if kind == "relevance" else "logic",
                         "group_structure": kind})  # fmt: skip
            replies.append("B" if mark else "A")
        points = POINTS.get(kind, (0, 1, 4, 9, 16))
        right = sum(marks) if kind == "relevance" else chain(marks, kind)
        expected.append(points[right] / points[-1])
    for rule in ("official", "plain"):
        result = aggregate("videomme_v2", rows_of("videomme_v2", docs, replies, rule), rule)
        assert result.value == pytest.approx(np.mean(expected))
        for level in (1, 2, 3):
            part = expected[level - 1 :: 3]
            found = result.extra[f"level_{level}"]
            assert found == (pytest.approx(np.mean(part)) if part else None)


def test_a_group_score_needs_whole_groups() -> None:
    doc = {"video_id": "1", "question_id": "1-1", "options": "A. x\nB. y", "answer": "B",
           "group_type": "relevance", "group_structure": "None", "level": 1.0}  # fmt: skip
    rows = rows_of("videomme_v2", [doc] * 3, ["B"] * 3, "official")
    result = aggregate("videomme_v2", rows)
    assert (result.value, result.extra["accuracy"]) == (None, 1)
    whole = aggregate("videomme_v2", rows_of("videomme_v2", [doc] * 4, ["B"] * 4, "official"))
    assert (whole.value, whole.extra["level_1"]) == (1, 1)


@given(st.floats(-50, 50), st.floats(0.01, 50))
def test_mean_relative_accuracy_is_the_share_of_ten_thresholds(said: float, truth: float) -> None:
    within = abs(said - truth) / truth <= 1 - np.linspace(0.5, 0.95, 10)
    assert mean_relative_accuracy(said, truth) == within.mean()


KINDS = ("object_rel_direction_easy", "object_rel_direction_medium", "object_rel_direction_hard",
         "object_rel_distance", "route_planning", "obj_appearance_order", "object_counting",
         "object_abs_distance", "object_size_estimation", "room_size_estimation")  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(plan=st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), max_size=30))
def test_vsibench_by_type_and_over_eight_tasks(plan: list[Any]) -> None:
    # Every type occurs at least once, as in the whole benchmark.
    plan = [*plan, *((kind, True) for kind in KINDS)]
    docs, replies = [], []
    for kind, right in plan:
        letter = KINDS.index(kind) < 6
        docs.append({"question_type": kind, "ground_truth": "B" if letter else "4",
                     "options": ["A. x", "B. y"] if letter else None})  # fmt: skip
        replies.append(("B" if letter else "4.") if right else ("A" if letter else "nothing"))
    result = aggregate("vsibench", rows_of("vsibench", docs, replies, "official"))
    by_type = {k: np.mean([right for kind, right in plan if kind == k]) for k in KINDS}
    for kind, expected in by_type.items():
        assert result.by_family[kind].value == pytest.approx(expected)
    direction = np.mean([by_type[kind] for kind in KINDS[:3]])
    eight = [direction, *(by_type[kind] for kind in KINDS[3:])]
    assert result.extra["object_rel_direction"] == pytest.approx(direction)
    assert len(eight) == 8 and result.value == pytest.approx(np.mean(eight))
