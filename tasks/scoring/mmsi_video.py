r"""MMSI-Video-Bench: multiple choice A-F, micro accuracy.

Document: `ground_truth` (letter, or "A. text"), `type` or `question_type`, and `user_prompt` with
the options, which the plain rule reads.

Official reading, first form that is present: `boxed{…}`, `"answer":`, "answer is", "Answer: ",
else the first sentence; blanks, quotes and colons are deleted, and what is left must be one letter.
A form that is present and holds no letter ends the search: unreadable, 0. "no answer" anywhere is
unreadable too.
"""

from .averages import field
from .letters import options_in, public_letter
from .multiple_choice import MultipleChoice
from .result import Doc

LETTERS = tuple("ABCDEF")
_NOISE = str.maketrans("", "", " \"'\n:")
_LEADS = ('"answer":', "answer is", "Answer: ")


def _read(text: str, doc: Doc) -> str | None:
    text = text.replace("<answer>", "").replace("</answer>", "")
    if "no answer" in text:
        return None
    lead = next((lead for lead in _LEADS if lead in text), None)
    if "boxed{" in text:
        found = text.split("boxed{")[1].split("}")[0]
    elif lead is not None:
        found = text.split(lead)[-1].split(",")[0].split(".")[0]
    else:
        found = text.split(".")[0]
    found = found.translate(_NOISE)
    return found if found in LETTERS else None


BENCHMARK = MultipleChoice(
    name="mmsi_video",
    sources=("InternRobotics/MMSI-Video-Bench@b8da92c:evaluation.py",),
    truth=lambda doc: public_letter(doc["ground_truth"]),
    options=lambda doc: options_in(str(doc.get("user_prompt") or "")),
    n_options=6,
    read=_read,
    families=field("type", "question_type"),
).build()
