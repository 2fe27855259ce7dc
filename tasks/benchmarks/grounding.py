"""Table 4 of the paper, grounding: TimeLens-Bench; and the classic annotations beside it."""

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
    fields,
    tokens,
)


def _span(doc: Doc) -> str:
    start_s, end_s = doc["span"][0]
    return f"{start_s:g} - {end_s:g}"


def _length(doc: Doc) -> float | None:
    value = doc.get("duration")
    return None if value is None else float(value)


def _timelens(part: str, title: str, column: str, questions: int) -> Benchmark:
    return Benchmark(
        name=f"timelens_{part}",
        title=title,
        group="grounding",
        scorer="timelens",
        metric="mIoU",
        column=(4, column),
        data=Data(
            id="kcz358/timelens",
            split=part,
            questions=questions,
            counted="verified" if part == "charades" else "stated",
            licence="TimeLens-Bench's own for the annotations; the data set's for the videos",
            get=f"TimeLens-Bench ({part}-timelens.json), or Hugging Face kcz358/timelens; videos "
            "of the original data set",
            annotations=("annotations.*", f"{part}-timelens.json"),
            read=layouts.timelens,
        ),
        paper=Preset(
            source=f"{SCRIPTS}/eval_grounding.py",
            video_pixels=QWEN3_VL_VIDEO,
            max_new_tokens=128,
            prompt=prompts.grounding,
            note="The script's 4 fps and pixel bounds are ignored as it passes them. It reads the "
            "first two numbers of a reply; scores here are TimeLens' own.",
        ),
        official=Preset(
            source=f"TencentARC/TimeLens@5d90c06, {LMMS}/timelens",
            video_pixels=(tokens(64), 2 * tokens(14_336)),
            max_new_tokens=512,
            note="Its floor of 64 tokens a frame is not applied.",
        ),
        lmms=Lmms(yaml=f"timelens/timelens_{part}.yaml", shows=fields("query")),
        reason="Documents and the official prompt are lmms-eval's; it does not round to seconds as "
        "the official scorer does, so scores are ours, with both roundings.",
        kept=("span", "duration"),
        identify=lambda doc: f"{doc['video_path']}/{doc['query']}/{doc['span'][0]}",
        videos=lambda doc: (str(doc["video_path"]),),
        length_s=_length,
        family=lambda doc: "moment",
        question=lambda doc: str(doc["query"]),
        answer=_span,
        answer_type="span",
        evidence=lambda doc: doc["span"],
    )


CLASSIC_CHARADES = Benchmark(
    name="charades_sta",
    title="Charades-STA (classic)",
    group="classic",
    scorer="charades_sta",
    metric="mIoU",
    data=Data(
        id="lmms-eval/charades_sta",
        split="test",
        questions=3720,
        counted="stated",
        licence="Charades' terms: non-commercial",
        get="charades_sta_test.txt (github.com/26hzhang/VSLNet), or Hugging Face "
        "lmms-eval/charades_sta; videos Charades_v1_480",
        annotations=("annotations.*", "charades_sta_test.txt"),
        read=layouts.charades,
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_chara.sh (legacy)",
        fps=4,
        max_frames=512,
        min_pixels=tokens(256),
        max_pixels=tokens(256),
        max_new_tokens=50,
        prompt=prompts.charades,
    ),
    official=Preset(source=f"{LMMS}/charades_sta", max_new_tokens=50, prompt=prompts.charades),
    reason="lmms-eval sorts reversed spans and reads few forms; ours scores as TimeLens does.",
    not_comparable="the paper's column is TimeLens-Bench, not these annotations",
    kept=("timestamp",),
    identify=lambda doc: f"{doc['video']}/{doc['caption']}/{doc['timestamp']}",
    videos=lambda doc: (str(doc["video"]),),
    family=lambda doc: "moment",
    question=lambda doc: str(doc["caption"]),
    answer=lambda doc: "{:g} - {:g}".format(*doc["timestamp"]),
    answer_type="span",
    evidence=lambda doc: (doc["timestamp"],),
)

CLASSIC_ACTIVITYNET = Benchmark(
    name="activitynet_captions",
    title="ActivityNet Captions (classic)",
    group="classic",
    scorer="activitynet_captions",
    metric="mIoU",
    data=Data(
        id="ActivityNet Captions",
        split="val_1.json, val_2.json",
        questions=34_537,
        counted="stated",
        licence="ActivityNet Captions' terms",
        get="val_1.json and val_2.json (github.com/26hzhang/VSLNet); videos of ActivityNet",
        annotations=("annotations.*", "val_*.json"),
        read=layouts.activitynet,
    ),
    paper=Preset(
        source="not in the paper; the settings of eval_grounding.py",
        video_pixels=QWEN3_VL_VIDEO,
        max_new_tokens=128,
        prompt=prompts.activitynet,
    ),
    official=Preset(
        source="no prompt is prescribed; that of Charades-STA in lmms-eval",
        max_new_tokens=50,
        prompt=prompts.activitynet,
    ),
    reason="lmms-eval has no such task.",
    not_comparable="the paper's column is TimeLens-Bench, not these annotations",
    kept=("timestamps", "duration"),
    identify=lambda doc: f"{doc['video_id']}/{doc['timestamps'][0]}/{doc['sentence'].strip()}",
    videos=lambda doc: (f"{doc['video_id']}.mp4",),
    length_s=_length,
    family=lambda doc: "moment",
    question=lambda doc: str(doc["sentence"]).strip(),
    answer=lambda doc: "{:g} - {:g}".format(*doc["timestamps"][0]),
    answer_type="span",
    evidence=lambda doc: doc["timestamps"][:1],
)

CLASSIC_QVHIGHLIGHTS = Benchmark(
    name="qvhighlights",
    title="QVHighlights (classic)",
    group="classic",
    scorer="qvhighlights",
    metric="mAP",
    data=Data(
        id="jayleicn/moment_detr",
        split="highlight_val_release.jsonl",
        questions=1550,
        counted="stated",
        licence="CC BY-NC-SA 4.0",
        get="github.com/jayleicn/moment_detr data/highlight_val_release.jsonl; videos of "
        "QVHighlights",
        annotations=("annotations.*", "highlight_val_release.jsonl"),
    ),
    paper=Preset(
        source="not in the paper; the settings of eval_grounding.py",
        video_pixels=QWEN3_VL_VIDEO,
        max_new_tokens=256,
        prompt=prompts.qvhighlights,
    ),
    official=Preset(
        source="jayleicn/moment_detr@b7e553a prescribes no prompt",
        max_new_tokens=256,
        prompt=prompts.qvhighlights,
    ),
    reason="lmms-eval has no such task.",
    not_comparable="the paper's column is TimeLens-Bench mIoU, not R1 and mAP of ranked windows",
    kept=("relevant_windows", "duration", "qid"),
    identify=lambda doc: str(doc["qid"]),
    videos=lambda doc: (f"{doc['vid']}.mp4",),
    length_s=_length,
    family=lambda doc: "moment",
    question=lambda doc: str(doc["query"]),
    answer=lambda doc: ", ".join("{:g} - {:g}".format(*w) for w in doc["relevant_windows"]),
    answer_type="windows",
    evidence=lambda doc: doc["relevant_windows"],
)

BENCHMARKS = (
    _timelens("qvhighlights", "QVHighlights (TimeLens)", "QVHighlights", 1541),
    _timelens("charades", "Charades-STA (TimeLens)", "Charades-STA", 3363),
    _timelens("activitynet", "ActivityNet (TimeLens)", "ANet", 4500),
    CLASSIC_QVHIGHLIGHTS,
    CLASSIC_CHARADES,
    CLASSIC_ACTIVITYNET,
)
