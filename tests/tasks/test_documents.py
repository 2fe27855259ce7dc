"""Documents with the fields that lmms-eval 0.7.3's tasks read, and documents that lack some.

pytest tests/tasks/test_documents.py -q
"""

import importlib
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pytest

from internvideo3.tasks.scoring import (
    Outcome,
    Score,
    ScoringError,
    aggregate,
    benchmark_names,
    score,
)

WORDS = ["a dog", "red circle", "blue square", "green star"]
LINES = [f"{letter}. {text}" for letter, text in zip("ABCD", WORDS, strict=True)]
ASKED = "What is it?\n" + "\n".join(LINES)
SPAN = {"video_path": "v.mp4", "query": "a dog runs", "span": [[12.0, 20.0]]}


class Task(NamedTuple):
    """A benchmark's document, and where lmms-eval scores it."""

    doc: dict[str, Any]
    module: str | None = None
    """Below `lmms_eval.tasks`; None for benchmarks that lmms-eval does not have."""
    function: str = ""
    metric: str = ""
    right: str = "B"
    wrong: str = "C"
    needed: tuple[str, ...] = ("answer",)
    """Fields without which there is nothing to score; all others may be absent."""


TASKS = {
    "videomme": Task(
        {"videoID": "x", "question_id": "001-1", "question": "What?", "options": LINES,
         "answer": "B", "duration": "short", "domain": "d", "sub_category": "s", "task_type": "t"},
        "videomme", "videomme_process_results", "videomme_perception_score",
    ),
    "videomme_v2": Task(
        {"video_id": "001", "question_id": "001-1", "question": "What?", "answer": "B",
         "options": "\n".join(LINES), "group_type": "relevance", "group_structure": "None",
         "level": None, "second_head": None, "third_head": None},
        "videomme_v2", "videomme_v2_process_results", "videomme_v2_overall_score",
    ),
    "longvideobench": Task(
        {"id": "v_0", "video_path": "v.mp4", "question": "What?", "correct_choice": 1,
         "question_category": "S2E", "duration_group": 60, "duration": 31.5, "subtitle_path": "s",
         "starting_timestamp_for_subtitles": 0.0,
         **{f"option{i}": text for i, text in enumerate(WORDS)}, "option4": "N/A"},
        "longvideobench", "longvideobench_process_results", "lvb_acc",
        needed=("correct_choice",),
    ),
    "mlvu": Task(
        {"video_name": "v.mp4", "question": ASKED, "answer": "B", "task_type": "ego"},
        "mlvu", "mlvu_process_results", "mlvu_percetion_score",
    ),
    "lvbench": Task(
        {"video_path": "v.mp4", "question": ASKED, "answer": "B"},
        "lvbench", "lvbench_process_results", "lvbench_score",
    ),
    "vrbench": Task(
        {"video_id": "v", "question_id": "q", "video_path": "v.mp4", "question": "Why?",
         "options": dict(zip("ABCDE", [*WORDS, None], strict=True)), "answer": "B",
         "original_answer": "red circle", "reasoning_type": "Logical Linkage",
         "reasoning_process": {"1": "It rolls."}, "video_summary": "A circle."},
        "vrbench", "vrbench_mcq_process_results", "vrbench_score", needed=("answer", "options"),
    ),
    "egoschema": Task(
        {"question_idx": "0", "video_idx": "v", "question": "What?", "answer": "1",
         "option": [*LINES, "E. nothing"]},
        "egoschema", "egoschema_process_results_generation", "score", needed=("option", "answer"),
    ),
    "nextqa": Task(
        {"video": 1, "question": "why", "answer": 1, "qid": 0, "type": "CW",
         "a0": "a dog ", "a1": "red circle", "a2": "blue square", "a3": "star", "a4": "none"},
        "nextqa", "nextqa_mc_process_results", "exact_match", right="(B)", wrong="(C)",
        needed=("answer", "a0", "a1", "a2", "a3", "a4"),
    ),
    "perceptiontest": Task(
        {"video_name": "v", "question": "What?", "question_id": "0", "options": WORDS[:3],
         "answer_id": "1", "area": "physics", "reasoning": "r", "tag": ["t"]},
        "perceptiontest.val", "perceptiontest_val_process_results_mc", "accuracy",
        needed=("answer_id",),
    ),
    "mvbench": Task(
        {"video": "v.mp4", "question": "What?", "candidates": WORDS, "answer": "red circle"},
        "mvbench", "mvbench_process_results", "mvbench_accuracy", needed=("candidates", "answer"),
    ),
    "tomato": Task(
        {"id": "0", "question": "What?", "video_path": "v.mp4", "options": WORDS, "answer": 1,
         "reason_type": "rotation", "demonstration_type": "human"},
        "tomato", "tomato_process_results", "tomato_score", needed=("options", "answer"),
    ),
    "motionbench": Task(
        {"id": "0", "key": "k", "video_path": "v.mp4", "video_type": "t", "question": "What?",
         "question_type": "Camera Motion", "answer": "B",
         "options": [{"label": a, "text": b} for a, b in zip("ABCD", WORDS, strict=True)]},
        "motionbench", "motionbench_process_results", "motionbench_acc",
    ),
    "tempcompass": Task(
        {"qtype": "multi-choice", "video_id": "v", "question": ASKED, "answer": "B. red circle",
         "dim": "action"},
        "tempcompass", "tempcompass_process_results_multi_choice", "avg_accuracy",
        needed=("qtype", "question", "answer"),
    ),
    "timelens": Task(SPAN, "timelens", right="12.0 - 20.0", wrong="30 - 40", needed=("span",)),
    "charades_sta": Task(
        {"video": "v.mp4", "caption": "a dog runs", "timestamp": [12.0, 20.0]},
        right="12.0 - 20.0", wrong="30 - 40", needed=("timestamp",),
    ),
    "activitynet_captions": Task(
        {"video": "v", "duration": 60.5, "sentence": "a dog runs", "timestamps": [[12.0, 20.0]]},
        right="12.0 - 20.0", wrong="30 - 40", needed=("timestamps",),
    ),
    "qvhighlights": Task(
        {"qid": 1, "query": "a dog runs", "duration": 150, "vid": "v_0.0_150.0",
         "relevant_windows": [[12, 20]], "relevant_clip_ids": [6], "saliency_scores": [[4, 4, 4]]},
        right="[[12, 20, 0.9]]", wrong="[[30, 40, 0.9]]", needed=("relevant_windows",),
    ),
    "vsibench": Task(
        {"id": 0, "dataset": "scannet", "scene_name": "s", "question": "What?", "options": LINES,
         "question_type": "object_rel_distance", "ground_truth": "B"},
        "vsibench", "vsibench_process_results", "vsibench_overall",
        needed=("question_type", "ground_truth"),
    ),
    "mmsi_bench": Task(
        {"id": 0, "images": [], "question": "What?\nOptions: A: a dog, B: red, or pink, C: blue",
         "question_type": "MSR", "answer": "B", "thought": ""},
        "mmsi_bench", "msr_process_results", "average", right="``B``", wrong="``C``",
    ),
    "mmsi_video": Task(
        {"id": "0", "type": "Planning", "system_prompt": "", "task_prompt": "", "format_prompt": "",
         "user_prompt": ASKED, "ground_truth": "B", "video_list": [], "frames_list": [],
         "ref_images": []},
        "mmsi_video", "process_results", "overall_accuracy", needed=("ground_truth",),
    ),
    "dsi_bench": Task(
        {"relative_path": "v.mp4", "question": "Where?", "options": "A. Above B. Under C. Front",
         "GT": "B", "cate": 0},
        right="<answer>B</answer>", wrong="<answer>C</answer>", needed=("GT",),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Imports lmms-eval's task modules; two need a home, one would download language data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setitem(sys.modules, "nltk", None)
        patch.setitem(sys.modules, "pywsd", None)
        yield lambda name: importlib.import_module(f"lmms_eval.tasks.{name}.utils")


def credit(found: Any, doc: dict[str, Any]) -> bool:
    """Whether lmms-eval's record of an answer says that it is right; its forms are many."""
    if not isinstance(found, dict):
        return bool(found)
    for name in ("score", "rating", "accuracy", "correct"):
        if name in found:
            return bool(found[name])
    said = next(
        found[n] for n in ("pred_answer", "parsed_pred", "pred", "prediction") if n in found
    )
    truth = next(found[n] for n in ("answer", "ground_truth", "gt_answer") if n in found)
    return str(said) == str(truth)


SHARED = [name for name, task in TASKS.items() if task.function]


def test_every_benchmark_has_a_document_here() -> None:
    assert set(TASKS) == {name for name in benchmark_names() if not name.startswith("world_")}
    assert set(TASKS) - set(SHARED) == {
        "timelens", "charades_sta", "activitynet_captions", "qvhighlights", "dsi_bench",
    }  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_lmms_eval_and_our_scorer_agree_on_plain_letters_of_one_document(
    name: str, tasks: Any
) -> None:
    task = TASKS[name]
    for reply, right in ((task.right, True), (task.wrong, False)):
        recorded = getattr(tasks(task.module), task.function)(dict(task.doc), [reply])
        assert credit(recorded[task.metric], task.doc) == right
        for rule in ("official", "plain"):
            found = score(name, task.doc, reply, rule=rule)
            assert (found.value, found.outcome) == (float(right), Outcome.ANSWERED)


def test_lmms_evals_grounding_reads_the_same_fields(tasks: Any) -> None:
    doc = TASKS["timelens"].doc
    recorded = tasks("timelens").timelens_process_results(doc, ["12.0 - 20.0"])["timelens_mIOU"]
    assert tasks("timelens").timelens_aggregate_miou([recorded], None) == 100
    assert score("timelens", doc, "12.0 - 20.0").value == 1
    classic = TASKS["charades_sta"].doc
    assert tasks("charades_sta").temporal_grounding_doc_to_answer(classic) == [12.0, 20.0]
    assert score("charades_sta", classic, "12.0 - 20.0").value == 1


@pytest.mark.parametrize("name", TASKS)
def test_only_what_is_scored_must_be_there(name: str) -> None:
    task = TASKS[name]
    least = {key: task.doc[key] for key in task.needed}
    for doc, rule in product((least, dict.fromkeys(task.doc) | least), ("official", "plain")):
        rows = [(doc, score(name, doc, reply, rule=rule)) for reply in (task.right, task.wrong)]
        assert [found.value for _, found in rows] == [1, 0]
        if name != "videomme_v2":  # its groups are defined by further fields
            assert aggregate(name, rows, rule=rule).n == 2


@pytest.mark.parametrize("name", TASKS)
def test_a_document_of_another_layout_is_named_and_nothing_else_is_raised(name: str) -> None:
    task = TASKS[name]
    wrong = (None, "", [], {}, -1, 3.5, "zzz", [None], True)
    docs = [task.doc | {field: value} for field, value in product(task.doc, wrong)]
    docs += [{k: v for k, v in task.doc.items() if k != field} for field in task.doc]
    said = (task.right, "B is what I would say here, the red circle, from 2 to 9")
    for doc, reply, rule in product(docs, said, ("official", "plain")):
        try:
            found = score(name, doc, reply, rule=rule)
            assert found.value is None or 0 <= found.value <= 1
            aggregate(name, [(doc, found)] * 4, rule=rule)
        except ScoringError as error:
            assert any(word in str(error) for word in (name, *task.doc))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("rule", ["official", "plain"])
def test_aggregates_of_no_rows_one_row_and_rows_without_values(name: str, rule: Any) -> None:
    task = TASKS[name]
    nothing = aggregate(name, [], rule)
    assert (nothing.value, nothing.n, nothing.n_scored) == (None, 0, 0)
    right = score(name, task.doc, task.right, rule=rule)
    alone = aggregate(name, [(task.doc, right)], rule)
    assert alone.n == 1
    # Of four questions of one group there is one; an absent direction of VSI-Bench counts as 0.
    expected = {"videomme_v2": None, ("vsibench", "official"): 0.5}
    assert alone.value == expected.get((name, rule), expected.get(name, 1))
    without = Score(None, None, Outcome.JUDGE_NEEDED)
    mixed = aggregate(name, [(task.doc, right), (task.doc, without)] * 2, rule)
    # VRBench's judge rates the reasoning of answered questions too.
    asked = 4 if name == "vrbench" else 2
    assert (mixed.n, mixed.n_scored, mixed.judge_needed) == (4, 2, asked)
    assert mixed.value is None or 0 <= mixed.value <= 1
    hopeless = aggregate(name, [(task.doc, without)] * 4, rule)
    assert hopeless.n_scored == 0
    assert hopeless.value in (None, 0)


@pytest.mark.parametrize(
    ("name", "field"),
    [("videomme", "answer"), ("videomme_v2", "answer"), ("longvideobench", "correct_choice"),
     ("mlvu", "answer"), ("lvbench", "answer"), ("vrbench", "answer"), ("egoschema", "answer"),
     ("nextqa", "answer"), ("perceptiontest", "answer_id"), ("tomato", "answer"),
     ("mmsi_bench", "answer"), ("mmsi_video", "ground_truth"), ("dsi_bench", "GT")],
)  # fmt: skip
def test_a_hidden_answer_has_no_value(name: str, field: str) -> None:
    task = TASKS[name]
    for hidden in (None, ""):
        found = score(name, task.doc | {field: hidden}, task.right)
        assert found == Score(None, "B", Outcome.NO_TRUTH)
