"""A judge at a local endpoint: asked once for each open answer, kept, applied without a network.

pytest tests/harness/test_judge.py
"""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from internvideo3.harness import cli
from internvideo3.harness.judge import JudgeError, rating
from internvideo3.harness.recorder import score_fields
from internvideo3.harness.rescore import rescore
from internvideo3.harness.store import RunStore, read_rows

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

    def do_POST(self) -> None:  # the base class asks for this name
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = body["messages"][-1]["content"].rpartition("Model Prediction: ")[2]
        Endpoint.asked.append(body | {"path": self.path, "key": self.headers["Authorization"]})
        verdict = "Correct." if "ring" in said or "It moves" in said else "Incorrect"
        content = {"chat": verdict, "chatty": "I cannot say."}.get(self.form)
        reply = {"choices": [{"message": {"content": content}}]} if content else {"error": "no"}
        data = json.dumps(reply).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture()
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Endpoint, "asked", [])
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
    first = Endpoint.asked[0]
    assert first["path"] == "/v1/chat/completions" and first["model"] == "judge-1"
    prompt = first["messages"][-1]["content"]
    assert prompt.startswith("You will receive a multi-choice question, the ground-truth answer")
    assert "Ground-Truth Answer: A. a ring\nModel Prediction: I think the ring moves" in prompt


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
    assert [row["value"] for row in read_rows(file)] == [1, 1, 0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": 503}, "answered 503"),
        ({"form": "error"}, "answers in another form"),
        ({"form": "chatty"}, "neither Correct nor Incorrect"),
    ],
)
def test_an_endpoint_that_is_no_judge_is_one_message(
    change: dict[str, Any], said: str, run: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(Endpoint, name, value)
    before = (run / "samples/tempcompass_full.jsonl").read_bytes()
    done = CliRunner().invoke(cli.app, command(run, endpoint))
    assert done.exit_code == 1 and said in done.output
    assert (run / "samples/tempcompass_full.jsonl").read_bytes() == before


def test_no_endpoint_and_no_run(run: Path, tmp_path: Path) -> None:
    nobody = CliRunner().invoke(cli.app, command(run, "http://127.0.0.1:9/v1"))
    assert nobody.exit_code == 1 and "cannot be reached" in nobody.output
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
     ("This is Incorrect, not Correct", 0)],
)  # fmt: skip
def test_verdicts_are_read_as_officially(said: str, value: float) -> None:
    assert rating(said) == value
    with pytest.raises(JudgeError):
        rating("maybe")
