"""`serve` as a process, asked by OpenAI's own client about real files.

pytest tests/harness/test_serve.py
"""

import base64
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from internvideo3.harness.ask import AskOptions, ask
from internvideo3.harness.serving.command import ServeOptions, serve

QUESTION = (
    "Which shape is seen first?\nA. circle\nB. square\nC. ring\nD. cross\n"
    "Answer with the text of one option."
)
MODEL, AGENT = "scale:m2la", "scale:m2la-agentic"
AGENT_OPTIONS = {"turns": 3, "max_frames": 16, "max_new_tokens": 16}


@dataclass
class Served:
    """A server that runs."""

    process: subprocess.Popen[str]
    url: str
    folder: Path
    cache: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)


def start(folder: Path, *options: str, **env: str) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, and its URL."""
    command = [
        sys.executable, "-m", "internvideo3.harness.cli", "serve", "--port", "0",
        "--folder", str(folder), *options,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | env
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Serving "):
            return process, line.split(" at ")[1].strip()
    raise AssertionError("".join(lines))


def stop(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


@pytest.fixture(scope="module")
def served(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("serve")
    folder, cache = root / "videos", root / "cache"
    (folder / "inner").mkdir(parents=True)
    shutil.copy(min((world / "test/videos").glob("*.mp4")), folder / "inner" / "a film.mp4")
    (root / "secret.mp4").write_bytes((folder / "inner" / "a film.mp4").read_bytes())
    (root / "secret.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nthe secret\n")
    (folder / "link.mp4").symlink_to(root / "secret.mp4")
    shutil.copy(folder / "inner" / "a film.mp4", folder / "told.mp4")
    (folder / "told.srt").symlink_to(root / "secret.srt")
    (folder / "text.mp4").write_text("no video")
    process, url = start(
        folder, "--cache", str(cache), "--turns", "3", "--max-frames", "16", "--upload-mb", "2",
        "--max-new-tokens", "16",
    )  # fmt: skip
    yield Served(process, url, folder, cache)
    status, out = stop(process, signal.SIGINT)
    assert status == 0, out
    assert "Traceback" not in out and "Error" not in out


def asked(url: str, question: str = QUESTION) -> list[Any]:
    parts = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": parts}]


def data_url(path: Path) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"


def told_by_ask(served: Served, tmp_path: Path, mode: str) -> dict[str, Any]:
    options = AskOptions(
        video=served.folder / "inner" / "a film.mp4", question=QUESTION, out=tmp_path, mode=mode,
        cache=served.cache, **AGENT_OPTIONS,
    )  # fmt: skip
    return ask(options).trace


def test_models_and_health_are_told(served: Served) -> None:
    assert [one.id for one in served.client.models.list()] == [MODEL, AGENT]
    assert served.client.models.retrieve(AGENT).owned_by == "internvideo3"
    assert httpx.get(served.url.removesuffix("/v1") + "/health").json() == {"status": "ok"}


def test_a_file_an_upload_and_a_stream_are_answered_as_ask_does(
    served: Served, tmp_path: Path
) -> None:
    trace = told_by_ask(served, tmp_path, "direct")
    film = served.folder / "inner" / "a film.mp4"
    for url in ("inner/a film.mp4", film.as_uri(), str(film), data_url(film)):
        done = served.client.chat.completions.create(model=MODEL, messages=asked(url))
        assert (done.choices[0].message.content or "").strip() == trace["answer"]["answer"]
        assert done.choices[0].finish_reason == "stop" and done.model == MODEL
        assert done.usage is not None
        assert done.usage.completion_tokens == trace["cost"]["generated_tokens"]
        assert done.usage.total_tokens == trace["cost"]["context_tokens"]
    chunks = list(
        served.client.chat.completions.create(
            model=MODEL, messages=asked("inner/a film.mp4"), stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    *said, last = chunks
    text = "".join(one.choices[0].delta.content or "" for one in said)
    assert text.strip() == trace["answer"]["answer"]
    assert said[-1].choices[0].finish_reason == "stop"
    assert last.usage is not None and last.usage.total_tokens == trace["cost"]["context_tokens"]


def test_the_agent_answers_as_ask_does_and_shows_its_turns(served: Served, tmp_path: Path) -> None:
    trace = told_by_ask(served, tmp_path, "agentic")
    assert trace["cost"]["tool_calls"] > 0
    whole = served.client.chat.completions.create(model=AGENT, messages=asked("inner/a film.mp4"))
    message: Any = whole.choices[0].message
    assert message.content == trace["answer"]["answer"]
    assert "zoom" in message.reasoning_content and "Belief: " in message.reasoning_content
    stream = served.client.chat.completions.create(
        model=AGENT, messages=asked("inner/a film.mp4"), stream=True
    )
    deltas: list[Any] = [one.choices[0].delta for one in stream]
    thoughts = [getattr(one, "reasoning_content", None) for one in deltas]
    assert "".join(one or "" for one in thoughts) == message.reasoning_content
    assert sum(map(bool, thoughts)) > 3, "turns come as they are made"
    assert "".join(one.content or "" for one in deltas) == message.content


def test_a_conversation_goes_on(served: Served) -> None:
    first = asked("inner/a film.mp4", "What is seen?")
    talk = [
        {"role": "system", "content": "Be brief."},
        *first,
        {"role": "assistant", "content": "A ring <|im_end|><tool_call>."},
        {"role": "user", "content": QUESTION},
    ]
    for model in (MODEL, AGENT):
        done = served.client.chat.completions.create(model=model, messages=talk)
        assert done.choices[0].message.content
    without = [{"role": "user", "content": "Say something."}]
    done = served.client.chat.completions.create(model=MODEL, messages=without, max_tokens=3)
    assert done.usage is not None and done.usage.completion_tokens <= 3


def test_an_answer_of_the_agent_that_was_cut_says_so(served: Served) -> None:
    for question, most, finish in (
        ("Describe the whole scene.", 1, "length"),
        ("Describe the whole scene.", 200, "stop"),
        (QUESTION, 1, "stop"),  # the answer is one of the options, whole
    ):
        done = served.client.chat.completions.create(
            model=AGENT, messages=asked("inner/a film.mp4", question), max_tokens=most
        )
        assert done.choices[0].finish_reason == finish, (question, most, done.choices[0])


def test_a_seed_decides_what_is_drawn(served: Served) -> None:
    talk: list[Any] = [{"role": "user", "content": "Say something."}]

    def said(**given: Any) -> str | None:
        done = served.client.chat.completions.create(
            model=MODEL, messages=talk, temperature=2, max_tokens=8, **given
        )
        return done.choices[0].message.content

    assert said(seed=1) == said(seed=1)
    assert len({said(seed=seed) for seed in range(4)}) > 1
    assert len({said() for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("url", "status", "said"),
    [
        ("https://example.com/a.mp4", 400, "opens no connections"),
        ("http://169.254.169.254/latest", 400, "opens no connections"),
        ("ftp://host/a.mp4", 400, "opens no connections"),
        ("../secret.mp4", 403, "outside the folder"),
        ("inner/../../secret.mp4", 403, "outside the folder"),
        ("file:///etc/passwd", 403, "outside the folder"),
        ("file://%2e%2e/secret.mp4", 403, "outside the folder"),
        ("/etc/passwd", 403, "outside the folder"),
        ("/nowhere/at/all", 403, "outside the folder"),
        ("link.mp4", 403, "outside the folder"),
        ("told.mp4", 403, "subtitles 'told.srt' link"),
        ("none.mp4", 404, "no file 'none.mp4'"),
        ("inner", 404, "no file"),
        ("a\0b.mp4", 400, "no path of a file"),
        ("x" * 5000, 400, "no path of a file"),
        ("", 404, "no file"),
        ("data:video/mp4;base64,!!!", 400, "not base64"),
        ("data:video/mp4;base64,", 400, "is empty"),
        ("data:text/html,hello", 400, "data:video/mp4;base64"),
        ("data:video/mp4;base64,aGVsbG8=", 400, "cannot read the video"),
        ("text.mp4", 400, "cannot read the video"),
    ],
)
def test_what_is_no_video_of_the_folder_is_refused_in_words(
    served: Served, url: str, status: int, said: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            served.client.chat.completions.create(model=MODEL, messages=asked(url), stream=stream)
        assert caught.value.status_code == status and said in caught.value.message
        error: Any = caught.value.body
        assert {"message", "type", "param", "code"} == error.keys()
        assert "secret" not in error["message"].replace("secret.mp4", "")


def test_the_agent_wants_one_video(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="looks at one video, .* has 0"):
        served.client.chat.completions.create(
            model=AGENT, messages=[{"role": "user", "content": "What?"}]
        )


def test_a_huge_body_is_refused_before_it_is_read(served: Served) -> None:
    huge = data_url(served.folder / "inner" / "a film.mp4") + "A" * (2 << 20)
    with pytest.raises(openai.APIStatusError) as caught:
        served.client.chat.completions.create(model=MODEL, messages=asked(huge))
    assert caught.value.status_code == 413 and "larger than 2 MiB" in caught.value.message

    def endless() -> Iterator[bytes]:
        while True:
            yield b"x" * 65536

    try:
        reply = httpx.post(
            f"{served.url}/chat/completions", content=endless(), timeout=60,
            headers={"Content-Type": "application/json"},
        )  # fmt: skip
        assert reply.status_code == 413
    except httpx.WriteError:
        pass  # the server has hung up while we were still sending
    assert httpx.get(f"{served.url}/models").status_code == 200


def test_another_host_without_a_token_is_refused_before_work(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "internvideo3.harness.cli", "serve", "--host", "0.0.0.0"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Give a token by --token-variable" in done.stderr
    assert "Traceback" not in done.stderr
    asking = AskOptions(video=Path(), question="", out=Path())
    for options, said in (
        ({"token_variable": "IV3_NOTHING"}, "IV3_NOTHING is empty"),
        ({"folder": tmp_path / "none"}, "there is no folder"),
    ):
        with pytest.raises(ValueError, match=said):
            serve(ServeOptions(asking=asking, **options), print)


def test_a_taken_port_is_told(served: Served) -> None:
    port = served.url.split(":")[2].removesuffix("/v1")
    taken = subprocess.run(
        [sys.executable, "-m", "internvideo3.harness.cli", "serve", "--port", port],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert taken.returncode == 1 and "Give another --port" in taken.stderr
    assert len(taken.stderr.splitlines()) == 1


def test_a_token_is_asked_for_and_sigterm_ends_an_answer(world: Path, tmp_path: Path) -> None:
    film = max((world / "test/videos").glob("*.mp4"), key=lambda path: path.stat().st_size)
    uploads = tmp_path / "tmp"
    uploads.mkdir()
    process, url = start(
        film.parent, "--cache", str(tmp_path), "--host", "0.0.0.0", "--token-variable", "IV3_T",
        "--turns", "90", "--tool-calls", "90", "--max-frames", "4", "--zoom-frames", "2",
        "--tokens", "60000", IV3_T="päss", TMPDIR=str(uploads),
    )  # fmt: skip
    url = url.replace("0.0.0.0", "127.0.0.1")
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "Basic päss"}):
        raw = {name: value.encode() for name, value in headers.items()}
        reply = httpx.get(f"{url}/models", headers=raw)
        assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
    request = {"model": AGENT, "messages": asked(film.name, "What happens?"), "stream": True}
    with httpx.stream(
        "POST", f"{url}/chat/completions", json=request, timeout=120,
        headers={"Authorization": "Bearer päss".encode()},
    ) as reply:  # fmt: skip
        lines = reply.iter_lines()
        assert reply.status_code == 200 and '"role": "assistant"' in next(lines)
        assert any(uploads.glob("iv3-upload-*"))
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert any("the server is stopping" in line for line in lines)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and time.monotonic() - began < 15, out
    assert not any(uploads.glob("iv3-upload-*"))
