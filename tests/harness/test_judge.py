"""A judge at a local endpoint: asked once for each open answer, kept, applied without a network.

pytest tests/harness/test_judge.py
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from internvideo3.harness import cli
from internvideo3.harness.judge import JudgeError, judge
from internvideo3.harness.recorder import score_fields
from internvideo3.harness.rescore import rescore
from internvideo3.harness.store import RunStore, read_rows
from internvideo3.tasks.benchmarks import verdicts
from internvideo3.training import endpoint as endpoints
from internvideo3.training.endpoint import Endpoint as Whom

CAPTIONS = "Which fits?\nCaption A: a ring moves\nCaption B: a star moves"
DOCS = [
    ("multi-choice", "What moves?\nA. a ring\nB. a star", "A. a ring", "A"),
    ("multi-choice", "What moves?\nA. a ring\nB. a star", "A. a ring", "I think the ring moves"),
    ("yes_no", "Does it move?", "yes", "It moves"),
    ("yes_no", "Does it move?", "yes", "no"),
    ("caption_matching", CAPTIONS, "Caption A: a ring moves", "The star one"),
    ("captioning", "Describe.", "A ring.", "A ring moves."),
]


class Endpoint(BaseHTTPRequestHandler):
    """Judges right whatever says ring or moves; speaks as it is told to."""

    asked: list[dict[str, Any]] = []
    status = 200
    form = "chat"
    moods: list[str] = []
    """What it does with the next requests, before it does as it is told."""
    dies_after: int | None = None
    """Requests after which it has no more answers."""
    takes_s = 0.0

    def do_POST(self) -> None:  # the base class asks for this name
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"].rpartition("Model Prediction: ")[2]
        mood = Endpoint.moods.pop(0) if Endpoint.moods else ""
        if Endpoint.dies_after is not None and len(Endpoint.asked) >= Endpoint.dies_after:
            mood = "503"
        if mood:
            return self._fail(mood)
        time.sleep(self.takes_s)
        Endpoint.asked.append(body | {"path": self.path, "key": self.headers["Authorization"]})
        verdict = "Correct." if "ring" in said or "It moves" in said else "Incorrect"
        verdict = (
            "<rate>7</rate>.\n<reason>One step is missing.</reason>"
            if ("<rate>" in body["messages"][0]["content"])
            else verdict
        )
        content = {"chat": verdict, "chatty": "I cannot say."}.get(self.form)
        reply = {"choices": [{"message": {"content": content}}]} if content else {"error": "no"}
        data = json.dumps(reply).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, mood: str) -> None:
        if mood == "silent":
            time.sleep(1.0)
        elif mood == "page":
            self.send_response(200)
            self.send_header("Content-Length", "13")
            self.end_headers()
            self.wfile.write(b"<html></html>")
        elif mood == "cut":  # half of what was announced
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        elif mood.isdigit():
            self.send_response(int(mood))
            self.send_header("Content-Length", "0")
            self.end_headers()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture()
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Endpoint, "asked", [])
    monkeypatch.setattr(Endpoint, "moods", [])
    # The waits between attempts are real for users, and nothing to wait for in a test.
    monkeypatch.setattr(endpoints, "Endpoint", functools.partial(Whom, first_wait_s=0.0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    thread.join()


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    meta = {"schema": 1, "id": "run", "mode": "direct", "model": {"name": "m", "digest": "d"},
            "suites": {"tempcompass_full": {"n": len(DOCS)}}, "config": {}}  # fmt: skip
    rows = []
    for number, (kind, question, answer, reply) in enumerate(DOCS):
        doc = {"qtype": kind, "question": question, "answer": answer, "dim": "action"}
        shared = {"id": f"tempcompass_full/{number}", "video_id": "v", "family": "action",
                  "length_s": None, "question": question, "options": None, "answer": answer,
                  "benchmark": "tempcompass", "doc": doc, "error": None}  # fmt: skip
        rows.append(shared | {"prediction": reply, **score_fields("tempcompass", doc, reply)})
    with RunStore.open(root, meta) as store:
        store.add("tempcompass_full", rows, [])
    rescore(root)
    return root


def samples(run: Path) -> list[dict[str, Any]]:
    return read_rows(run / "samples" / "tempcompass_full.jsonl")


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())["tempcompass_full"]
    return found


def command(run: Path, endpoint: str) -> list[str]:
    return ["judge", str(run), "--endpoint", endpoint, "--judge", "judge-1"]


def test_only_open_answers_are_asked_about_and_verdicts_count(run: Path, endpoint: str) -> None:
    assert result(run)["judge_needed"] == 4 and result(run)["value"] == 0.5
    done = CliRunner().invoke(cli.app, command(run, endpoint))
    assert done.exit_code == 0, done.output
    assert "3 verdicts, 0 kept from before, 1 left open" in done.output
    assert [row["official"]["value"] for row in samples(run)] == [1, 1, 1, 0, 0, None]
    assert [row.get("judge") for row in samples(run)] == [
        None, "judge-1", "judge-1", None, "judge-1", None,
    ]  # fmt: skip
    assert result(run)["value"] == pytest.approx(3 / 5) and result(run)["judge_needed"] == 1
    first = next(body for body in Endpoint.asked if "the ring moves" in str(body["messages"]))
    assert first["path"] == "/v1/chat/completions" and first["model"] == "judge-1"
    prompt = first["messages"][-1]["content"]
    assert prompt.startswith("You will receive a multi-choice question, the ground-truth answer")
    assert "Ground-Truth Answer: A. a ring\nModel Prediction: I think the ring moves" in prompt


def patient(address: str, timeout_s: float = 60.0, attempts: int = 6) -> tuple[Whom, list[float]]:
    """A client that notes its waits instead of taking them."""
    waits: list[float] = []
    whom = Whom(
        url=address, model="judge-1", timeout_s=timeout_s, attempts=attempts, sleep=waits.append
    )
    return whom, waits


@pytest.mark.parametrize(
    "moods",
    [["429"], ["503", "500", "502"], ["cut", "cut"], ["dropped"], ["silent"],
     ["429", "cut", "dropped", "503", "silent"]],
)  # fmt: skip
def test_a_judge_that_is_busy_or_breaks_off_is_asked_again(
    moods: list[str], run: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "moods", list(moods))
    whom, waits = patient(endpoint, timeout_s=0.3)
    done = judge(run, whom, lambda *_: None, workers=1)
    assert (done.asked, done.left, done.unread) == (3, 1, 0)
    assert waits == [2.0**i for i in range(len(moods))]
    assert len(Endpoint.asked) == 3


def test_a_refusal_is_not_repeated(
    run: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Endpoint, "moods", ["401"])
    whom, waits = patient(endpoint)
    with pytest.raises(JudgeError, match=r"refused the request, 401(?s:.*)0 of 3 verdicts are"):
        judge(run, whom, lambda *_: None, workers=1)
    assert waits == [] and Endpoint.asked == []


def many(root: Path, count: int) -> Path:
    """A run with so many answers that only a judge can score."""
    suite = "tempcompass_full"
    meta = {"schema": 1, "id": "run", "mode": "direct", "model": {"name": "m", "digest": "d"},
            "suites": {suite: {"n": count}}, "config": {}}  # fmt: skip
    rows = []
    for number in range(count):
        doc = {"qtype": "yes_no", "question": f"Does {number} move?", "answer": "yes", "dim": "x"}
        reply = f"It moves, {number}"
        rows.append({"id": f"{suite}/{number}", "video_id": "v", "family": "x", "length_s": None,
                     "question": doc["question"], "options": None, "answer": "yes",
                     "benchmark": "tempcompass", "doc": doc, "error": None, "prediction": reply,
                     **score_fields("tempcompass", doc, reply)})  # fmt: skip
    with RunStore.open(root, meta) as store:
        store.add(suite, rows, [])
    rescore(root)
    return root


@pytest.mark.parametrize("workers", [1, 4])
def test_a_judge_that_dies_midway_costs_no_verdict(
    workers: int, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = many(tmp_path / "many", 20)
    file = root / "judgements/tempcompass_full.jsonl"
    monkeypatch.setattr(Endpoint, "dies_after", 7)
    done = CliRunner().invoke(cli.app, [*command(root, endpoint), "--workers", str(workers)])
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert "did not answer in 6 attempts" in said and "503" in said
    kept = len(read_rows(file))
    assert f"{kept} of 20 verdicts are kept: repeat this command" in said
    assert 7 <= kept == len(Endpoint.asked) < 7 + workers
    rescore(root)
    assert result(root)["judge_needed"] == 20 - kept
    monkeypatch.setattr(Endpoint, "dies_after", None)
    again = CliRunner().invoke(cli.app, command(root, endpoint))
    assert f"{20 - kept} verdicts, {kept} kept from before" in again.output
    prompts = [body["messages"][-1]["content"] for body in Endpoint.asked]
    assert len(prompts) == len(set(prompts)) == 20
    assert (result(root)["judge_needed"], result(root)["value"]) == (0, 1)


def test_a_killed_command_keeps_its_verdicts(
    tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = many(tmp_path / "many", 60)
    file = root / "judgements/tempcompass_full.jsonl"
    monkeypatch.setattr(Endpoint, "takes_s", 0.02)
    line = [sys.executable, "-m", "internvideo3.harness.cli", *command(root, endpoint)]
    killed = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not file.is_file() or file.read_bytes().count(b"\n") < 15:
        assert time.monotonic() < until and killed.poll() is None
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    time.sleep(0.2)  # what was under way at the server
    kept = len(read_rows(file))
    assert 15 <= kept < 60 and len(Endpoint.asked) - kept <= 4
    again = CliRunner().invoke(cli.app, command(root, endpoint))
    assert f"{60 - kept} verdicts, {kept} kept from before" in again.output
    assert len({row["key"] for row in read_rows(file)}) == len(read_rows(file)) == 60


def test_verdicts_are_kept_and_scoring_again_needs_no_network(run: Path, endpoint: str) -> None:
    CliRunner().invoke(cli.app, command(run, endpoint))
    before = (run / "samples/tempcompass_full.jsonl").read_bytes()
    rescore(run)
    assert (run / "samples/tempcompass_full.jsonl").read_bytes() == before
    again = CliRunner().invoke(cli.app, command(run, endpoint))
    assert "0 verdicts, 3 kept from before" in again.output
    assert len(Endpoint.asked) == 3


def test_a_verdict_holds_for_its_answer_only(run: Path, endpoint: str) -> None:
    CliRunner().invoke(cli.app, command(run, endpoint))
    rows = samples(run)
    rows[1]["prediction"] = "I think the star moves"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "samples/tempcompass_full.jsonl").write_text(text)
    rescore(run)
    assert samples(run)[1]["official"]["outcome"] == "judge_needed"


def test_an_interrupted_judge_goes_on_after_a_torn_line(run: Path, endpoint: str) -> None:
    CliRunner().invoke(cli.app, command(run, endpoint))
    file = run / "judgements/tempcompass_full.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    again = CliRunner().invoke(cli.app, command(run, endpoint))
    assert "kept from before" in again.output and again.exit_code == 0
    rows = read_rows(file)  # in the order in which the workers' answers came
    assert len({row["key"] for row in rows}) == 3
    assert sorted(row["value"] for row in rows) == [0, 1, 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": 503}, "did not answer in 6 attempts; the last time: 503"),
        ({"form": "error"}, "answers in another form"),
        ({"form": "chatty"}, "first 3 answers hold no verdict"),
    ],
)
def test_an_endpoint_that_is_no_judge_is_one_message(
    change: dict[str, Any], said: str, run: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(Endpoint, name, value)
    before = (run / "samples/tempcompass_full.jsonl").read_bytes()
    done = CliRunner().invoke(cli.app, command(run, endpoint))
    assert done.exit_code == 1 and said in " ".join(done.output.split())
    assert (run / "samples/tempcompass_full.jsonl").read_bytes() == before


def test_a_page_is_no_answer_and_not_asked_for_again(run: Path, endpoint: str) -> None:
    Endpoint.moods = ["page"] * 4
    done = CliRunner().invoke(cli.app, command(run, endpoint))
    assert "answers with a page ('<html></html>'), which no API does" in " ".join(
        done.output.split()
    )
    assert "again in" not in done.output


def test_verdicts_of_another_judge_stay_and_are_told(run: Path, endpoint: str) -> None:
    CliRunner().invoke(cli.app, command(run, endpoint))
    other = CliRunner().invoke(cli.app, [*command(run, endpoint)[:-1], "judge-2"])
    told = " ".join(other.output.split())
    assert "0 verdicts, 3 kept from before" in told
    assert "3 of the kept verdicts are judge-1's, not judge-2's" in told
    again = CliRunner().invoke(cli.app, command(run, endpoint))
    assert "of the kept verdicts" not in again.output


def test_no_endpoint_and_no_run(run: Path, tmp_path: Path, endpoint: str) -> None:
    nobody = CliRunner().invoke(cli.app, command(run, "http://127.0.0.1:9/v1"))
    assert nobody.exit_code == 1 and "Connection refused" in nobody.output
    wrong = CliRunner().invoke(cli.app, command(run, "ftp://x"))
    assert "is no http address" in wrong.output
    empty = CliRunner().invoke(cli.app, command(tmp_path / "none", "http://127.0.0.1:9/v1"))
    assert empty.exit_code == 1 and "is not a run directory" in empty.output


def test_the_key_goes_to_the_endpoint_only_where_one_is_set(
    run: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    CliRunner().invoke(cli.app, command(run, endpoint))
    assert {body["key"] for body in Endpoint.asked} == {None}
    monkeypatch.setenv("MY_KEY", "abc")
    CliRunner().invoke(cli.app, [*command(copy, endpoint), "--key-variable", "MY_KEY"])
    assert Endpoint.asked[-1]["key"] == "Bearer abc"
    assert "abc" not in (copy / "judgements/tempcompass_full.jsonl").read_text()


@pytest.mark.parametrize(
    ("said", "value"),
    [("Correct", 1), ("Incorrect.", 0), ("It is Correct", 1), ("Correct, not Incorrect", 1),
     ("This is Incorrect, not Correct", 0), ("maybe", None)],
)  # fmt: skip
def test_verdicts_are_read_as_officially(said: str, value: float | None) -> None:
    assert verdicts.read_correct(said) == value


@pytest.mark.parametrize(
    ("said", "value"),
    [("<rate>7</rate>.", 0.7), ("<rate> 8.5 / 10 </rate>", 0.85), ("<rate>12</rate>", 1),
     ("<rate>-1</rate>", 0), ("7 of 10", None), ("<rate>good</rate>", None)],
)  # fmt: skip
def test_ratings_are_a_tenth_of_the_number_between_the_tags(said: str, value: Any) -> None:
    assert verdicts.read_rate(said) == value


@pytest.mark.parametrize(
    ("said", "value"),
    [("Reasoning: it rolls.\nAnswer: A. a ring", 1), ("Answer: B. a star", 0), ("A. a ring", 1),
     ("Answer: A. a ring or B. a star", 0), ("Answer: None of the choices are correct", 0),
     ("", None)],
)  # fmt: skip
def test_a_caption_is_right_if_it_answers_the_question_about_the_video(
    said: str, value: Any
) -> None:
    doc = {"qtype": "captioning", "question": "Describe.", "answer": "x", "dim": "action",
           "mc_question": "What moves?\nA. a ring\nB. a star",
           "mc_answer": "A. a ring"}  # fmt: skip
    form = verdicts.form_of("tempcompass", doc, "<think>?</think>A ring moves.</s>")
    assert form is not None and form.read(said) == value
    assert "Video Description:A ring moves.\nMulti-Choice Question:\nWhat moves?" in form.prompt


def test_an_unread_tomato_reply_is_read_by_the_judge() -> None:
    doc = {"options": ["up", "down"], "answer": 1}
    form = verdicts.form_of("tomato", doc, "Probably B")
    assert form is not None and "index2answer: {'A': 'up', 'B': 'down'}" in form.prompt
    assert [form.read(said) for said in ("B", "A", "C", "The answer is B")] == [1, 0, None, None]
    assert verdicts.form_of("videomme", {}, "B") is None


def vrbench_doc(number: int, kind: str) -> dict[str, Any]:
    return {"options": {"A": "a ring", "B": "a star"}, "answer": "A", "reasoning_type": kind,
            "question": f"Why {number}?", "original_answer": "a ring",
            "reasoning_process": "<Step 1> It rolls.",
            "judge_summary": "A ring rolls."}  # fmt: skip


def test_the_reasoning_of_vrbench_is_rated_beside_its_score(tmp_path: Path, endpoint: str) -> None:
    kinds = ("Event Attribution", "Event Prediction", "Event Summarization")
    rows = []
    for number, kind in enumerate(kinds):
        doc, reply = vrbench_doc(number, kind), "<Step 1> A ring rolls.\n<Answer> A"
        rows.append(
            {"id": f"vrbench/{number}", "video_id": "v", "family": kind, "length_s": None,
             "question": doc["question"], "options": ["a ring", "a star"], "answer": "a ring",
             "benchmark": "vrbench", "doc": doc, "error": None, "prediction": reply,
             **score_fields("vrbench", doc, reply)}
        )  # fmt: skip
    run = tmp_path / "run"
    meta = {"schema": 1, "id": "run", "mode": "direct", "model": {"name": "m", "digest": "d"},
            "suites": {"vrbench": {"n": 3}}, "config": {}}  # fmt: skip
    with RunStore.open(run, meta) as store:
        store.add("vrbench", rows, [])
    rescore(run)

    def found() -> dict[str, Any]:
        results: dict[str, Any] = json.loads((run / "results.json").read_text())["vrbench"]
        return results

    assert (found()["value"], found()["judge_needed"]) == (1, 2)
    assert "process" not in found()["extra"]
    done = CliRunner().invoke(cli.app, command(run, endpoint))
    assert "2 verdicts, 0 kept from before, 0 left open" in done.output, done.output
    assert (found()["value"], found()["judge_needed"]) == (1, 0)
    # Officially a question that is never judged counts as rated 0.
    assert found()["extra"]["process"] == pytest.approx(1.4 / 3)
    assert found()["plain"]["extra"]["process"] == pytest.approx(0.7)
    assert found()["extra"]["overall"] == pytest.approx((1 + 1.4 / 3) / 2)
    assert found()["extra"]["combined Event Summarization"] == 1
    assert found()["extra"]["combined Event Prediction"] == pytest.approx(0.85)
    asked = sorted(body["messages"][-1]["content"] for body in Endpoint.asked)
    asked.sort(key=lambda prompt: "Why 1?" in prompt)
    assert "# Video Summary" not in asked[0] and "# Video Summary\nA ring rolls." in asked[1]
    assert "Reasoning Step:\n<Step 1> It rolls." in asked[0]
    before = (run / "samples/vrbench.jsonl").read_bytes()
    again = CliRunner().invoke(cli.app, command(run, endpoint))
    assert "0 verdicts, 2 kept from before" in again.output
    assert (run / "samples/vrbench.jsonl").read_bytes() == before
