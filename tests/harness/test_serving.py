"""The server's side of HTTP, with a studio that says what the test wants.

pytest tests/harness/test_serving.py
"""

import asyncio
import base64
import itertools
import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest
import uvicorn

from internvideo3.harness.serving import app, jobs
from internvideo3.harness.serving.app import Serving
from internvideo3.harness.serving.hosts import of_this_machine
from internvideo3.harness.serving.jobs import Line, Words
from internvideo3.harness.serving.studio import Say, Told, Turn
from internvideo3.harness.serving.wire import ApiError, Usage
from internvideo3.model.session import Limits
from internvideo3.tasks.video import VideoError

URL = "data:video/mp4;base64," + base64.b64encode(b"\0\0\0\x18ftypmp42").decode()
FILM = {"type": "video_url", "video_url": {"url": URL}}
"""An upload that begins as an MP4 does."""


@dataclass
class Puppet:
    """A studio that speaks for as long as somebody listens when it is asked to go on."""

    begun: threading.Event = field(default_factory=threading.Event)
    freed: threading.Event = field(default_factory=threading.Event)
    ended: list[str] = field(default_factory=list)
    interrupted: int = 0
    line: Line | None = None
    asked: list[tuple[Sequence[Turn], Limits]] = field(default_factory=list)

    def answer(self, turns: Sequence[Turn], limits: Limits, say: Say, *, agentic: bool) -> Told:
        self.asked.append((turns, limits))
        asked = turns[-1].text
        if asked == "fail":
            raise RuntimeError("a secret of the machine")
        if asked == "bad":
            raise VideoError("the video is empty.")
        say("reasoning_content", "hm. ")
        if asked == "break":
            raise ApiError(400, "too long.", code="context_length_exceeded")
        try:
            while asked == "go on":
                say("content", "word ")
                self.begun.set()
                time.sleep(0.01)
            while asked == "be quiet":
                say("content", "")
                self.begun.set()
                time.sleep(0.01)
            if asked == "be deaf":
                self.begun.set()
                self.freed.wait(30)
        finally:
            self.ended.append(asked)
        for word in ("two ", "words"):
            say("content", word)
        return Told(finish="length", usage=Usage(prompt=5, completion=2))

    def interrupt(self) -> None:
        self.interrupted += 1


@contextmanager
def serving(**options: Any) -> Iterator[tuple[Puppet, httpx.Client]]:
    """A real server on a real socket, and a client of it."""
    puppet = Puppet()
    puppet.line = line = Line(options.pop("waiting", 1), puppet.interrupt)
    served = Serving(studio=puppet, line=line, name="puppet", **options).app()
    server = uvicorn.Server(uvicorn.Config(served, lifespan="off", log_level="critical"))
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=30) as client:
            yield puppet, client
    finally:
        line.close()
        server.should_exit = True
        thread.join(20)
        line.join(20)
        listening.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    """A client of one server for all that leaves it as it was."""
    with serving() as (_, client):
        yield client


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "puppet", "messages": [{"role": "user", "content": text}]} | more


def post(client: httpx.Client, text: str, **more: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json=body(text, **more))


def events(reply: httpx.Response) -> list[Any]:
    lines = [line for line in reply.text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def until(true: Any) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end, "it did not come about in ten seconds"
        time.sleep(0.01)


def test_a_whole_answer_and_a_stream_have_the_same_words() -> None:
    with serving() as (_, client):
        whole = post(client, "hello").json()
        assert whole["choices"][0]["message"] == {
            "role": "assistant", "content": "two words", "reasoning_content": "hm. ",
        }  # fmt: skip
        assert whole["choices"][0]["finish_reason"] == "length"
        assert whole["usage"] == {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
        stream = post(client, "hello", stream=True)
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert stream.text.endswith("data: [DONE]\n\n")
        deltas = [one["choices"][0]["delta"] for one in events(stream)]
        assert deltas == [
            {"role": "assistant", "content": ""}, {"reasoning_content": "hm. "},
            {"content": "two "}, {"content": "words"}, {},
        ]  # fmt: skip
        assert len({one["id"] for one in events(stream)}) == 1


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({}, Limits(max_new_tokens=99)),
        ({"seed": 7}, Limits(max_new_tokens=99, seed=7)),
        ({"temperature": 0, "max_tokens": 5}, Limits(max_new_tokens=5)),
        (
            {"temperature": 0.7, "seed": 7, "max_tokens": 5, "max_completion_tokens": 6},
            Limits(max_new_tokens=6, temperature=0.7, seed=7),
        ),
        ({"temperature": 2, "seed": 0}, Limits(max_new_tokens=99, temperature=2.0, seed=0)),
        ({"temperature": 1e-9, "seed": 2**63 - 1}, Limits(max_new_tokens=99, seed=2**63 - 1)),
    ],
)
def test_what_a_client_says_of_draws_and_length_is_what_the_model_is_told(
    given: dict[str, Any], limits: Limits
) -> None:
    with serving(new_tokens=99) as (puppet, client):
        for stream in (False, True):
            assert post(client, "hello", stream=stream, **given).status_code == 200
        assert [told for _, told in puppet.asked] == [limits, limits]


def test_draws_without_a_seed_are_others_each_time() -> None:
    with serving() as (puppet, client):
        for _ in range(3):
            post(client, "hello", temperature=1.5)
        assert {told.temperature for _, told in puppet.asked} == {1.5}
        assert len({told.seed for _, told in puppet.asked}) == 3
        assert all(0 <= told.seed < 2**63 for _, told in puppet.asked)


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    with serving() as (puppet, client):
        answer = post(client, "hello").json()["choices"][0]["message"]
        assert answer["reasoning_content"] == "hm. "
        question = {"role": "user", "content": "hello"}
        again = body("", messages=[question, answer, question])
        assert client.post("/v1/chat/completions", json=again).status_code == 200
        turns, _ = puppet.asked[-1]
        assert [turn.text for turn in turns] == ["hello", "two words", "hello"]
        wrong = body("", messages=[question | {"reasoning_content": "hm."}])
        refused = client.post("/v1/chat/completions", json=wrong)
        assert refused.status_code == 400
        assert "the assistant's, not the user's" in refused.json()["error"]["message"]


def test_a_silent_stream_shows_that_it_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "ALIVE_EVERY_S", 0.0)
    with (
        serving() as (_, client),
        client.stream("POST", "/v1/chat/completions", json=body("be quiet", stream=True)) as reply,
    ):
        lines = (line for line in reply.iter_lines() if line and not line.startswith("data: "))
        assert [next(lines), next(lines)] == [": working"] * 2


def test_turns_can_be_kept_back() -> None:
    with serving(reasoning=False) as (_, client):
        assert "reasoning_content" not in post(client, "hello").text
        stream = post(client, "hello", stream=True).text
        assert "reasoning_content" not in stream and "words" in stream


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"", 400, "the body is not JSON"),
        (b"\xff\xfe", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        (b"[]", 400, "Input should be"),
        (b"{}", 400, "model: Field required"),
        (json.dumps(body("x", model="pupet")).encode(), 404, "no model 'pupet'; there are puppet"),
        (json.dumps(body("x", top_k=3)).encode(), 400, "top_k: this field is not served"),
        (json.dumps(body("x", n=2)).encode(), 400, "n: Input should be 1"),
        (json.dumps(body("x", temperature=-1)).encode(), 400, "temperature: "),
        (json.dumps(body("x", temperature=1e999)).encode(), 400, "temperature: "),
        (json.dumps(body("x", temperature=float("nan"))).encode(), 400, "temperature: "),
        (json.dumps(body("x", max_tokens=0)).encode(), 400, "max_tokens: "),
        (json.dumps(body("x", messages=[])).encode(), 400, "messages: "),
        (json.dumps(body("x", messages=[{"role": "tool", "content": "x"}])).encode(), 400, "role"),
        (
            json.dumps(
                body("x", messages=[{"role": "user", "content": [{"type": "image_url"}]}])
            ).encode(),
            400,
            "of type 'text' or 'video_url'",
        ),
    ],
)
def test_a_bad_body_is_told_in_openais_form(
    server: httpx.Client, content: bytes, status: int, said: str
) -> None:
    reply = server.post(
        "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
    )
    error = reply.json()["error"]
    assert reply.status_code == status and said in error["message"], error
    assert error.keys() == {"message", "type", "param", "code"}


def test_paths_methods_and_kinds_that_are_not_served() -> None:
    with serving() as (_, client):
        assert (
            client.get("/v1/embeddings").json()["error"]["message"].startswith("there is nothing")
        )
        assert client.get("/v1/chat/completions").status_code == 405
        text = client.post(
            "/v1/chat/completions", content="{}", headers={"Content-Type": "text/plain"}
        )
        assert text.status_code == 415
        assert client.get("/v1/models/none").status_code == 404


def test_what_fails_is_an_error_before_the_stream_or_in_it() -> None:
    with serving() as (_, client):
        for stream in (False, True):
            failed = post(client, "fail", stream=stream)
            assert failed.status_code == 500 and "secret" not in failed.text
            assert (
                post(client, "bad", stream=stream).json()["error"]["message"].startswith("the vid")
            )
        assert post(client, "break").status_code == 400
        late = post(client, "break", stream=True)
        assert late.status_code == 200 and events(late)[-1]["error"]["code"].startswith("context_")
        assert "[DONE]" not in late.text
        assert post(client, "hello").status_code == 200, "the thread goes on"


@pytest.mark.parametrize("said", ["go on", "be quiet"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(said: str, stream: bool) -> None:
    with serving() as (puppet, client):
        request = json.dumps(body(said, stream=stream)).encode()
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as raw:
            raw.sendall(head(len(request)) + request)
            assert puppet.begun.wait(10)
        until(lambda: puppet.ended == [said])
        assert puppet.interrupted == 1, "and what it waits for"
        assert post(client, "hello").status_code == 200


def test_a_full_line_is_told_and_empties_again() -> None:
    with serving(waiting=1) as (puppet, client):
        with client.stream("POST", "/v1/chat/completions", json=body("go on", stream=True)) as one:
            pieces = one.iter_raw()
            next(pieces)
            waits = threading.Thread(
                target=post, args=(httpx.Client(base_url=client.base_url, timeout=30), "hello")
            )
            waits.start()
            until(lambda: puppet.line and puppet.line.inside == 2)
            full = post(client, "hello")
            assert full.headers["retry-after"] == "5"
            assert "one request is answered and 1 wait" in full.json()["error"]["message"]
        waits.join(20)
        assert puppet.ended == ["go on", "hello"]
        assert post(client, "hello").status_code == 200


def head(length: int) -> bytes:
    """The head of a request, as raw bytes."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
        b"application/json\r\nContent-Length: %d\r\n\r\n" % length
    )


def test_a_body_that_arrives_after_the_end_is_told_so_at_once() -> None:
    with serving() as (puppet, client):
        line, request = puppet.line, json.dumps(body("hello")).encode()
        assert line is not None
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as raw:
            raw.settimeout(5)
            raw.sendall(head(len(request)) + request[:9])
            until(lambda: line.inside == 1)
            line.close()
            line.join(5)
            raw.sendall(request[9:])
            told = b""
            while b"the server is stopping" not in told:
                assert (piece := raw.recv(1 << 16)), told
                told += piece
        assert b" 503 " in told and b"application/json" in told, told
        assert post(client, "hello").status_code == 503


def go_on(say: Say) -> Told:
    while True:
        say("content", "word")
        time.sleep(0.001)


async def job_of_a_line_closed_at(moment: int) -> str | None:
    """What comes of a job where a signal comes at a line of Python; None if it has not so many."""
    line = Line(1, lambda: None)
    passed = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal passed
        passed += event == "line"
        if event == "line" and passed == moment:
            line.close()
        return trace

    sys.settrace(trace)
    try:
        with line.job(go_on) as job:
            sys.settrace(None)
            told: Any = None
            while not isinstance(told, ApiError if passed >= moment else Words):
                told = await asyncio.wait_for(job.events.get(), 5)
            sys.settrace(trace)
    except ApiError as error:
        told = error
    finally:
        sys.settrace(None)
        line.close()
    line.join(5)
    return type(told).__name__ if passed >= moment else None


def test_a_signal_at_any_line_of_a_job_neither_hangs_it_nor_loses_it() -> None:
    """A handler runs in the loop's own thread, between any two lines of it."""
    ends: list[str] = []

    async def at_every_moment() -> None:
        for moment in itertools.count(1):
            told = await job_of_a_line_closed_at(moment)
            if told is None:
                return
            ends.append(told)

    thread = threading.Thread(target=asyncio.run, args=(at_every_moment(),), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive(), f"a signal at line {len(ends) + 1} hangs"
    assert {*ends} == {"ApiError", "Words"}, "before it has begun, and while it is left"


@pytest.mark.parametrize("asked", ["hello", "fail", "break", "go on"])
def test_uploads_go_with_their_request_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parts = [FILM, {"type": "text", "text": asked}]
    request = body("", messages=[{"role": "user", "content": parts}])
    with serving() as (puppet, client):
        if asked == "go on":
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=request, timeout=1)
        else:
            client.post("/v1/chat/completions", json=request)
        (video,) = puppet.asked[0][0][0].videos
        assert video.is_relative_to(tmp_path)
        until(lambda: not any(tmp_path.iterdir()))


def test_bodies_have_a_greatest_length() -> None:
    with serving(upload_bytes=1000) as (_, client):
        assert post(client, "x" * 2000).status_code == 413
        pieces = (b"x" * 100 for _ in range(100))
        reply = client.post(
            "/v1/chat/completions", content=pieces, headers={"Content-Type": "application/json"}
        )
        assert reply.status_code == 413 and reply.headers["connection"] == "close"
        assert post(client, "x").status_code == 200


def test_another_sites_name_is_not_answered() -> None:
    with serving() as (_, client):
        evil = client.get("/v1/models", headers={"Host": "evil.example:8000"})
        assert evil.status_code == 403 and "localhost only" in evil.text
    with serving(token="t") as (_, client):
        right = {"Host": "evil.example", "Authorization": "bearer t"}
        assert client.get("/v1/models", headers=right).status_code == 200


def test_which_addresses_are_of_this_machine() -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"):
        assert of_this_machine(host)
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.com", "", "localhost.evil.example"):
        assert not of_this_machine(host)


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_in_a_long_step_says_so_and_leaves_no_upload(
    stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "STOPPING_S", 0.1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    content = [FILM, {"type": "text", "text": "be deaf"}]
    messages = [{"role": "user", "content": content}]
    with serving() as (puppet, client):
        assert puppet.line is not None
        held: list[list[Path]] = []

        def stop() -> None:
            puppet.begun.wait(20)
            held.append(list(tmp_path.glob("iv3-upload-*/*.video")))
            puppet.line.close()  # type: ignore[union-attr]

        stopper = threading.Thread(target=stop)
        stopper.start()
        reply = client.post("/v1/chat/completions", json=body("", messages=messages, stream=stream))
        stopper.join()
        assert reply.status_code == (200 if stream else 503)
        assert "the server is stopping" in reply.text
        assert len(held[0]) == 1
        until(lambda: not list(tmp_path.iterdir()))
        puppet.freed.set()
