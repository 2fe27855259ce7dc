"""The server's side of HTTP, with a studio that says what the test wants.

pytest tests/harness/test_serving.py
"""

import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from internvideo3.harness.serving import jobs
from internvideo3.harness.serving.app import Serving
from internvideo3.harness.serving.hosts import of_this_machine
from internvideo3.harness.serving.jobs import Line
from internvideo3.harness.serving.studio import Say, Told, Turn
from internvideo3.harness.serving.wire import ApiError, Usage
from internvideo3.model.session import Limits
from internvideo3.tasks.video import VideoError


@dataclass
class Puppet:
    """A studio that speaks for as long as somebody listens when it is asked to go on."""

    begun: threading.Event = field(default_factory=threading.Event)
    freed: threading.Event = field(default_factory=threading.Event)
    ended: list[str] = field(default_factory=list)
    interrupted: int = 0
    line: Line | None = None

    def answer(self, turns: Sequence[Turn], limits: Limits, say: Say, *, agentic: bool) -> Told:
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
    app = Serving(studio=puppet, line=line, name="puppet", **options).app()
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
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
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                b"application/json\r\nContent-Length: %d\r\n\r\n" % len(request) + request
            )
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
    film = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    content = [film, {"type": "text", "text": "be deaf"}]
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
