"""Table 2 of the paper: long video."""

import json
import math
import re
from pathlib import Path

from . import layouts, prompts
from .protocol import (
    LMMS,
    QWEN3_VL_VIDEO,
    SCRIPTS,
    Benchmark,
    Data,
    Doc,
    Lmms,
    Preset,
    Raw,
    fields,
    tokens,
)

_OPEN = "leaves frames open; Qwen3-VL's own sampling"
_EXTRACTOR = (
    "Documents and prompt are lmms-eval's; its letter extraction of 0.7.3 differs from the "
    "official code, so scores are ours."
)
_TAG = re.compile(r"<[^>]*>")


def _qwen3_vl(doc: Doc, folder: Path) -> str | None:
    path = folder / "subtitle" / f"{doc['videoID']}.srt"
    if not path.is_file():
        return None
    import pysubs2

    lines = (event.plaintext.replace("\n", " ").strip() for event in pysubs2.load(str(path)))
    return "\n".join(_TAG.sub("", line) for line in lines if line)


def _words(doc: Doc, folder: Path) -> str | None:
    path = folder / "subtitle" / f"{doc['video_id']}.jsonl"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as lines:
        return " ".join(json.loads(line)["text"] for line in lines if line.strip())


def _cues(doc: Doc, folder: Path) -> str | None:
    """What is said in the video; the file has the subtitles of the whole film it was cut from."""
    path = folder / "subtitles" / str(doc.get("subtitle_path"))
    if not path.is_file():
        return None
    from .interleaved import read_cues  # it decodes videos, which a list of suites need not load

    length_s = _seconds(doc)
    end_s = math.inf if length_s is None else length_s
    cues = read_cues(path, _subtitles_start_s(doc), end_s, whole=True)
    # The loader ends a cue without an end before it starts where the video is not the whole film.
    return "\n".join(
        cue.text for cue in cues if cue.start_s < end_s and max(cue.start_s, cue.end_s) > 0
    )


def _subtitles_start_s(doc: Doc) -> float:
    """Where the video starts in the time of its subtitles."""
    return float(doc.get("starting_timestamp_for_subtitles") or 0.0)


def _seconds(doc: Doc) -> float | None:
    value = doc.get("duration")
    return float(value) if isinstance(value, int | float) else None


VIDEOMME = Benchmark(
    name="videomme",
    title="Video-MME",
    group="long",
    scorer="videomme",
    metric="accuracy",
    column=(2, "Video-MME"),
    data=Data(
        id="lmms-eval/Video-MME",
        split="test",
        questions=2700,
        counted="stated",
        licence="research only; redistribution of the questions is forbidden",
        get="Hugging Face lmms-eval/Video-MME; videos from the benchmark's own page",
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_videomme.sh",
        fps=4,
        max_frames=1024,
        min_pixels=tokens(256),
        max_pixels=tokens(256),
        max_new_tokens=16,
    ),
    official=Preset(source=f"{LMMS}/videomme/videomme.yaml, {_OPEN}", max_new_tokens=16),
    lmms=Lmms(
        yaml="videomme/videomme.yaml",
        shows=fields("question", "options"),
        prompt_settings={
            "format": "qwen3_vl",
            "pre_prompt": "Question: ",
            "post_prompt": "Answer with the option letter only.",
        },
    ),
    reason=_EXTRACTOR + " The prompt is pinned to its Qwen3-VL form, which it picks by model name.",
    kept=("answer", "options", "duration", "task_type"),
    identify=lambda doc: str(doc["question_id"]),
    videos=lambda doc: (f"{doc['videoID']}.mp4",),
    family=lambda doc: str(doc["task_type"]),
    subtitles=_qwen3_vl,
)

VIDEOMME_V2 = Benchmark(
    name="videomme_v2",
    title="VideoMME-v2",
    group="long",
    scorer="videomme_v2",
    metric="group score",
    column=(2, "VideoMME-v2"),
    data=Data(
        id="MME-Benchmarks/Video-MME-v2",
        split="test",
        questions=3200,
        counted="verified",
        licence="as on the data set's page",
        get="Hugging Face MME-Benchmarks/Video-MME-v2, with its videos",
        read=layouts.videomme_v2,
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_videommev2.py",
        video_pixels=QWEN3_VL_VIDEO,
        max_new_tokens=64,
        prompt=prompts.videomme_v2,
        note="The script's 4 fps and pixel bounds stand in the message, where they are ignored.",
    ),
    official=Preset(
        source=f"{LMMS}/videomme_v2/videomme_v2.yaml, {_OPEN}",
        max_new_tokens=64,
        prompt=None,
    ),
    lmms=Lmms(
        yaml="videomme_v2/videomme_v2.yaml",
        shows=fields("question", "options"),
        prompt_settings={
            "format": "qwen3_vl",
            "pre_prompt": "Question: ",
            "post_prompt": "Answer with the option letter only.",
        },
    ),
    reason="Its parser reads fewer forms than the official one, and not the official -1; scores "
    "are ours. The paper's script has a prompt of its own.",
    not_comparable="whether the paper's number is the group score or question accuracy is unknown",
    kept=(
        *("options", "answer", "group_type", "group_structure", "level"),
        *("second_head", "third_head", "video_id", "question_id"),
    ),
    identify=lambda doc: str(doc["question_id"]),
    videos=lambda doc: (f"{doc['video_id']}.mp4",),
    family=lambda doc: str(doc.get("second_head") or doc["group_type"]),
    subtitles=_words,
)

_LVB_SUBTITLES = "longvideobench/LongVideoBench@2aa4f91:longvideobench/longvideobench_dataset.py"
_LVB_OWN = Preset(
    source=f"{_LVB_SUBTITLES}, README.md (64 frames)",
    fps=1,
    max_frames=64,
    max_new_tokens=32,
    prompt=prompts.longvideobench_interleaved,
    note="64 single pictures at equal steps, each subtitle between the pictures that it falls "
    "between.",
)


def _lvb_between(doc: Doc) -> Raw:
    return {
        "path": f"subtitles/{doc['subtitle_path']}",
        "starts_at_s": _subtitles_start_s(doc),
        "length_s": float(doc["duration"]),
    }


def _longvideobench(name: str, title: str, paper: Preset, official: Preset) -> Benchmark:
    own = name != "longvideobench"
    return Benchmark(
        name=name,
        title=title,
        group="classic" if own else "long",
        scorer="longvideobench",
        metric="accuracy",
        column=None if own else (2, "LongVideoBench"),
        folder="longvideobench",
        data=Data(
            id="longvideobench/LongVideoBench",
            split="validation",
            questions=1337,
            counted="stated",
            licence="CC BY-NC-SA 4.0, gated",
            get="Hugging Face longvideobench/LongVideoBench, after accepting its terms",
            gigabytes=161,
            annotations=("annotations.*", "lvb_val.json"),
            read=layouts.longvideobench,
        ),
        paper=paper,
        official=official,
        lmms=None
        if own
        else Lmms(
            yaml="longvideobench/longvideobench_val_v.yaml",
            shows=fields("question", *(f"option{i}" for i in range(5))),
        ),
        reason="The benchmark's own loader. lmms-eval's longvideobench_val_i places subtitles by "
        "times that are not quite its pictures'."
        if own
        else "The benchmark has no scorer of its own and sends to lmms-eval; ours is that one "
        "without its random letter for unreadable answers.",
        not_comparable="the paper's script shows the video without subtitles" if own else "",
        kept=(
            *(f"option{i}" for i in range(5)),
            *("correct_choice", "duration_group", "question_category"),
        ),
        identify=lambda doc: str(doc["id"]),
        videos=lambda doc: (str(doc["video_path"]),),
        length_s=_seconds,
        family=lambda doc: str(doc["question_category"]),
        subtitles=None if own else _cues,
        between=_lvb_between if own else None,
    )


LONGVIDEOBENCH = _longvideobench(
    "longvideobench",
    "LongVideoBench",
    Preset(
        source=f"{SCRIPTS}/eval_longvideobench.sh",
        fps=4,
        max_frames=2048,
        min_pixels=tokens(256),
        max_pixels=tokens(256),
        max_new_tokens=32,
    ),
    Preset(source=f"{LMMS}/longvideobench/longvideobench_val_v.yaml, {_OPEN}", max_new_tokens=32),
)
LONGVIDEOBENCH_INTERLEAVED = _longvideobench(
    "longvideobench_interleaved",
    "LongVideoBench (subtitles between pictures)",
    _LVB_OWN,
    _LVB_OWN,
)

MLVU = Benchmark(
    name="mlvu",
    title="MLVU",
    group="long",
    scorer="mlvu",
    metric="M-Avg",
    column=(2, "MLVU"),
    data=Data(
        id="sy1998/MLVU_dev",
        split="dev (the hub's split is called test)",
        questions=2174,
        counted="stated",
        licence="CC BY-NC-SA 4.0, research only",
        get="github.com/JUNJIE99/MLVU data/*.json; videos from Hugging Face MLVU/MVLU",
        annotations=("annotations.*", "*.json"),
        skipped=("8_sub_scene.json", "9_summary.json"),
        skipped_why="MLVU's two generation tasks, which M-Avg does not count",
        read=layouts.mlvu,
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_mlvu.sh",
        fps=4,
        max_frames=2048,
        min_pixels=tokens(256),
        max_pixels=tokens(256),
        max_new_tokens=16,
    ),
    official=Preset(source=f"{LMMS}/mlvu/mlvu_dev.yaml, {_OPEN}", max_new_tokens=16),
    lmms=Lmms(yaml="mlvu/mlvu_dev.yaml", shows=fields("question")),
    reason=_EXTRACTOR + " Its mlvu_test is not offered: it reads four of six options.",
    not_comparable="the paper's column seems to mix the dev and test splits",
    kept=("question", "answer", "task_type"),
    identify=lambda doc: f"{doc['task_type']}/{doc['video_name']}/{doc['question'][:80]}",
    videos=lambda doc: (str(doc["video_name"]),),
    length_s=_seconds,
    family=lambda doc: str(doc["task_type"]),
)

LVBENCH = Benchmark(
    name="lvbench",
    title="LVBench",
    group="long",
    scorer="lvbench",
    metric="accuracy",
    column=(2, "LVBench"),
    data=Data(
        id="lmms-eval/LVBench",
        split="train",
        questions=1549,
        counted="stated",
        licence="as on the data set's page",
        get="Hugging Face lmms-eval/LVBench, or THUDM/LVBench's video_info.meta.jsonl; videos are "
        "public web videos",
        annotations=("annotations.*", "video_info.meta.jsonl"),
        read=layouts.questions_of_videos,
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_lvbench.sh",
        fps=4,
        max_frames=1024,
        min_pixels=tokens(256),
        max_pixels=tokens(256),
        max_new_tokens=16,
    ),
    official=Preset(source=f"{LMMS}/lvbench/lvbench.yaml, {_OPEN}", max_new_tokens=16),
    lmms=Lmms(yaml="lvbench/lvbench.yaml", shows=fields("question")),
    reason=_EXTRACTOR,
    kept=("question", "options", "answer", "question_type"),
    identify=lambda doc: str(doc["uid"]),
    videos=lambda doc: (str(doc["video_path"]),),
    family=lambda doc: str((doc["question_type"] or ["all"])[0]),
)

VRBENCH = Benchmark(
    name="vrbench",
    title="VRBench",
    group="long",
    scorer="vrbench",
    metric="accuracy",
    column=(2, "VRBench"),
    data=Data(
        id="OpenGVLab/VRBench",
        split="VRBench_eval.jsonl",
        questions=8243,
        counted="verified",
        licence="annotations as on the data set's page (code Apache-2.0)",
        get="Hugging Face OpenGVLab/VRBench: VRBench_eval.jsonl and the split archive of videos",
        gigabytes=421,
        annotations=("annotations.*", "VRBench_eval.jsonl"),
        read=layouts.vrbench,
    ),
    paper=Preset(
        source="no script was published; lmms-eval's task at Qwen3-VL's own sampling",
        max_new_tokens=1024,
        note="The prompt holds the human-written summary of the video, as the official one does.",
    ),
    official=Preset(source=f"{LMMS}/vrbench/vrbench_mcq.yaml, {_OPEN}", max_new_tokens=1024),
    lmms=Lmms(yaml="vrbench/vrbench_mcq.yaml", shows=fields("question", "options")),
    reason="A faithful port of the official prompt and scorer. lmms-eval asks everything twice, "
    "once for its judge; ours rates the reasoning of the same reply, and only by `judge`.",
    not_comparable="no script was published, and whether the paper's number is multiple choice or "
    "the judged overall is unknown",
    verdict="the score is the multiple-choice half; the reasoning is rated by a judge, "
    "`internvideo3 judge`, and its mean stands beside the score",
    kept=(
        *("options", "answer", "reasoning_type", "question", "original_answer"),
        *("reasoning_process", "judge_summary"),
    ),
    identify=lambda doc: str(doc["question_id"]),
    videos=lambda doc: (Path(str(doc["video_path"])).name,),
    family=lambda doc: str(doc["reasoning_type"]),
)


def _egoschema(name: str, title: str, questions: int, note: str, reason: str) -> Benchmark:
    full = name == "egoschema"
    return Benchmark(
        name=name,
        title=title,
        group="long",
        scorer="egoschema",
        metric="accuracy",
        column=(2, "EgoSchema") if full else None,
        data=Data(
            id="lmms-eval/egoschema",
            split="GENERATION" if full else "Subset",
            questions=questions,
            counted="verified",
            licence="Ego4D's terms for the videos; none stated for the questions",
            get="Hugging Face lmms-eval/egoschema, or egoschema/EgoSchema's questions.json"
            + ("" if full else f" and {layouts.SUBSET_ANSWERS}"),
            annotations=("annotations.*", "questions.json")
            + (() if full else (layouts.SUBSET_ANSWERS,)),
            read=layouts.egoschema if full else layouts.egoschema_subset,
            complete=None if full else layouts.answered_questions,
        ),
        paper=Preset(
            source=f"{SCRIPTS}/eval_egoschema.sh",
            fps=4,
            max_frames=2048,
            min_pixels=tokens(64),
            max_pixels=tokens(128),
            max_new_tokens=16,
            note=note,
        ),
        official=Preset(source=f"{LMMS}/egoschema/{name}.yaml, {_OPEN}", max_new_tokens=16),
        lmms=Lmms(yaml=f"egoschema/{name}.yaml", shows=fields("question", "option")),
        reason=reason,
        not_comparable="" if full else "500 of the 5,031 questions; the paper has all of them",
        verdict="there is no score here, since the answers are not public: the run leaves a "
        "submission file for the benchmark's server"
        if full
        else "",
        kept=("option", "answer", "video_idx"),
        identify=lambda doc: str(doc.get("question_idx") or doc["video_idx"]),
        videos=lambda doc: (f"{doc['video_idx']}.mp4",),
        length_s=lambda doc: 180.0,
        family=lambda doc: "all",
    )


EGOSCHEMA = _egoschema(
    "egoschema",
    "EgoSchema",
    5031,
    "Answers are not public: the run leaves a submission file for the benchmark's server.",
    "lmms-eval's prompt; its scoring posts to a public server and loses the run when that fails. "
    "Ours writes the submission file.",
)
EGOSCHEMA_SUBSET = _egoschema(
    "egoschema_subset",
    "EgoSchema (subset)",
    500,
    "The 500 questions whose answers are public.",
    "lmms-eval's prompt; its parser takes the first of several letters and draws one at random "
    "where it finds none, so scores are ours.",
)

BENCHMARKS = (
    VIDEOMME,
    VIDEOMME_V2,
    LONGVIDEOBENCH,
    LONGVIDEOBENCH_INTERLEAVED,
    MLVU,
    LVBENCH,
    VRBENCH,
    EGOSCHEMA,
    EGOSCHEMA_SUBSET,
)
