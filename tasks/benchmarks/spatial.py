"""Table 4 of the paper, spatial reasoning; and DSI-Bench, which its section 5 names."""

from . import layouts, prompts
from .protocol import LMMS, SCRIPTS, Benchmark, Data, Doc, Lmms, Preset, tokens

_OPEN = "leaves frames open; Qwen3-VL's own sampling"


def _ground_truth(doc: Doc) -> str:
    return str(doc["ground_truth"])


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
    lmms=Lmms(yaml="vsibench/vsibench.yaml"),
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
    lmms=Lmms(yaml="mmsi_bench/msr_bench.yaml"),
    reason="Documents and prompt are lmms-eval's; it takes letters A-F in either case out of any "
    "word, so scores are ours.",
    kept=("question", "answer", "question_type"),
    identify=lambda doc: str(doc["id"]),
    videos=lambda doc: (),
    images=lambda doc: doc["images"],
    family=lambda doc: str(doc["question_type"]),
)

MMSI_VIDEO = Benchmark(
    name="mmsi_video",
    title="MMSI-Video-Bench",
    group="spatial",
    scorer="mmsi_video",
    metric="accuracy",
    column=(4, "MMSIBench-Video"),
    data=Data(
        id="oscarqjh/MMSI-Video-Bench_lmmseval",
        split="test",
        questions=1106,
        counted="verified",
        licence="CC BY-NC 4.0",
        get="Hugging Face oscarqjh/MMSI-Video-Bench_lmmseval, with videos and ref_images",
        read=layouts.mmsi_video,
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_mmsi_video.sh",
        fps=4,
        max_frames=256,
        min_pixels=tokens(256),
        max_pixels=tokens(768),
        max_new_tokens=1024,
        prompt=prompts.mmsi_video,
        note="The script's 1,024 tokens a frame are cut to 768 by qwen-vl-utils.",
    ),
    official=Preset(
        source="InternRobotics/MMSI-Video-Bench@b8da92c, Uniform-50",
        fps=30,
        max_frames=50,
        max_new_tokens=1024,
        prompt=prompts.mmsi_video,
        note="50 frames spread over each video.",
    ),
    reason="lmms-eval's words; ours puts videos and images where the prompt names them, from "
    "local folders, and reads answers as officially.",
    kept=("ground_truth", "type"),
    identify=lambda doc: str(doc.get("id") or doc.get("question_id") or doc["user_prompt"][:120]),
    videos=lambda doc: [one["path"] for one in doc["video_list"]],
    images=lambda doc: doc["ref_images"],
    family=lambda doc: str(doc["type"]),
    question=lambda doc: str(doc["user_prompt"]),
    answer=_ground_truth,
    interleaved=True,
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
    kept=("GT", "cate", "options", "aug"),
    identify=lambda doc: f"{doc['aug']}/{doc['relative_path']}/{doc['question'][:80]}",
    videos=lambda doc: (f"{doc['aug']}/{doc['relative_path']}",),
    family=lambda doc: str(doc["cate"]),
    answer=lambda doc: str(doc["GT"]),
)

BENCHMARKS = (VSIBENCH, MMSI_BENCH, MMSI_VIDEO, DSI_BENCH)
