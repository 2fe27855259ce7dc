"""MMSI-Bench: multiple choice A-D over several images, micro accuracy.

Document: `answer` (letter), `question` (with its options), `question_type`.

Official reading: what stands between double backticks, else single ones, else everything; there the
first standalone capital A-D that is not followed by a blank and a letter ("A bike" is no answer).
"""

import re

from .averages import field
from .letters import options_in, public_letter
from .multiple_choice import MultipleChoice
from .result import Doc

_QUOTED = (re.compile(r"``([^`]*)``"), re.compile(r"`([^`]*)`"))
_LETTER = re.compile(r"\b[A-D]\b(?!\s[a-zA-Z])")


def _read(text: str, doc: Doc) -> str | None:
    for pattern in _QUOTED:
        quoted = pattern.search(text)
        text = quoted.group(1) if quoted else text
    match = _LETTER.search(text)
    return match.group() if match else None


BENCHMARK = MultipleChoice(
    name="mmsi_bench",
    sources=("InternRobotics/MMSI-Bench@5de2f3d:vlmeval/dataset/mmsi_bench.py",),
    truth=lambda doc: public_letter(doc["answer"]),
    options=lambda doc: options_in(str(doc.get("question") or "")),
    n_options=4,
    read=_read,
    families=field("question_type", "category"),
).build()
