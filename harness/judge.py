"""`internvideo3 judge`: what only a language model can score, asked of an endpoint that you name.

Nothing else in evaluation or scoring uses the network. Verdicts are kept in the run
(`judgements/<suite>.jsonl`, one line each when it is given), so that `score` applies them again
without asking, and an interrupted command goes on where it stopped.

Questions, verdicts and their reading are those of llyx97/TempCompass (commits 52d2b49
`prompt_templates.py`, 3cdb5d4 `utils/eval_utils.py`: `llm_output_to_rating`), at temperature 0 and
without its penalty, so that a verdict can be repeated. Captions need another file of that data set
and stay open.
"""

import hashlib
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

FOLDER = "judgements"
_SYSTEM = "You are an AI assistant for question answering."
_KINDS = {
    "multi-choice": ("multi-choice question", "Multi-Choice Question"),
    "yes_no": ("Yes/No question", "Yes/No Question"),
    "caption_matching": ("caption matching question", "Caption Matching Question"),
}
_TASK = (
    "You will receive a {0}, the ground-truth answer and the prediction from a question answering "
    "(QA) model. Your task is to determine whether QA model prediction is correct, based on the "
    'question and ground-truth answer. If the prediction is correct, respond "Correct". If the '
    'prediction is incorrect, respond "Incorrect".'
)


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

    def ask(self, prompt: str) -> str:
        """One answer.

        Raises:
            JudgeError: no connection, a refusal, or an answer of another form.
        """
        body = {
            "model": self.model,
            "max_tokens": 128,
            "temperature": 0,
            "messages": [
                {"role": "system", "content": _SYSTEM},
                {"role": "user", "content": prompt},
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
        except OSError as error:
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


def judge(root: Path, judge: Judge, progress: Callable[[int, int], None]) -> Judged:
    """Ask for the verdicts that a run needs and does not have yet, and keep each at once.

    Args:
        root: the run directory.
        judge: whom to ask.
        progress: told how many verdicts there are, and how many are needed.

    Raises:
        JudgeError: the endpoint fails; what was judged is kept.
        StoreError: `root` is no run, is in use, or cannot be written.
    """
    run = read_run(root)
    with RunStore.open(root, run):
        for suite in suites_of(root):
            repair_rows(root / FOLDER / f"{suite}.jsonl")
        needed = [(suite, row) for suite in suites_of(root) for row in _open(root, suite)]
        prompts = [(suite, row, prompt_for(row)) for suite, row in needed]
        answerable = [(suite, row, prompt) for suite, row, prompt in prompts if prompt]
        known = {suite: judgements(root, suite) for suite in suites_of(root)}
        kept = sum(key(row) in known[suite] for suite, row, _ in answerable)
        done = kept
        progress(done, len(answerable))
        for suite, row, prompt in answerable:
            if key(row) not in known[suite]:
                verdict = {"key": key(row), "id": row["id"], "judge": judge.model}
                said = judge.ask(prompt)
                verdict |= {"said": said, "value": rating(said)}
                append_rows(root / FOLDER / f"{suite}.jsonl", [verdict])
                done += 1
                progress(done, len(answerable))
    return Judged(asked=done - kept, kept=kept, left=len(needed) - len(answerable))


def _open(root: Path, suite: str) -> Iterator[Row]:
    """Records whose official score needs a judge, judged or not."""
    for row in read_rows(root / "samples" / f"{suite}.jsonl"):
        outcome = row["official"]["outcome"]
        if outcome == "judge_needed" or "judge" in row:
            yield row


def prompt_for(row: Mapping[str, Any]) -> str | None:
    """The question to the judge about a record; None where it cannot be put."""
    doc = row.get("doc") or {}
    if row.get("benchmark") != "tempcompass" or doc.get("qtype") not in _KINDS:
        return None
    kind, heading = _KINDS[doc["qtype"]]
    return (
        f"{_TASK.format(kind)}\n{heading}:\n{doc['question']}\n"
        f"Ground-Truth Answer: {doc['answer']}\nModel Prediction: {row['prediction']}"
    )


def rating(said: str) -> float:
    """1 or 0 from a judge's words.

    Raises:
        JudgeError: neither verdict is in them.
    """
    if said.startswith("Correct"):
        return 1.0
    if "Incorrect" in said:
        return 0.0
    if "Correct" in said:
        return 1.0
    raise JudgeError(
        f"The judge said {said[:200]!r}, neither Correct nor Incorrect. Take another model; what "
        "was judged is kept."
    )


def key(row: Mapping[str, Any]) -> str:
    """A verdict's key: it holds for this answer to this question only."""
    judged = json.dumps([row["id"], row.get("doc"), row["prediction"]], sort_keys=True)
    return hashlib.sha256(judged.encode()).hexdigest()


def judgements(root: Path, suite: str) -> dict[str, Row]:
    """The verdicts kept for a suite, by key.

    Raises:
        StoreError: the file is damaged.
    """
    return {str(row["key"]): row for row in read_rows(root / FOLDER / f"{suite}.jsonl")}


def apply(row: Row, verdicts: Mapping[str, Row]) -> Row:
    """A record with its verdict, if its official score needs one and there is one."""
    row = {name: value for name, value in row.items() if name != "judge"}
    verdict = verdicts.get(key(row))
    if verdict is None or row["official"]["outcome"] != "judge_needed":
        return row
    value = verdict["value"]
    official = {"value": value, "parsed": verdict["said"], "outcome": "answered"}
    return row | {"official": official, "judge": verdict["judge"]}
