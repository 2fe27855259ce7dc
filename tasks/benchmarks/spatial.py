"""Table 4 of the paper, spatial reasoning; and DSI-Bench, which its section 5 names."""

from internvideo3.tasks.scoring.vsibench import CHOICES

from . import layouts, prompts
from .protocol import LMMS, SCRIPTS, Benchmark, Data, Doc, Lmms, Preset, fields, no_videos, tokens

_OPEN = "leaves frames open; Qwen3-VL's own sampling"


def _ground_truth(doc: Doc) -> str:
    return str(doc["ground_truth"])


def _shown(doc: Doc) -> tuple[str, ...]:
    return ("question", *(("options",) if doc["question_type"] in CHOICES else ()))


VSIBENCH = Benchmark(
    name="vsibench",
    title="VSI-Bench",
    group="spatial",
    scorer="vsibench",
    metric="mean of tasks",
    column=(4, "VSIBench"),
    data=Data(
        id="nyu-visionx/VSI-Bench",
        split="test, full",
        questions=5130,
        counted="stated",
        licence="Apache-2.0 for the questions; ScanNet, ScanNet++ and ARKitScenes terms behind",
        get="Hugging Face nyu-visionx/VSI-Bench, with its videos",
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_vsibench.sh",
        fps=4,
        max_frames=256,
        min_pixels=tokens(1024),
        max_pixels=tokens(1024),
        max_new_tokens=16,
    ),
    official=Preset(source=f"{LMMS}/vsibench/vsibench.yaml, {_OPEN}", max_new_tokens=16),
    lmms=Lmms(yaml="vsibench/vsibench.yaml", shows=_shown),
    reason="Documents and prompt are lmms-eval's; its numbers are read more leniently than "
    "officially, and a limited run raises KeyError, so scores are ours.",
    kept=("question_type", "ground_truth", "options"),
    identify=lambda doc: str(doc["id"]),
    videos=lambda doc: (f"{doc['dataset']}/{doc['scene_name']}.mp4",),
    family=lambda doc: str(doc["question_type"]),
    answer=_ground_truth,
)

MMSI_BENCH = Benchmark(
    name="mmsi_bench",
    title="MMSI-Bench",
    group="spatial",
    scorer="mmsi_bench",
    metric="accuracy",
    column=(4, "MMSIBench"),
    data=Data(
        id="RunsenXu/MMSI-Bench",
        split="test",
        questions=1000,
        counted="stated",
        licence="as on the data set's page",
        get="Hugging Face RunsenXu/MMSI-Bench: the parquet file holds the images",
        annotations=("annotations.*", "*.parquet"),
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_mmsi.sh",
        min_pixels=tokens(256),
        max_pixels=tokens(1024),
        max_new_tokens=2048,
        note="Several images, no video.",
    ),
    official=Preset(source=f"{LMMS}/mmsi_bench/msr_bench.yaml", max_new_tokens=2048),
    lmms=Lmms(yaml="mmsi_bench/msr_bench.yaml", shows=fields("question")),
    reason="Documents and prompt are lmms-eval's; it takes letters A-F in either case out of any "
    "word, so scores are ours.",
    kept=("question", "answer", "question_type"),
    identify=lambda doc: str(doc["id"]),
    videos=no_videos,
    images=lambda doc: doc["images"],
    family=lambda doc: str(doc["question_type"]),
)

_MMSI_VIDEO = "InternRobotics/MMSI-Video-Bench@2bd23da"
_MMSI_VIDEO_PIXELS = 360 * 420


def _mmsi_rate(doc: Doc, frames: int) -> float | None:
    """The official rate: frames over the seconds of all videos, at most the annotated base rate."""
    seconds = 0.0
    for video in doc["video_list"]:
        if video.get("start") is None or video.get("end") is None:
            return None
        seconds += float(video["end"]) - float(video["start"])
    base = doc["video_list"][0].get("base_fps") if doc["video_list"] else None
    if seconds <= 0:
        return None
    return frames / seconds if base is None else min(float(base), frames / seconds)


def _mmsi_setting(frames: int, name: str) -> Preset:
    """A setting of the benchmark's own code: frames of all videos together."""
    return Preset(
        source=f"{_MMSI_VIDEO}:dataset.py, inference.py, models/qwenvl.py, {name}",
        fps=30,
        max_frames=frames,
        question_frames=frames,
        min_pixels=tokens(128),
        max_pixels=_MMSI_VIDEO_PIXELS,
        max_new_tokens=1024,
        prompt=prompts.mmsi_video,
        note=f"{frames} frames spread over all videos of a question together.",
    )


def _mmsi_video(name: str, title: str, paper: Preset, official: Preset) -> Benchmark:
    whole = name == "mmsi_video"
    return Benchmark(
        name=name,
        title=title,
        group="spatial" if whole else "classic",
        scorer="mmsi_video",
        metric="accuracy",
        column=(4, "MMSIBench-Video") if whole else None,
        folder="mmsi_video",
        data=Data(
            id="oscarqjh/MMSI-Video-Bench_lmmseval",
            split="test",
            questions=1106,
            counted="verified",
            licence="CC BY-NC 4.0",
            get="Hugging Face rbler/MMSI-Video-Bench (mmsivideo.json), or "
            "oscarqjh/MMSI-Video-Bench_lmmseval, with videos and ref_images",
            annotations=("annotations.*", "mmsivideo.json"),
            read=layouts.mmsi_video,
        ),
        paper=paper,
        official=official,
        reason="lmms-eval's words; ours puts videos and images where the prompt names them, from "
        "local folders, and reads answers as officially.",
        not_comparable="" if whole else "the paper's script shows videos at 4 fps",
        kept=("ground_truth", "type", "user_prompt"),
        identify=lambda doc: str(
            doc.get("id") or doc.get("question_id") or doc["user_prompt"][:120]
        ),
        videos=lambda doc: [one["path"] for one in doc["video_list"]],
        images=lambda doc: doc["ref_images"],
        rate=_mmsi_rate,
        family=lambda doc: str(doc["type"]),
        question=lambda doc: str(doc["user_prompt"]),
        answer=_ground_truth,
        interleaved=True,
    )


_UNIFORM_50 = _mmsi_setting(50, "Uniform-50")
_SUFFICIENT = _mmsi_setting(300, "Sufficient-Coverage")
MMSI_VIDEO = _mmsi_video(
    "mmsi_video",
    "MMSI-Video-Bench",
    Preset(
        source=f"{SCRIPTS}/eval_mmsi_video.sh",
        fps=4,
        max_frames=256,
        min_pixels=tokens(256),
        max_pixels=tokens(768),
        max_new_tokens=1024,
        prompt=prompts.mmsi_video,
        note="The script's 1,024 tokens a frame are cut to 768 by qwen-vl-utils.",
    ),
    _UNIFORM_50,
)
MMSI_VIDEO_SC = _mmsi_video(
    "mmsi_video_sc",
    "MMSI-Video-Bench (Sufficient-Coverage)",
    _SUFFICIENT,
    _SUFFICIENT,
)

DSI_BENCH = Benchmark(
    name="dsi_bench",
    title="DSI-Bench",
    group="spatial",
    scorer="dsi_bench",
    metric="sample-wise accuracy",
    data=Data(
        id="Viglong/DSI-Bench",
        split="std, reverse, hflip, reverse_hflip",
        questions=6800,
        counted="stated",
        licence="as on the data set's page",
        get="Hugging Face Viglong/DSI-Bench: four csv files and four folders of videos",
        annotations=("metadatas/*.csv", "std.csv", "reverse.csv", "hflip.csv", "reverse_hflip.csv"),
        parts=("std", "reverse", "hflip", "reverse_hflip"),
        read=layouts.dsi_bench,
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_dsi.sh",
        fps=4,
        max_frames=1024,
        min_pixels=tokens(256),
        max_pixels=tokens(256),
        max_new_tokens=64,
        prompt=prompts.dsi,
        note="The script's task is in no published harness; prompt and scorer are the official "
        "ones.",
    ),
    official=Preset(
        source="SpatialVision/dsibench@af90adc:qwen_inference_code.py",
        fps=6,
        max_new_tokens=2048,
        prompt=prompts.dsi,
    ),
    reason="lmms-eval has no such task.",
    not_comparable="the paper names the benchmark and prints no number",
    kept=("GT", "cate", "options", "aug", "row", "relative_path", "question"),
    identify=lambda doc: f"{doc['aug']}/{doc['relative_path']}/{doc['question'][:80]}",
    videos=lambda doc: (f"{doc['aug']}/{doc['relative_path']}",),
    family=lambda doc: str(doc["cate"]),
    answer=lambda doc: str(doc["GT"]),
)

BENCHMARKS = (VSIBENCH, MMSI_BENCH, MMSI_VIDEO, MMSI_VIDEO_SC, DSI_BENCH)
