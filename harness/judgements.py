"""Verdicts of a judge that are kept in a run, and how they count. No network, no torch.

One line each in `judgements/<suite>.jsonl`, written when it is given (`judge.py` asks), so that
`score` applies them again without asking.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from internvideo3.harness.store import Row, read_rows
from internvideo3.tasks.scoring.vrbench import has_process

FOLDER = "judgements"
RATE = "rate"
"""Where a VRBench document holds its judge's rating of the reasoning, 0 to 10."""


def judgements(root: Path, suite: str) -> dict[str, Row]:
    """The verdicts kept for a suite, by key.

    Raises:
        StoreError: the file is damaged.
    """
    return {str(row["key"]): row for row in read_rows(root / FOLDER / f"{suite}.jsonl")}


def key(row: Mapping[str, Any]) -> str:
    """A verdict's key: it holds for this answer to this question only."""
    doc = {name: value for name, value in (row.get("doc") or {}).items() if name != RATE}
    judged = json.dumps([row["id"], doc, row["prediction"]], sort_keys=True)
    return hashlib.sha256(judged.encode()).hexdigest()


def open_rows(root: Path, suite: str) -> Iterator[Row]:
    """Records that a judge has a say in, judged or not."""
    for row in read_rows(root / "samples" / f"{suite}.jsonl"):
        if row["prediction"] is None:
            continue
        needs = row["official"]["outcome"] == "judge_needed" or "judge" in row
        if needs or _is_process(row):
            yield row


def _is_process(row: Mapping[str, Any]) -> bool:
    """Whether the verdict rates the reasoning beside the score, and leaves the score alone."""
    return row.get("benchmark") == "vrbench" and has_process(row.get("doc") or {})


def apply(row: Row, verdicts: Mapping[str, Row]) -> Row:
    """A record with its verdict, if a judge has a say in it and there is one.

    A verdict is the official score where that needs a judge, and the document's `rate` where it
    rates the reasoning beside the score.
    """
    row = {name: value for name, value in row.items() if name != "judge"}
    if _is_process(row):
        row["doc"] = {name: value for name, value in row["doc"].items() if name != RATE}
    verdict = verdicts.get(key(row))
    if verdict is None:
        return row
    row["judge"] = verdict["judge"]
    if _is_process(row):
        return row | {"doc": row["doc"] | {RATE: 10 * verdict["value"]}}
    if row["official"]["outcome"] != "judge_needed":
        return {name: value for name, value in row.items() if name != "judge"}
    official = {"value": verdict["value"], "parsed": verdict["said"], "outcome": "answered"}
    return row | {"official": official}
