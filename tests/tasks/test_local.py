"""Benchmarks on disk: what annotation files hold, which file a video's name means.

pytest tests/tasks/test_local.py -q
"""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS
from internvideo3.tasks.benchmarks.local import DataError, Local, load_local, read_rows

VIEWS = ("std", "reverse", "hflip", "reverse_hflip")
OPTIONS = ["1", "2"]


def load(root: Path, name: str) -> Local:
    benchmark = BENCHMARKS[name]
    return load_local(benchmark, root, benchmark.paper)


def shown(root: Path, local: Local) -> list[str]:
    """The videos found, as paths below the benchmark's folder of videos."""
    paths = [Path(path) for doc in local.docs for path in doc["videos"]]
    videos = (root / local.benchmark.home / "videos").resolve()
    return [str(path.relative_to(videos)) for path in paths if path.is_file()]


def files(home: Path, *names: str) -> None:
    for name in names:
        path = home / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def annotate(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def dsi_bench(root: Path, views: tuple[str, ...] = VIEWS) -> Path:
    home = root / "dsi_bench"
    for view in views:
        path = home / f"metadatas/{view}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "relative_path,question,options,GT,cate\n"
            "clip_1.mp4,Where?,A. left B. right C. up D. down,A,1\n"
        )
    return home


def mvbench(root: Path, **videos: str) -> Path:
    home = root / "mvbench"
    for task, video in videos.items():
        row = {"video": video, "question": "How many?", "candidates": OPTIONS, "answer": "1"}
        annotate(home / f"json/{task}.json", [row])
    return home


def tomato(root: Path, *places: str) -> Path:
    home = root / "tomato"
    rows = {
        str(number): {
            "question": f"q{number}?", "options": OPTIONS, "answer": 0,
            "demonstration_type": place.split("/")[0], "key": place.split("/")[1],
        }
        for number, place in enumerate(places)
    }  # fmt: skip
    annotate(home / "data/count.json", rows)
    return home


def test_a_view_that_was_not_downloaded_is_missing_and_not_another_view(tmp_path: Path) -> None:
    files(dsi_bench(tmp_path), "std/clip_1.mp4")
    local = load(tmp_path, "dsi_bench")
    assert shown(tmp_path, local) == ["std/clip_1.mp4"]
    assert local.missing == tuple(sorted(f"videos/{view}/clip_1.mp4" for view in VIEWS[1:]))


def test_another_source_with_the_same_file_name_is_another_video(tmp_path: Path) -> None:
    home = mvbench(tmp_path, moving_count="video_10009.mp4")
    files(home, "perception/videos/video_10009.mp4")
    files(tomato(tmp_path, "simulated/0001-00"), "human/0001-00.mp4")
    assert load(tmp_path, "mvbench").missing == ("videos/clevrer/video_validation/video_10009.mp4",)
    assert load(tmp_path, "tomato").missing == ("videos/simulated/0001-00.mp4",)


@pytest.mark.parametrize("flat", [True, False])
def test_two_names_never_share_a_file(tmp_path: Path, flat: bool) -> None:
    home = tomato(tmp_path, "simulated/0001-00", "human/0001-00")
    if flat:
        files(home, "0001-00.mp4")
    else:
        files(home, "x/simulated/0001-00.mp4", "human/0001-00.mp4")
    local = load(tmp_path, "tomato")
    assert len(shown(tmp_path, local)) == (0 if flat else 2)
    assert len(local.missing) == (2 if flat else 0)
    assert len({doc["videos"][0] for doc in local.docs}) == 2


@pytest.mark.parametrize(
    "lies",
    [
        "clevrer/video_validation/v_1.mp4",
        "clevrer/video_validation/v_1.webm",
        "video_validation/v_1.mp4",
        "unpacked/clevrer/video_validation/v_1.avi",
        "v_1.mkv",
    ],
)
def test_outer_folders_may_be_more_or_fewer_than_annotated(tmp_path: Path, lies: str) -> None:
    files(mvbench(tmp_path, moving_count="v_1.mp4"), lies, "perception/videos/v_1.mp4")
    local = load(tmp_path, "mvbench")
    assert (shown(tmp_path, local), local.missing) == ([lies], ())


def test_names_without_a_folder_are_found_in_any_but_only_once(tmp_path: Path) -> None:
    home = tmp_path / "lvbench"
    rows = [
        {
            "video_path": f"{video}.mp4", "uid": video, "question": "q?\n(A) a\n(B) b",
            "answer": "A", "question_type": ["x"],
        }
        for video in ("one", "two")
    ]  # fmt: skip
    annotate(home / "annotations.json", rows)
    files(home, "00/one.mp4", "01/two.mp4", "02/two.mp4")
    local = load(tmp_path, "lvbench")
    assert (shown(tmp_path, local), local.missing) == (["00/one.mp4"], ("videos/two.mp4",))


def test_one_view_may_lie_flat(tmp_path: Path) -> None:
    files(dsi_bench(tmp_path, VIEWS[:1]), "clip_1.mp4")
    assert load(tmp_path, "dsi_bench").missing == ()


def test_views_of_one_question_are_known_as_such(tmp_path: Path) -> None:
    """What a run keeps of a document must tell which question it is: scores are made of it."""
    dsi_bench(tmp_path)
    docs = [doc["doc"] for doc in load(tmp_path, "dsi_bench").docs]
    assert {(doc["row"], doc["relative_path"], doc["question"]) for doc in docs} == {
        (0, "clip_1.mp4", "Where?")
    }
    assert {doc["aug"] for doc in docs} == set(VIEWS)


def longvideobench(root: Path, cues: list[dict[str, object]], **changes: object) -> Path:
    """One question about 15 seconds from second 100 of a film."""
    home = root / "longvideobench"
    row = {
        "id": "v_0", "video_path": "v.mp4", "question": "q?", "candidates": OPTIONS,
        "correct_choice": 0, "question_category": "S2E", "duration_group": 15,
        "subtitle_path": "v_en.json", "duration": 15.0, "starting_timestamp_for_subtitles": 100.0,
    }  # fmt: skip
    annotate(home / "annotations.json", [row | changes])
    annotate(home / "subtitles/v_en.json", cues)
    files(home, "v.mp4")
    return home


CLOCK = [
    {"start": "00:00:05.000", "end": "00:00:08.000", "line": "long before"},
    {"start": "00:01:36.000", "end": "00:01:40.000", "line": "just before"},
    {"start": "00:01:38.000", "end": "00:01:42.000", "line": "into it"},
    {"start": "00:01:45.000", "end": "00:01:48.000", "line": "in it"},
    {"start": "00:01:54.000", "end": "00:01:57.500", "line": "out of it"},
    {"start": "00:01:55.000", "end": "00:01:58.000", "line": "just after"},
    {"start": "00:09:00.000", "end": "00:09:05.000", "line": "long after"},
]
SECONDS = [
    {"timestamp": [5.0, 8.0], "text": "long before"},
    {"timestamp": [98.0, 102], "text": "into it"},
    {"timestamp": [105.0, 108], "text": "in it"},
    {"timestamp": [114.0, None], "text": "out of it"},
    {"timestamp": [540.0, 545.0], "text": "long after"},
]


@pytest.mark.parametrize("cues", [CLOCK, SECONDS])
def test_subtitles_are_those_of_the_video_and_not_of_the_whole_film(
    tmp_path: Path, cues: list[dict[str, object]]
) -> None:
    home = longvideobench(tmp_path, cues)
    show = BENCHMARKS["longvideobench"].subtitles
    assert show is not None
    doc = json.loads((home / "annotations.json").read_text())[0]
    assert show(doc, home) == "into it\nin it\nout of it"
    # Without its times the video is the film from its start.
    whole = doc | {"duration": None, "starting_timestamp_for_subtitles": None}
    assert show(whole, home) == "\n".join(str(cue.get("line") or cue["text"]) for cue in cues)


def test_the_prompt_with_subtitles_has_those_of_the_video(tmp_path: Path) -> None:
    longvideobench(tmp_path, CLOCK)
    benchmark = BENCHMARKS["longvideobench"]
    local = load_local(benchmark, tmp_path, benchmark.paper, subtitles=True)
    assert local.docs[0]["raw"]["iv3_subtitles"] == "into it\nin it\nout of it"


# What `str.splitlines` takes for line ends beside "\n" and "\r".
ODD = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven\x1deight\x1enine"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "txt"])
def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path: Path, ending: str, end: str) -> None:
    path = tmp_path / f"annotations.{ending}"
    rows: list[Any] = [{"question": ODD, "answer": "A"}, {"question": "plain", "answer": "B"}]
    with path.open("w", encoding="utf-8", newline="") as file:
        if ending == "csv":
            rows[1]["question"] = "two\nlines"
            writer = csv.DictWriter(file, list(rows[0]), lineterminator=end)
            writer.writeheader()
            writer.writerows(rows)
        elif ending == "jsonl":
            file.write(end.join([json.dumps(row, ensure_ascii=False) for row in rows] + [""]))
        else:
            rows = [ODD, "plain"]
            file.write(end.join([*rows, ""]))
    assert read_rows(path) == rows


def test_an_odd_character_makes_no_second_question(tmp_path: Path) -> None:
    home = dsi_bench(tmp_path, VIEWS[:1])
    path = home / "metadatas/std.csv"
    path.write_text(path.read_text().replace("Where?", "Where\u2028is it?"))
    (doc,) = load(tmp_path, "dsi_bench").docs
    assert doc["question"] == "Where\u2028is it?"


def mlvu(root: Path) -> Path:
    home = root / "mlvu"
    row = {"video": "a.mp4", "duration": 2.0, "question": "q?", "question_type": "plotQA"}
    annotate(home / "1_plotQA.json", [row | {"candidates": OPTIONS, "answer": "2"}])
    return home


def test_mlvus_generation_tasks_are_left_out_and_said(tmp_path: Path) -> None:
    home = mlvu(tmp_path)
    before = load(tmp_path, "mlvu")
    row = {"video": "a.mp4", "duration": 2.0, "question": "Tell it.", "answer": "A man walks."}
    annotate(home / "8_sub_scene.json", [row | {"scoring_points": ["a man"]}])
    annotate(home / "9_summary.json", [row])
    local = load(tmp_path, "mlvu")
    assert local.docs == before.docs and local.digest == before.digest
    (note,) = local.notes
    assert "8_sub_scene.json, 9_summary.json" in note and before.notes == ()


def egoschema(root: Path, count: int = 3) -> Path:
    home = root / "egoschema_subset"
    rows = [
        {"q_uid": f"u{n}", "google_drive_id": "x", "question": f"q{n}?"}
        | {f"option {i}": f"o{i}" for i in range(5)}
        for n in range(count)
    ]
    annotate(home / "questions.json", rows)
    return home


def test_egoschemas_subset_is_the_questions_with_a_public_answer(tmp_path: Path) -> None:
    annotate(egoschema(tmp_path) / "subset_answers.json", {"u2": 4, "u0": 1})
    local = load(tmp_path, "egoschema_subset")
    assert [(doc["id"], doc["answer"]) for doc in local.docs] == [
        ("egoschema_subset/u0", "o1"), ("egoschema_subset/u2", "o4"),
    ]  # fmt: skip
    assert [path.name for path in local.files] == ["questions.json", "subset_answers.json"]


def test_egoschemas_subset_without_answers_is_refused(tmp_path: Path) -> None:
    home = egoschema(tmp_path)
    with pytest.raises(DataError, match=r"have no answers.*subset_answers\.json beside"):
        load(tmp_path, "egoschema_subset")
    annotate(home / "subset_answers.json", {"u0": 1, "other": 2})
    with pytest.raises(DataError, match=r"answers 1 questions that questions\.json.*other"):
        load(tmp_path, "egoschema_subset")
    annotate(home / "subset_answers.json", {"u0": 5})
    with pytest.raises(DataError, match=r"the answer to u0 is 5, expected 0 to 4"):
        load(tmp_path, "egoschema_subset")
    annotate(home / "subset_answers.json", ["u0"])
    with pytest.raises(DataError, match=r"no object of answers by q_uid"):
        load(tmp_path, "egoschema_subset")


def test_the_full_egoschema_needs_no_answers(tmp_path: Path) -> None:
    egoschema(tmp_path).rename(tmp_path / "egoschema")
    assert len(load(tmp_path, "egoschema").docs) == 3
