"""NExT-QA multiple choice: five options, micro accuracy; groups CW CH TN TC DC DL DO and C, T, D.

Document: `a0` … `a4`, `answer` (index), `type` (TP counts as TN).

The official code compares integers and defines no reading of text; the official reading here is
MMMU's parser, from which lmms-eval's derives, and a bare digit 0-4. A reply that it cannot read is
unreadable, never a random letter.
"""

from collections.abc import Sequence

from .averages import group_means, summarise
from .letters import indexed_letter, letter, read_mmmu
from .multiple_choice import MultipleChoice
from .result import Doc, Row, Rule, TaskResult


def _options(doc: Doc) -> list[str]:
    return [str(doc[f"a{i}"]).strip() for i in range(5)]


def _read(text: str, doc: Doc) -> str | None:
    digit = text.strip()
    return letter(int(digit)) if digit in tuple("01234") else read_mmmu(text, _options(doc))


def _type(doc: Doc) -> tuple[str, ...]:
    kind = doc.get("type")
    return () if not kind else ("TN" if kind == "TP" else str(kind),)


def aggregate(benchmark: str, rows: Sequence[Row], rule: Rule) -> TaskResult:
    """Average over all questions, by type, and by causal (C), temporal (T), descriptive (D)."""
    broad = group_means(rows, lambda doc: [kind[0] for kind in _type(doc)])
    extra = {f"Acc_{name}": group.value for name, group in broad.items()}
    return summarise(benchmark, rows, rule, families=_type, extra=extra)


BENCHMARK = MultipleChoice(
    name="nextqa",
    sources=(
        "doc-doc/NExT-QA@6b92588:eval_mc.py",
        "MMMU-Benchmark/MMMU@44b45b5:eval/eval_utils.py",
    ),
    truth=lambda doc: indexed_letter(doc["answer"]),
    options=_options,
    n_options=5,
    read=_read,
    aggregate=aggregate,
).build()
