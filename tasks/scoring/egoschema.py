"""EgoSchema: five options; the subset has public answers, the full set is scored by a server.

Document: `option` (list of five, "A. text"), `answer` (0-4 as text; empty in the full set),
`video_idx`.

The server takes an integer 0-4 per video and defines no reading of text; the official reading here
is MMMU's parser, from which lmms-eval's derives, and a bare digit 0-4. Its random draw is not
copied: such a reply is unreadable.
"""

from .letters import letter, option_text, read_mmmu
from .multiple_choice import MultipleChoice
from .result import Doc


def _options(doc: Doc) -> list[str]:
    return [option_text(str(option)) for option in doc["option"]]


def _truth(doc: Doc) -> str | None:
    answer = str(doc["answer"] if doc.get("answer") is not None else "").strip()
    return letter(int(answer)) if answer in tuple("01234") else None


def _read(text: str, doc: Doc) -> str | None:
    digit = text.strip()
    return letter(int(digit)) if digit in tuple("01234") else read_mmmu(text, _options(doc))


BENCHMARK = MultipleChoice(
    name="egoschema",
    sources=(
        "egoschema/EgoSchema@505c787:validate.py",
        "MMMU-Benchmark/MMMU@44b45b5:eval/eval_utils.py",
    ),
    truth=_truth,
    options=_options,
    n_options=5,
    read=_read,
).build()
