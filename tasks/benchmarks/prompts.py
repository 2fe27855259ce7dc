"""Prompts of tasks that are ours, word for word as the named source has them: they are protocol."""

from string import ascii_uppercase

from .protocol import Doc

_SELECT = "Select the best answer to the following multiple-choice question based on the video."
_LETTER = "Answer with the option letter only."
_DSI = """You are a vision-language expert.
You are given a clip of video and your task is to answer a question about the video.
You only need to provide *ONE* correct answer selecting from the options listed below. 
For example, if you think the correct answer is 'A' from 'A. Above B. Under C. Front D. Behind', 
your response should **only** be '<answer>A</answer>'.
Please answer the question in this format strictly:
<answer>[A, B, C, or D]</answer>
"""
_TEMPCOMPASS_ENDINGS = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
    "captioning": "",
}


def lettered(options: list[str], mark: str = "{}. {}") -> str:
    """Options on lines of their own, `A. red`."""
    return "\n".join(mark.format(ascii_uppercase[i], option) for i, option in enumerate(options))


def nextqa(doc: Doc) -> str:
    """Of eval_nextqa.py."""
    options = lettered([str(doc[f"a{i}"]) for i in range(5)])
    return f"{_SELECT}\n{doc['question']}\n{options}\n{_LETTER}"


def tempcompass(doc: Doc) -> str:
    """Of eval_tempcompass.py; the question holds its options."""
    return f"{_SELECT}\n{doc['question']}\n{_LETTER}"


def tempcompass_official(doc: Doc) -> str:
    """Of llyx97/TempCompass: the question, and an ending by its kind."""
    return f"{doc['question']}{_TEMPCOMPASS_ENDINGS[doc['qtype']]}"


def tomato(doc: Doc) -> str:
    """Of eval_tomato.py."""
    return f"{_SELECT}\n{doc['question']}\n{lettered(list(doc['options']))}\n{_LETTER}"


def tomato_official(doc: Doc) -> str:
    """Of yale-nlp/TOMATO, as lmms-eval 0.7.3 has it."""
    options = dict(zip(ascii_uppercase, doc["options"], strict=False))
    return (
        "You will be provided with frames uniformly sampled from a video, the frames are provided "
        "in chronological order of the video. Analyze these frames and provide the answer to the "
        "question about the video content. Answer the multiple-choice question about the video "
        "content.\n\nYou must use these frames to answer the multiple-choice question; do not rely "
        "on any externel knowledge or commonsense. \n\n"
        f"<question> \n{doc['question']} \n</question>\n\n<options> \n{options} \n</options>\n\n"
        "Even if the information in these separate frames is not enough to answer the question, "
        "PLEASE TRY YOUR BEST TO GUESS AN ANSWER WHICH YOU THINK WOULD BE THE MOST POSSIBLE ONE "
        "BASED ON THE QUESTION. \n\nDO NOT GENERATE ANSWER SUCH AS 'NOT POSSIBLE TO DETERMINE.' \n"
    )


def videomme_v2(doc: Doc) -> str:
    """Of eval_videommev2.py, without subtitles."""
    return f"{_SELECT}\nQuestion: {doc['question']}\nOptions:\n{_text(doc['options'])}\n{_LETTER}"


def videomme_v2_subtitles(doc: Doc) -> str:
    """Of eval_videommev2.py, with subtitles."""
    return (
        f"{_SELECT} The subtitles of the video are also provided below.\n"
        f"Subtitles:\n{doc['iv3_subtitles']}\n\n"
        f"Question: {doc['question']}\nOptions:\n{_text(doc['options'])}\n{_LETTER}"
    )


def videomme_subtitles(doc: Doc) -> str:
    """Of lmms-eval 0.7.3 `videomme_w_subtitle`, in its Qwen3-VL form."""
    return (
        f"This video's subtitles are listed below: \n{doc['iv3_subtitles']}\n"
        f"Question: {doc['question']}\nOptions:\n{_text(doc['options'])}\n{_LETTER}"
    )


def longvideobench_subtitles(doc: Doc) -> str:
    """Ours: lmms-eval 0.7.3's text with the subtitles before it, as Video-MME does.

    The benchmark's own form puts them between single pictures: `longvideobench_interleaved`.
    """
    return (
        f"This video's subtitles are listed below: \n{doc['iv3_subtitles']}\n{doc['question']}\n"
        f"{_options(doc)}\nAnswer with the option's letter from the given choices directly.\n"
    )


def longvideobench_interleaved(doc: Doc) -> str:
    """Of longvideobench/LongVideoBench@2aa4f91:longvideobench/longvideobench_dataset.py."""
    ending = "Answer with the option's letter from the given choices directly."
    return f"Question: {doc['question']}\n{_options(doc)}\n{ending}"


def _options(doc: Doc) -> str:
    options = [doc.get(f"option{i}") for i in range(5)]
    return lettered([str(option) for option in options if option not in (None, "N/A")])


def mvbench(doc: Doc) -> str:
    """Of lmms-eval 0.7.3 `mvbench`."""
    options = lettered(list(doc["candidates"]), "({}) {}")
    return f"Question:{doc['question']}\nOption:\n{options}\nOnly give the best option.\n"


def motionbench(doc: Doc) -> str:
    """Of lmms-eval 0.7.3 `motionbench_full`."""
    options = "\n".join(f"{one['label']}. {one['text']}" for one in doc["options"])
    ending = "Answer with only the option letter (A, B, C, D, E, or F)."
    return f"{doc['question']}\n{options}\n{ending}"


def grounding(doc: Doc) -> str:
    """Of eval_grounding.py."""
    return (
        f"Given the video of duration {doc['duration']:.1f} seconds, find the start and end "
        "timestamps (in seconds) of the moment that best matches the following description: "
        f'"{str(doc["query"]).strip()}"\n'
    )


def charades(doc: Doc) -> str:
    """Of lmms-eval 0.7.3 `temporal_grounding_charades`."""
    return (
        "Please find the visual event described by a sentence in the video, determining its "
        "starting and ending times. The format should be: 'The event happens in the start time - "
        "end time'. For example, The event 'person turn a light on' happens in the 24.3 - 30.4 "
        f"seonds. Now I will give you the textual sentence: {doc['caption']}. "
        "Please return its start time and end time."
    )


def activitynet(doc: Doc) -> str:
    """The same question of ActivityNet Captions, whose sentence stands in another field."""
    return charades({"caption": str(doc["sentence"]).strip().rstrip(".")})


def qvhighlights(doc: Doc) -> str:
    """Ours: the benchmark scores ranked windows and prescribes no prompt."""
    return (
        "Find all moments of the video that match the description: "
        f'"{doc["query"]}". Answer with a JSON list of [start, end, confidence] in seconds, the '
        "best first, and nothing else."
    )


def dsi(doc: Doc) -> str:
    """Of SpatialVision/dsibench@af90adc:qwen_inference_code.py."""
    return f"{_DSI}\nQuestion:\n{doc['question']} {doc['options']}"


def mmsi_video(doc: Doc) -> str:
    """Of MMSI-Video-Bench: four parts of the annotation, one after the other."""
    parts = ("task_prompt", "user_prompt", "format_prompt")
    system = f"{doc['system_prompt']}\n" if doc.get("system_prompt") else ""
    return system + "".join(str(doc.get(part) or "") for part in parts)


def _text(options: object) -> str:
    return "\n".join(map(str, options)) if isinstance(options, list) else str(options)
