"""Table 3 of the paper: short video and motion."""

from . import layouts, prompts
from .protocol import LMMS, SCRIPTS, Benchmark, Data, Doc, Lmms, Preset, fields, tokens

_OPEN = "leaves frames open; Qwen3-VL's own sampling"
_WHOLE_VIDEO = "The pixel bounds are of a whole video, as the script sets them."
_JUDGED = "a reply that no rule matches waits for a judge, `internvideo3 judge`"
_MVBENCH_FOLDERS = {
    "object_interaction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "action_prediction": "star/Charades_segment",
    "action_localization": "sta/sta_video_segment",
    "moving_count": "clevrer/video_validation",
    "fine_grained_pose": "nturgbd_convert",
    "character_order": "perception/videos",
    "object_shuffle": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "moving_direction": "clevrer/video_validation",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "moving_attribute": "clevrer/video_validation",
    "action_antonym": "ssv2_video_mp4",
    "unexpected_action": "FunQA_test/test",
    "counterfactual_inference": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "action_count": "perception/videos",
}
"""Folder of each task's videos (lmms-eval@v0.7.3:lmms_eval/tasks/mvbench/utils.py)."""


def _budget(low: int, high: int) -> tuple[int, int]:
    """The whole-video pixels of the paper's .py scripts, which pass `min * 32` and `max * 512`."""
    return tokens(low) * 32, tokens(high) * 512


NEXTQA = Benchmark(
    name="nextqa",
    title="NExT-QA",
    group="short",
    scorer="nextqa",
    metric="accuracy",
    column=(3, "NextQA"),
    data=Data(
        id="doc-doc/NExT-QA",
        split="val.csv, multiple choice",
        questions=4996,
        counted="stated",
        licence="MIT for the annotations; videos of VidOR",
        get="github.com/doc-doc/NExT-QA dataset/nextqa/val.csv; videos of VidOR",
        annotations=("annotations.*", "val.csv"),
        read=layouts.nextqa,
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_nextqa.py",
        fps=4,
        video_pixels=_budget(512, 1024),
        max_new_tokens=64,
        prompt=prompts.nextqa,
        note=_WHOLE_VIDEO,
    ),
    official=Preset(
        source=f"doc-doc/NExT-QA@6b92588 has no prompt; the paper's, {_OPEN}",
        max_new_tokens=64,
        prompt=prompts.nextqa,
    ),
    reason="lmms-eval has the test split only, asks for no letter, draws unreadable answers at "
    "random and downloads language data when it is imported.",
    kept=(*(f"a{i}" for i in range(5)), "answer", "type"),
    identify=lambda doc: f"{doc['video']}_{doc['qid']}",
    videos=lambda doc: (f"{doc['video']}.mp4",),
    family=lambda doc: str(doc["type"]),
)

PERCEPTIONTEST = Benchmark(
    name="perceptiontest",
    title="PerceptionTest",
    group="short",
    scorer="perceptiontest",
    metric="accuracy",
    column=(3, "PerceptionTest"),
    data=Data(
        id="lmms-eval/PerceptionTest_Val",
        split="validation, mc_question_val",
        questions=19140,
        counted="stated",
        licence="as on the data set's page (DeepMind)",
        get="Hugging Face lmms-eval/PerceptionTest_Val, with its videos",
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_ptest.sh",
        fps=4,
        max_frames=512,
        min_pixels=tokens(256),
        max_pixels=tokens(256),
        max_new_tokens=32,
    ),
    official=Preset(
        source=f"{LMMS}/perceptiontest/val/perceptiontest_mc.yaml, {_OPEN}", max_new_tokens=32
    ),
    lmms=Lmms(
        yaml="perceptiontest/val/perceptiontest_mc.yaml", shows=fields("question", "options")
    ),
    reason="Prompt and reading are right for the letters it asks for; scores are ours, of the "
    "same reading.",
    kept=("options", "answer_id", "area"),
    identify=lambda doc: f"{doc['video_name']}_{doc['question_id']}",
    videos=lambda doc: (f"{doc['video_name']}.mp4",),
    family=lambda doc: str(doc["area"]),
)

MVBENCH = Benchmark(
    name="mvbench",
    title="MVBench",
    group="short",
    scorer="mvbench",
    metric="accuracy",
    column=(3, "MVBench"),
    data=Data(
        id="OpenGVLab/MVBench",
        split="train, 20 configurations",
        questions=4000,
        counted="stated",
        licence="as on the data set's page; videos of eleven sources",
        get="Hugging Face OpenGVLab/MVBench, revision `video`",
        annotations=("annotations.*", "json/*.json", "*.json", "*/*.parquet"),
        parts=tuple(_MVBENCH_FOLDERS),
        read=layouts.mvbench,
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_mvbench.sh",
        fps=4,
        max_frames=256,
        min_pixels=tokens(256),
        max_pixels=tokens(768),
        max_new_tokens=16,
        prompt=prompts.mvbench,
        note="The script's 1,024 tokens a frame are cut to 768 by qwen-vl-utils.",
    ),
    official=Preset(source=f"{LMMS}/mvbench, {_OPEN}", max_new_tokens=16, prompt=prompts.mvbench),
    reason="lmms-eval has no number for all twenty tasks, leaves empty answers out of the "
    'denominator and reads "a" as A.',
    kept=("candidates", "answer", "task_type"),
    identify=lambda doc: f"{doc['task_type']}/{doc['video']}/{doc['question'][:80]}",
    videos=lambda doc: (f"{_MVBENCH_FOLDERS[doc['task_type']]}/{doc['video']}",),
    family=lambda doc: str(doc["task_type"]),
)

TOMATO = Benchmark(
    name="tomato",
    title="TOMATO",
    group="short",
    scorer="tomato",
    metric="accuracy",
    column=(3, "Tomato"),
    data=Data(
        id="lmms-eval/TOMATO",
        split="test",
        questions=1484,
        counted="stated",
        licence="none found in its repository",
        get="github.com/yale-nlp/TOMATO data/*.json and its videos",
        annotations=("annotations.*", "data/*.json", "data/*.parquet"),
        read=layouts.tomato,
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_tomato.py",
        fps=4,
        video_pixels=_budget(1024, 1024),
        max_new_tokens=64,
        prompt=prompts.tomato,
        note=_WHOLE_VIDEO,
    ),
    official=Preset(
        source=f"yale-nlp/TOMATO@fe2025f, {LMMS}/tomato",
        max_frames=16,
        fps=30,
        max_new_tokens=1024,
        prompt=prompts.tomato_official,
        note="16 frames spread over the video, as TOMATO's paper has it.",
    ),
    reason='lmms-eval\'s parser reads "D. Counter-clockwise" as C and "Answer: C" as A.',
    verdict=_JUDGED,
    kept=("options", "answer", "reason_type", "demonstration_type"),
    identify=lambda doc: f"{doc['reason_type']}/{doc['key']}/{doc['question'][:80]}",
    videos=lambda doc: (f"{doc['demonstration_type']}/{doc['key']}.mp4",),
    family=lambda doc: str(doc["reason_type"]),
)

MOTIONBENCH = Benchmark(
    name="motionbench",
    title="MotionBench",
    group="short",
    scorer="motionbench",
    metric="accuracy",
    column=(3, "MotionBench"),
    data=Data(
        id="THUDM/MotionBench",
        split="dev: questions with a public answer",
        questions=4018,
        counted="stated",
        licence="CC BY-NC-SA 4.0",
        get="github.com/THUDM/MotionBench data/video_info.meta.jsonl; videos from Hugging Face "
        "zai-org/MotionBench",
        annotations=("annotations.*", "video_info.meta.jsonl"),
        read=layouts.motionbench,
    ),
    paper=Preset(
        source=f"{SCRIPTS}/eval_motionbench.sh",
        fps=4,
        max_frames=1024,
        min_pixels=tokens(256),
        max_pixels=tokens(256),
        max_new_tokens=64,
        prompt=prompts.motionbench,
    ),
    official=Preset(
        source=f"{LMMS}/motionbench, {_OPEN}", max_new_tokens=64, prompt=prompts.motionbench
    ),
    reason="lmms-eval fetches the annotations at every start and answers without the video where "
    "it is missing; ours reads local files and fails.",
    kept=("options", "answer", "question_type"),
    identify=lambda doc: str(doc.get("uid") or doc["id"]),
    videos=lambda doc: (str(doc["video_path"]),),
    family=lambda doc: str(doc["question_type"]),
)


def _tempcompass(name: str, title: str, questions: int, patterns: tuple[str, ...]) -> Benchmark:
    whole = name != "tempcompass"
    return Benchmark(
        name=name,
        title=title,
        group="classic" if whole else "short",
        scorer="tempcompass",
        metric="accuracy",
        column=None if whole else (3, "TempCompass"),
        folder="tempcompass",
        data=Data(
            id="lmms-eval/TempCompass",
            split="test" if whole else "test, multi-choice",
            questions=questions,
            counted="stated",
            licence="CC BY-NC 4.0",
            get="github.com/llyx97/TempCompass questions/*.json, with its videos",
            annotations=patterns,
            read=layouts.tempcompass,
            complete=layouts.captions_with_choices,
        ),
        paper=Preset(
            source=f"{SCRIPTS}/eval_tempcompass.py",
            fps=4,
            video_pixels=_budget(512, 1024),
            max_new_tokens=64,
            prompt=prompts.tempcompass_official if whole else prompts.tempcompass,
            note=_WHOLE_VIDEO,
        ),
        official=Preset(
            source=f"llyx97/TempCompass@e1b4631, {LMMS}/tempcompass, {_OPEN}",
            max_new_tokens=128,
            prompt=prompts.tempcompass_official,
        ),
        reason="lmms-eval sends what its rules do not match to a network judge, eleven times, and "
        "then gives 0; ours counts it as judge needed, and asks only where `judge` is run.",
        verdict=_JUDGED + ("; so does every caption" if whole else ""),
        kept=("qtype", "question", "answer", "dim", "mc_question", "mc_answer"),
        identify=_tempcompass_id,
        videos=lambda doc: (f"{doc['video_id']}.mp4",),
        family=lambda doc: str(doc["dim"]),
        answer=_tempcompass_answer if whole else None,
    )


def _tempcompass_id(doc: Doc) -> str:
    return f"{doc['qtype']}/{doc['video_id']}/{doc['dim']}/{doc['question'][:60]}"


def _tempcompass_answer(doc: Doc) -> str:
    return str(doc["answer"])


TEMPCOMPASS = _tempcompass(
    "tempcompass",
    "TempCompass",
    1580,
    ("annotations.*", "multi-choice.*", "multi-choice/*"),
)
TEMPCOMPASS_FULL = _tempcompass(
    "tempcompass_full",
    "TempCompass (four kinds)",
    7540,
    (
        *("multi-choice.*", "yes_no.*", "caption_matching.*", "captioning.*"),
        *("multi-choice/*", "yes_no/*", "caption_matching/*", "captioning/*"),
    ),
)

BENCHMARKS = (NEXTQA, PERCEPTIONTEST, MVBENCH, TOMATO, MOTIONBENCH, TEMPCOMPASS, TEMPCOMPASS_FULL)
