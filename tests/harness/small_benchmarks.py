"""Every benchmark, small: annotations in the published field layout, real little mp4 files.

All texts are ours; only field names and file names are the benchmarks'. `write_all` fills a data
root as `internvideo3 eval --data` expects it.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from internvideo3.tasks.world.media import encode_video

OPTIONS = ["a red ring", "a blue star", "a green square", "nothing"]
LETTERED = [f"{letter}. {text}" for letter, text in zip("ABCD", OPTIONS, strict=True)]
QUESTION = "What moves across the picture?"
MVBENCH_TASKS = ("action_antonym", "moving_count", "episodic_reasoning")
Row = dict[str, Any]


def video(path: Path, seed: int, seconds: int = 2) -> None:
    """Write a bright square that moves over a dark ground."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels_THWC = np.full((8 * seconds, 64, 64, 3), 24, np.uint8)
    for t, frame_HWC in enumerate(pixels_THWC):
        left = (3 * t + 7 * seed) % 48
        frame_HWC[24:40, left : left + 16, seed % 3] = 230
    path.write_bytes(encode_video(pixels_THWC, fps=8))


def picture(seed: int) -> bytes:
    """A png in memory."""
    buffer = io.BytesIO()
    colour = (40 * seed % 255, 90, 200)
    Image.new("RGB", (64, 64), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def as_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False))


def as_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_csv(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def videomme(home: Path) -> None:
    video(home / "videos/yt_a.mp4", 1)
    video(home / "videos/yt_b.MP4", 2)
    (home / "subtitle").mkdir()
    cue = '1\n00:00:00,000 --> 00:00:01,000\n<font color="white" size=".72c">I am here.</font>\n'
    (home / "subtitle/yt_a.srt").write_text(cue)
    as_parquet(
        home / "annotations.parquet",
        [
            {
                "video_id": f"{number // 2:03d}", "duration": ("short", "long")[number % 2],
                "domain": "Knowledge", "sub_category": "Astronomy", "url": "none",
                "videoID": ("yt_a", "yt_b")[number // 2], "question_id": f"001-{number}",
                "task_type": "Counting Problem", "question": QUESTION, "options": LETTERED,
                "answer": "B",
            }
            for number in range(4)
        ],
    )  # fmt: skip


def videomme_v2(home: Path) -> None:
    video(home / "videos/001.mp4", 3)
    as_lines(
        home / "subtitle/001.jsonl",
        [{"text": word, "start_time": 0.1, "end_time": 0.2} for word in ("over", "here")],
    )
    eight = "\n".join(f"{x}. option {x.lower()}" for x in "ABCDEFGH")
    as_parquet(
        home / "annotations.parquet",
        [
            {
                "video_id": "001", "question_id": f"001-{number}", "question": QUESTION,
                "options": eight, "answer": "C", "group_type": "logic",
                "group_structure": "[1, [2, 3], 4]", "level": "2", "second_head": "Order",
                "third_head": "Events",
            }
            for number in range(1, 5)
        ],
    )  # fmt: skip


def longvideobench(home: Path) -> None:
    video(home / "videos/lv_1.mp4", 4)
    as_json(
        home / "subtitles/lv_1_en.json",
        [{"start": "00:00:00.200", "end": "00:00:01.600", "line": "Look."}],
    )
    as_json(
        home / "annotations.json",
        [
            {
                "video_id": "lv_1", "question": QUESTION, "candidates": OPTIONS[: 4 - number],
                "correct_choice": number, "position": [3], "topic_category": "N",
                "question_category": ("S2E", "T3O")[number], "level": "L1", "id": f"lv_1_{number}",
                "video_path": "lv_1.mp4", "subtitle_path": "lv_1_en.json", "duration_group": 15,
                "starting_timestamp_for_subtitles": 0, "duration": 2.0, "view_count": 1,
            }
            for number in range(2)
        ],
    )  # fmt: skip


def mlvu(home: Path) -> None:
    for number, (stem, kind) in enumerate((("1_plotQA", "plotQA"), ("4_count", "count"))):
        video(home / f"videos/{stem}/m{number}.mp4", number)
        as_json(
            home / f"{stem}.json",
            [
                {
                    "video": f"m{number}.mp4", "duration": 2.0, "question": QUESTION,
                    "candidates": OPTIONS, "answer": OPTIONS[number], "question_type": kind,
                }
            ],
        )  # fmt: skip
    told = {"video": "m0.mp4", "duration": 2.0, "question": "Tell it.", "answer": "A ring moves."}
    as_json(home / "8_sub_scene.json", [told | {"scoring_points": ["a ring"]}])
    as_json(home / "9_summary.json", [told])


def lvbench(home: Path) -> None:
    video(home / "videos/lvkey.mp4", 5)
    listed = "\n".join(f"({x}) {o}" for x, o in zip("ABCD", OPTIONS, strict=True))
    as_lines(
        home / "video_info.meta.jsonl",
        [
            {
                "key": "lvkey", "type": "cartoon",
                "video_info": {"fps": 8, "duration_minutes": 0.03, "resolution": {"width": 64}},
                "qa": [
                    {
                        "uid": str(10 + number), "question": f"{QUESTION}\n{listed}",
                        "answer": "A", "question_type": ["entity recognition", "reasoning"],
                        "time_reference": "00:00-00:02",
                    }
                    for number in range(2)
                ],
            }
        ],
    )  # fmt: skip


def vrbench(home: Path) -> None:
    video(home / "videos/vr_1.mp4", 6)
    asked = {
        "question": QUESTION, "options": dict(zip("ABCD", OPTIONS, strict=True)), "answer": "D",
        "original_answer": "nothing", "reasoning_type": "Event Prediction",
        "reasoning_process": {"1": "It moves.", "2": "It leaves."},
    }  # fmt: skip
    as_lines(
        home / "VRBench_eval.jsonl",
        [
            {
                "video_id": "vr_1", "video_path": "videos/v001/vr_1.mp4",
                "video_read_type": "local",
                "video_summary": "A shape crosses a dark picture.",
                "mcq": {"qa1": asked, "qa2": asked | {"reasoning_type": "Counting Porblems"}},
            }
        ],
    )  # fmt: skip


def egoschema(home: Path) -> None:
    video(home / "videos/ego_1.mp4", 7, seconds=3)
    five = [*OPTIONS, "everything"]
    as_parquet(
        home / "annotations.parquet",
        [
            {
                "question_idx": str(number), "question": QUESTION, "video_idx": "ego_1",
                "option": [f"{x}. {o}" for x, o in zip("ABCDE", five, strict=True)],
                "answer": None,
            }
            for number in range(2)
        ],
    )  # fmt: skip


def egoschema_subset(home: Path) -> None:
    five = {f"option {i}": text for i, text in enumerate([*OPTIONS, "everything"])}
    asked = {"google_drive_id": "none", "question": QUESTION} | five
    as_json(home / "questions.json", [{"q_uid": f"ego_{n}"} | asked for n in range(3)])
    as_json(home / "subset_answers.json", {"ego_2": 0, "ego_0": 1})
    for number in (0, 2):
        video(home / f"videos/ego_{number}.mp4", 7 + number, seconds=3)


def nextqa(home: Path) -> None:
    # The videos lie in numbered folders; the csv names them by number alone.
    video(home / "videos/1164/3238737531.mp4", 8)
    five = {f"a{i}": text for i, text in enumerate([*OPTIONS, "both"])}
    as_csv(
        home / "val.csv",
        [
            {
                "video": 3238737531, "frame_count": 16, "width": 64, "height": 64,
                "question": "why does it move", "answer": number, "qid": number,
                "type": ("CW", "TP", "DO")[number],
            } | five
            for number in range(3)
        ],
    )  # fmt: skip


def perceptiontest(home: Path) -> None:
    video(home / "videos/video_1.mp4", 9)
    as_parquet(
        home / "annotations.parquet",
        [
            {
                "video_name": "video_1", "question": QUESTION, "question_id": str(number),
                "options": OPTIONS[:3], "answer_id": str(number),
                "area": ("physics", "memory")[number],
                "reasoning": "descriptive", "tag": ["motion"],
            }
            for number in range(2)
        ],
    )  # fmt: skip


def mvbench(home: Path) -> None:
    folders = ("ssv2_video_mp4", "clevrer/video_validation", "tvqa/video_fps3_hq_segment")
    for number, (task, folder) in enumerate(zip(MVBENCH_TASKS, folders, strict=True)):
        video(home / f"videos/{folder}/clip{number}.mp4", number)
        as_json(
            home / f"json/{task}.json",
            [
                {
                    "video": f"clip{number}.mp4", "question": QUESTION, "candidates": OPTIONS[:3],
                    "answer": OPTIONS[number % 3],
                }
            ],
        )  # fmt: skip


def tomato(home: Path) -> None:
    for number, kind in enumerate(("count", "rotation")):
        video(home / f"videos/human/h{number}.mp4", number)
        as_json(
            home / f"data/{kind}.json",
            {
                str(number): {
                    "question": QUESTION, "options": [*OPTIONS, "up", "down"], "answer": number,
                    "video_source_url": "none", "demonstration_type": "human",
                    "variation": {"composite": 0}, "motion_type": kind, "key": f"h{number}",
                    "note": "",
                }
            },
        )  # fmt: skip


def motionbench(home: Path) -> None:
    video(home / "videos/mb_1.mp4", 10)
    text = QUESTION + "\n" + "\n".join(LETTERED)
    asked = [("u1", "B"), ("u2", "NA"), ("u3", "D")]
    as_lines(
        home / "video_info.meta.jsonl",
        [
            {
                "key": "mb_1", "video_path": "mb_1.mp4", "video_type": "medvid",
                "question_type": "Camera Motion", "video_info": {"duration": 2.0},
                "qa": [{"uid": uid, "question": text, "answer": a} for uid, a in asked],
            }
        ],
    )  # fmt: skip


def tempcompass(home: Path) -> None:
    video(home / "videos/1021.mp4", 11)
    listed = "\n".join(LETTERED)
    captions = "Caption A: a ring moves\nCaption B: a star moves"
    rows = {
        "multi-choice": (f"{QUESTION}\n{listed}", LETTERED[0]),
        "yes_no": ("Does the ring move?", "yes"),
        "caption_matching": (f"Which fits?\n{captions}", "Caption A: a ring moves"),
        "captioning": ("Describe what moves.", "A ring."),
    }
    for kind, (question, answer) in rows.items():
        as_parquet(
            home / kind / "test-00000-of-00001.parquet",
            [{"video_id": "1021", "question": question, "answer": answer, "dim": "action"}],
        )


def timelens(part: str) -> Callable[[Path], None]:
    def write(home: Path) -> None:
        video(home / "videos/tl_1.mp4", 12, seconds=4)
        as_json(
            home / f"{part}-timelens.json",
            {
                "tl_1": {
                    "duration": 4.0,
                    "queries": ["a shape enters", "a shape leaves"],
                    "spans": [[0.4, 1.6], [2.0, 4.0]],
                }
            },
        )

    return write


def qvhighlights(home: Path) -> None:
    video(home / "videos/qv_1.mp4", 13, seconds=4)
    as_lines(
        home / "highlight_val_release.jsonl",
        [
            {
                "qid": 9, "query": "a shape moves", "duration": 4, "vid": "qv_1",
                "relevant_clip_ids": [0], "saliency_scores": [[1, 2, 3]],
                "relevant_windows": [[0, 2]],
            }
        ],
    )  # fmt: skip


def charades_sta(home: Path) -> None:
    video(home / "videos/3MSZA.mp4", 14, seconds=4)
    lines = "3MSZA 0.5 2.0##person turns on the light.\n3MSZA 1.0 3.2##person walks away.\n"
    home.mkdir(exist_ok=True)
    (home / "charades_sta_test.txt").write_text(lines)


def activitynet_captions(home: Path) -> None:
    video(home / "videos/v_abc.mp4", 15, seconds=4)
    as_json(
        home / "val_1.json",
        {
            "v_abc": {
                "duration": 4.0,
                "timestamps": [[0, 2.5], [2.5, 4.0]],
                "sentences": ["A shape enters. ", " It leaves."],
            }
        },
    )


def vsibench(home: Path) -> None:
    video(home / "videos/scannet/scene0.mp4", 16)
    as_parquet(
        home / "annotations.parquet",
        [
            {
                "id": number, "dataset": "scannet", "scene_name": "scene0", "question_type": kind,
                "question": "How many chairs are there?", "ground_truth": truth, "options": options,
            }
            for number, (kind, truth, options) in enumerate(
                [("object_counting", "4", None), ("object_rel_distance", "B", LETTERED)]
            )
        ],
    )  # fmt: skip


def mmsi_bench(home: Path) -> None:
    listed = "Options: " + ", ".join(LETTERED)
    as_parquet(
        home / "MMSI_Bench.parquet",
        [
            {
                "id": number, "images": [picture(number), picture(number + 5)],
                "question_type": "Motion (Cam.)", "question": f"{QUESTION}\n{listed}",
                "answer": "C", "thought": "none",
            }
            for number in range(2)
        ],
    )  # fmt: skip


def mmsi_video(home: Path) -> None:
    video(home / "videos/a/one.mp4", 17)
    video(home / "videos/a/two.mp4", 18)
    (home / "ref_images/a").mkdir(parents=True)
    (home / "ref_images/a/ref.png").write_bytes(picture(3))
    shared = {
        "system_prompt": "You are an expert.", "format_prompt": "\nAnswer with the letter.",
        "ground_truth": "B", "user_prompt": QUESTION + "\n" + "\n".join(LETTERED),
    }  # fmt: skip
    as_lines(
        home / "annotations.jsonl",
        [
            shared | {
                "id": "x1", "type": "(Cross-Video) Memory Update",
                "task_prompt": "First <video> then <video> and <image>: ",
                "video_list": [
                    {"path": "a/one.mp4", "start": 0.0, "end": 2.0, "base_fps": 8},
                    {"path": "a/two.mp4", "start": 0.0, "end": 2.0, "base_fps": 8},
                ],
                "ref_images": ["a/ref.png"],
            },
            shared | {
                "id": "x2", "type": "Planning", "task_prompt": "<video>\n",
                "video_list": [{"path": "a/one.mp4", "start": 0.0, "end": 2.0, "base_fps": 8}],
                "ref_images": [],
            },
        ],
    )  # fmt: skip


def dsi_bench(home: Path) -> None:
    for number, view in enumerate(("std", "reverse", "hflip", "reverse_hflip")):
        video(home / f"videos/{view}/d_1.mp4", number)
        as_csv(
            home / f"metadatas/{view}.csv",
            [
                {
                    "relative_path": "d_1.mp4", "question": QUESTION,
                    "options": " ".join(LETTERED), "GT": "ABCD"[number], "cate": 1,
                }
            ],
        )  # fmt: skip


WRITERS: dict[str, Callable[[Path], None]] = {
    "videomme": videomme,
    "videomme_v2": videomme_v2,
    "longvideobench": longvideobench,
    "longvideobench_interleaved": lambda home: None,
    "mlvu": mlvu,
    "lvbench": lvbench,
    "vrbench": vrbench,
    "egoschema": egoschema,
    "egoschema_subset": egoschema_subset,
    "nextqa": nextqa,
    "perceptiontest": perceptiontest,
    "mvbench": mvbench,
    "tomato": tomato,
    "motionbench": motionbench,
    "tempcompass": tempcompass,
    "timelens_qvhighlights": timelens("qvhighlights"),
    "timelens_charades": timelens("charades"),
    "timelens_activitynet": timelens("activitynet"),
    "qvhighlights": qvhighlights,
    "charades_sta": charades_sta,
    "activitynet_captions": activitynet_captions,
    "vsibench": vsibench,
    "mmsi_bench": mmsi_bench,
    "mmsi_video": mmsi_video,
    "mmsi_video_sc": lambda home: None,
    "dsi_bench": dsi_bench,
}


def write_all(root: Path) -> Path:
    """Write every benchmark below `root`, and return it."""
    for name, write in WRITERS.items():
        write(root / name)
    return root
