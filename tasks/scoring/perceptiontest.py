"""Perception Test multiple choice (validation): three options, top-1 accuracy.

Document: `options` (list), `answer_id` (index), `area`, `reasoning`, `tag`.

The official code compares option ids and defines no reading of text; the official reading here is
that of lmms-eval 0.7.3 (the first standalone capital A-D), and a bare digit.
"""

import re

from .averages import field
from .letters import indexed_letter, letter
from .multiple_choice import MultipleChoice
from .result import Doc

_LETTER = re.compile(r"\b([A-D])\b")


def _read(text: str, doc: Doc) -> str | None:
    digit = text.strip()
    if digit in tuple("012"):
        return letter(int(digit))
    match = _LETTER.search(text)
    return match.group(1) if match else None


BENCHMARK = MultipleChoice(
    name="perceptiontest",
    sources=(
        "google-deepmind/perception_test@6bd0642:baselines/mc_vqa.ipynb",
        "EvolvingLMMs-Lab/lmms-eval@v0.7.3:lmms_eval/tasks/perceptiontest/val/utils.py",
    ),
    truth=lambda doc: indexed_letter(doc["answer_id"]),
    options=lambda doc: [str(option) for option in doc.get("options") or ()],
    n_options=3,
    read=_read,
    families=field("area"),
).build()
