"""`internvideo3 judge`: what only a language model can score, asked of an endpoint that you name.

Nothing else in evaluation or scoring uses the network. Verdicts are kept in the run
(`judgements/<suite>.jsonl`, one line each when it is given), so that `score` applies them again
without asking, and an interrupted command goes on where it stopped.

What is asked, and how an answer is read, is in `tasks/benchmarks/verdicts.py`, with its sources.
The endpoint is asked at temperature 0 and without a penalty, so that a verdict can be repeated.
"""

import hashlib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvideo3.harness.store import (
    Row,
    RunStore,
    append_rows,
    read_rows,
    read_run,
    repair_rows,
    suites_of,
)
from internvideo3.tasks.benchmarks.verdicts import Form, form_of
from internvideo3.tasks.scoring.vrbench import has_process

FOLDER = "judgements"
RATE = "rate"
"""Where a VRBench document holds its judge's rating of the reasoning, 0 to 10."""
_HOPELESS = 3
"""Answers without a verdict, one after the other from the start, after which a judge is no use."""


class JudgeError(ValueError):
    """The endpoint cannot be used, or does not answer as a judge does."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A chat endpoint of OpenAI's form."""

    endpoint: str
    """Its base, such as `http://localhost:8000/v1`."""
    model: str
    """The model's name there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; unset or empty for none."""
    timeout_s: float = 60.0
    """Longest wait for one answer."""

    def ask(self, form: Form) -> str:
        """One answer.

        Raises:
            JudgeError: no connection, a refusal, or an answer of another form.
        """
        body = {
            "model": self.model,
            "max_tokens": form.max_tokens,
            "temperature": 0,
            "messages": [
                *([{"role": "system", "content": form.system}] if form.system else []),
                {"role": "user", "content": form.prompt},
            ],
        }
        headers = {"Content-Type": "application/json"}
        if os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        address = f"{self.endpoint.rstrip('/')}/chat/completions"
        if not address.startswith(("http://", "https://")):
            raise JudgeError(f"--endpoint {self.endpoint!r} is no http address.")
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                content = json.load(reply)["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            raise JudgeError(f"{address} answered {error.code}: {said}") from error
        except (OSError, http.client.HTTPException) as error:
            raise JudgeError(f"{address} cannot be reached: {error}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise JudgeError(f"{address} answers in another form: {error!r}") from error
        return str(content).strip()


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a command did."""

    asked: int
    """Verdicts given now."""
    kept: int
    """Verdicts of earlier commands."""
    left: int
    """Answers that this judge cannot score."""
    unread: int
    """Answers of the judge that hold no verdict; they are asked for again by the next command."""


def judge(root: Path, judge: Judge, progress: Callable[[int, int], None]) -> Judged:
    """Ask for the verdicts that a run needs and does not have yet, and keep each at once.

    Args:
        root: the run directory.
        judge: whom to ask.
        progress: told how many verdicts there are, and how many are needed.

    Raises:
        JudgeError: the endpoint fails, or its first answers hold no verdict; what was judged is
            kept.
        StoreError: `root` is no run, is in use, or cannot be written.
    """
    run = read_run(root)
    with RunStore.open(root, run):
        suites = suites_of(root)
        for suite in suites:
            repair_rows(root / FOLDER / f"{suite}.jsonl")
        needed = [(suite, row, form_for(row)) for suite in suites for row in _open(root, suite)]
        known = {suite: judgements(root, suite) for suite in suites}
        waiting = [
            (suite, row, form)
            for suite, row, form in needed
            if form is not None and key(row) not in known[suite]
        ]
        left = sum(form is None for _, _, form in needed)
        kept = len(needed) - left - len(waiting)
        progress(kept, kept + len(waiting))
        unread = 0
        for number, (suite, row, form) in enumerate(waiting, start=1):
            said = judge.ask(form)
            value = form.read(said)
            if value is None:
                unread += 1
                _check_judge(unread, number, said, form)
            else:
                verdict = {"key": key(row), "id": row["id"], "judge": judge.model}
                verdict |= {"said": said, "value": value}
                append_rows(root / FOLDER / f"{suite}.jsonl", [verdict])
            progress(kept + number, kept + len(waiting))
    return Judged(asked=len(waiting) - unread, kept=kept, left=left, unread=unread)


def _check_judge(unread: int, asked: int, said: str, form: Form) -> None:
    if unread == asked == _HOPELESS:
        raise JudgeError(
            f"The judge's first {asked} answers hold no verdict; the last one, {said[:200]!r}, is "
            f"{form.wanted}. Take another model."
        )


def _open(root: Path, suite: str) -> Iterator[Row]:
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


def form_for(row: Mapping[str, Any]) -> Form | None:
    """The question to the judge about a record; None where there is none."""
    return form_of(str(row.get("benchmark")), row.get("doc") or {}, row["prediction"])


def key(row: Mapping[str, Any]) -> str:
    """A verdict's key: it holds for this answer to this question only."""
    doc = {name: value for name, value in (row.get("doc") or {}).items() if name != RATE}
    judged = json.dumps([row["id"], doc, row["prediction"]], sort_keys=True)
    return hashlib.sha256(judged.encode()).hexdigest()


def judgements(root: Path, suite: str) -> dict[str, Row]:
    """The verdicts kept for a suite, by key.

    Raises:
        StoreError: the file is damaged.
    """
    return {str(row["key"]): row for row in read_rows(root / FOLDER / f"{suite}.jsonl")}


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
