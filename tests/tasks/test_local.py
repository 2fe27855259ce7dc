"""Benchmarks on disk: which file a video's name means, and which it does not.

pytest tests/tasks/test_local.py -q
"""

import json
from pathlib import Path

import pytest

from internvideo3.tasks.benchmarks.catalogue import BENCHMARKS
from internvideo3.tasks.benchmarks.local import Local, load_local

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
