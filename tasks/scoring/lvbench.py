"""LVBench: multiple choice A-D, micro accuracy; a question counts in each of its types.

Document: `answer` (letter), `question` (with options) or `options`, `question_type` (list).

Official quirk, copied: the reply is compared as it is, so that only a bare letter can be right.
The function that cleans replies (lvbench/utils/answer_util.py) is called by no script.
"""

from .averages import field
from .letters import lettered_options, option_text, public_letter
from .multiple_choice import MultipleChoice, only_letter
from .result import Doc


def _options(doc: Doc) -> list[str]:
    given = doc.get("options") or lettered_options(str(doc.get("question") or ""))
    return [option_text(str(option)) for option in given]


BENCHMARK = MultipleChoice(
    name="lvbench",
    sources=("THUDM/LVBench@f998d95:lvbench/metrics/compute_accuracy.py",),
    truth=lambda doc: public_letter(doc["answer"]),
    options=_options,
    n_options=4,
    read=lambda text, doc: only_letter(text, 26),
    families=field("question_type"),
).build()
