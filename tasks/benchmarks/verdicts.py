"""What only a language model can score: the question to it, and how its answer is read.

Wording and reading are protocol, word for word as the named source has them, save for what is said
here. No network, no randomness: `harness/judge.py` asks.

- TempCompass, replies that no rule matches: llyx97/TempCompass@52d2b49:prompt_templates.py and
  @3cdb5d4:utils/eval_utils.py (`llm_output_to_rating`). Its captions: @3cdb5d4:eval_captioning.py;
  the judge answers the multiple-choice question about the same video and aspect from the caption.
- VRBench, the reasoning of a multiple-choice reply: OpenGVLab/VRBench@d45ed2f:evaluation/
  model_api/prompt.py and batch_evaluation_api_mp_time_sync.py. Kinds of question that the official
  code does not send to its judge have no form. The summary is cut at 10,000 characters as lmms-eval
  0.7.3 does.
- TOMATO, replies that no rule matches: yale-nlp/TOMATO@2161ce9:src/parse_result.py, without its
  sentence that asks for a random letter where the reply names no option.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from internvideo3.tasks.scoring.text import strip_thinking
from internvideo3.tasks.scoring.vrbench import SUMMARISED, UNIQUE, has_process

Doc = Mapping[str, Any]
_QA_SYSTEM = "You are an AI assistant for question answering."
_CORRECT = (
    "You will receive a {0}, the ground-truth answer and the prediction from a question answering "
    "(QA) model. Your task is to determine whether QA model prediction is correct, based on the "
    'question and ground-truth answer. If the prediction is correct, respond "Correct". If the '
    'prediction is incorrect, respond "Incorrect".'
)
_KINDS = {
    "multi-choice": ("multi-choice question", "Multi-Choice Question"),
    "yes_no": ("Yes/No question", "Yes/No Question"),
    "caption_matching": ("caption matching question", "Caption Matching Question"),
}
_CAPTION = """
You will receive a video description and a multi-choice question. Your task is to choose the \
correct answer and briefly explain the reason why you choose the answer. If none of the choice \
candidates are correct or the video description lacks enough information to answer the question, \
just answer "None of the choices are correct". Please organize your response in this format:
```
Reasoning: [Your reason to obtain the answer]
Answer: [Your answer]
```

Here are some examples of video description, multi-choice question and the expected answer:
```
Video Description: A person is palying football.
Multi-Choice Question:
What is the person doing in the video?
A. cooking
B. palying football
C. playing basketball
D. reading book
Reasoning: The video description mentions that the person is playing football.
Answer: B. palying football

Video Description: A bird is flying clockwise.
Multi-Choice Question:
In which direction is the bird flying?
A. backwark
B. counter-clockwise
C. clockwise
D. downward
Reasoning: The video description mentions that the bird is flying clockwise
Answer: C. clockwise

Video Description: An air balloon is inflating.
Multi-Choice Question:
What is happening to the air balloon?
A. exploding
B. getting smaller
C. flying
Reasoning: The video description mentions that the air balloon is inflating, while none of the \
coices can be explained as inflating.
Answer: None of the choices are correct
```
"""
_RATE_FORM = """
Output Format:
<rate>the score (0-10)</rate>.
<reason>Briefly explain the reason for the score.</reason>
"""
_RATE_UNIQUE = f"""
You are a reasoning process evaluation model. Given the question, your task is to compare the \
model's reasoning process with the correct reasoning process provided, and assess the accuracy of \
the model's reasoning. 
Based on the number of correct steps and the overall correctness, give a score between 0 and 10, \
where 10 means fully correct.

Evaluation Criteria:
    1. **Step-by-Step Match**: How closely each reasoning step aligns with the ground truth \
process. Highest weight (40%).
    2. **Logical Integrity**: Whether the reasoning maintains valid logical progression and \
complete argumentation (30%).
    3. **Factual Correctness**: Absence of factual errors conflicting with established truths (20%).
    4. **Process Clarity**: Clear articulation and organization of reasoning steps (10%).

    Scoring:
    - **0-3**: Multiple missing/critical deviations from correct steps (≤30% match), broken logic, \
severe factual errors, or incoherent presentation.
    - **4-6**: Partial step alignment (40-60% match), basic logical structure with gaps, minor \
factual slips, or ambiguous explanations.
    - **7-9**: Majority steps correct (70-90% match), sound logic with minor jumps, near-perfect \
factual accuracy, and clear presentation.
    - **10**: Full step correspondence (100% match), flawless logic, perfect factual accuracy, and \
exceptionally clear reasoning flow.

Please provide the reasons for your scoring at the end.{_RATE_FORM}"""
_RATE_OPEN = f"""
You are a reasoning process evaluation model. Given the question, your task is to evaluate the \
model's reasoning process with the correct reasoning process provided, and assess the accuracy of \
the model's reasoning. 
In addition to referring to the provided reasoning process and result, you may also assess the \
reasoning's validity based on the video summary. If the reasoning is logical and the result is \
reasonable, you can adjust the score accordingly. 
Based on the correctness and reasonableness of the reasoning process, provide a score between 0 \
and 10, where 10 means fully correct and reasonable.

Evaluation Criteria:
    1. **Relevance and Completeness**: Evaluate whether the reasoning process adequately addresses \
the question and covers all essential steps, even if the approach differs from the provided \
standard. (40%)
    2. **Logical Consistency**: Assess the logical progression, coherence, and structural \
integrity of the reasoning process (30%).
    3. **Factual Accuracy**: Check for correctness and the absence of significant factual errors \
(20%).
    4. **Clarity and Persuasiveness**: Consider the clarity, organization, and persuasiveness of \
the reasoning, including the explanation of alternative valid approaches (10%).

Scoring:
    - **0-3**: The reasoning process shows significant omissions, major logical inconsistencies, \
or severe factual errors, resulting in an unclear and unconvincing explanation.
    - **4-6**: The reasoning process partially addresses the question with some logical or factual \
issues, and the explanation may be somewhat ambiguous or incomplete.
    - **7-9**: The reasoning process is largely relevant and logically consistent, with minor \
issues in clarity or factual details, leading to a well-argued explanation.
    - **10**: The reasoning process fully addresses the question with impeccable logic, complete \
factual accuracy, and is presented in a clear and highly persuasive manner.
{_RATE_FORM}"""
_RATE = re.compile(r"<rate>(.*?)</rate>", re.DOTALL)
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One question to a judge."""

    system: str
    prompt: str
    max_tokens: int
    """Most tokens of the judge's answer."""
    read: Callable[[str], float | None]
    """The verdict in the judge's words, 0 to 1; None where they hold none."""
    wanted: str
    """What a verdict looks like, for a reader who gets none."""


def form_of(benchmark: str, doc: Doc, reply: str) -> Form | None:
    """The question to a judge about a reply, or None where the benchmark has no such question.

    Args:
        benchmark: the scorer's name.
        doc: the document, with the fields that scoring keeps.
        reply: the model's text; its thinking is not shown to the judge.
    """
    forms = {"tempcompass": _tempcompass, "vrbench": _vrbench, "tomato": _tomato}
    made = forms.get(benchmark)
    return None if made is None else made(doc, strip_thinking(reply) or "")


def _tempcompass(doc: Doc, reply: str) -> Form | None:
    reply = reply.replace("</s>", "")
    if doc["qtype"] == "captioning":
        return _caption(doc, reply.strip())
    kind, heading = _KINDS[doc["qtype"]]
    return Form(
        system=_QA_SYSTEM,
        prompt=f"{_CORRECT.format(kind)}\n{heading}:\n{doc['question']}\n"
        f"Ground-Truth Answer: {doc['answer']}\nModel Prediction: {reply}",
        max_tokens=128,
        read=read_correct,
        wanted="neither Correct nor Incorrect",
    )


def read_correct(said: str) -> float | None:
    """1 for Correct, 0 for Incorrect, whichever comes first in the official order."""
    if said.startswith("Correct"):
        return 1.0
    if "Incorrect" in said:
        return 0.0
    return 1.0 if "Correct" in said else None


def _caption(doc: Doc, reply: str) -> Form | None:
    if not doc.get("mc_question") or not doc.get("mc_answer"):
        return None
    truth = str(doc["mc_answer"]).split(". ")[0]
    return Form(
        system=_QA_SYSTEM,
        prompt=f"{_CAPTION}\nVideo Description:{reply}\nMulti-Choice Question:\n"
        f"{doc['mc_question']}\n",
        max_tokens=128,
        read=lambda said: read_option(said, truth),
        wanted="no answer at all",
    )


def read_option(said: str, truth: str) -> float | None:
    """1 if the judge's "Answer:" is the option with the true letter and names one option only."""
    if not said:
        return None
    answers = [line.strip() for line in said.split("\n") if "Answer" in line]
    answer = answers[-1].replace("Answer:", "").strip() if answers else said
    named = sum(answer.count(mark) for mark in ("A.", "B.", "C.", "D."))
    return float(answer.split(". ")[0] == truth and named == 1)


def _vrbench(doc: Doc, reply: str) -> Form | None:
    if not has_process(doc):
        return None
    steps = f"Reasoning Step:\n{doc['reasoning_process']}\n"
    answer = f"Answer:\n{doc.get('original_answer') or ''}\n"
    asked = f"# Question\n{doc['question']}\n# Model's reasoning process and Answer\n{reply}\n"
    truth = "# Correct reasoning step and Answer\n"
    ending = "Please provide your rating and brief reasons.\n"
    if doc["reasoning_type"] in UNIQUE:
        system, prompt = _RATE_UNIQUE, f"\n{asked}{truth}{steps}{answer}{ending}"
    else:
        summary = f"# Video Summary\n{doc.get('judge_summary') or ''}\n"
        system, prompt = _RATE_OPEN, f"\n{summary}{asked}{truth}{answer}{steps}{ending}"
    return Form(
        system=system,
        prompt=prompt,
        max_tokens=1024,
        read=read_rate,
        wanted="no <rate>0 to 10</rate>",
    )


def read_rate(said: str) -> float | None:
    """A tenth of the number between the rate tags, which is held to 0 to 10."""
    tagged = _RATE.search(said)
    number = _NUMBER.search(tagged.group(1)) if tagged else None
    return None if number is None else min(10.0, max(0.0, float(number.group()))) / 10


def judge_summary(doc: Doc) -> str:
    """The part of a VRBench video's summary that its judge is shown; empty for other questions."""
    shown = doc.get("reasoning_type") in SUMMARISED
    return str(doc.get("video_summary") or "")[:10_000] if shown else ""


def _tomato(doc: Doc, reply: str) -> Form:
    options = dict(zip(ascii_uppercase, map(str, doc["options"]), strict=False))
    letters = list(options)
    truth = letters[int(doc["answer"])]

    def read(said: str) -> float | None:
        return float(said == truth) if said in options else None

    return Form(
        system="",
        prompt="You are given a response, a list of multiple-choice options, and a index2answer "
        "mapping. You are required to extract the letter option from the GPT. \n    \n"
        f"    response: {reply}\n\n    all_choices: {letters}\n\n    index2answer: {options}\n\n"
        "Only output the single parsed letter from the response. No other texts are needed. \n\n"
        "Your extracted letter is: \n",
        max_tokens=16,
        read=read,
        wanted="no letter of an option alone",
    )
