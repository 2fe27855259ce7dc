"""Shared by the training tests: real video files, and a server that answers as a teacher would."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvideo3.tasks.world import media
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.render import frame_times
from internvideo3.tasks.world.scenes import VideoSpec, draw_video


def write_video(path: Path, seed: int, length_s: int = 12, profile: Any = "main") -> VideoSpec:
    """An mp4 file of the scale world, H.264, and what it shows."""
    spec = draw_video(seed, length_s, profile)
    path.write_bytes(media.encode_video(paint(spec, frame_times(spec))))
    return spec


@pytest.fixture(scope="session")
def make_video() -> Callable[..., VideoSpec]:
    """Writes a video: (path, seed, seconds, kind)."""
    return write_video


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four videos."""
    folder = tmp_path_factory.mktemp("videos")
    for seed in range(4):
        write_video(folder / f"v{seed}.mp4", seed)
    return folder


class Teacher:
    """A chat server on this machine; it counts requests, and fails when it is told to."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.failures: list[int | None] = []
        """Status of the next answers; None: the connection is dropped."""
        self.missing: list[int] = []
        """Bytes by which the next replies are shorter than they say."""
        self.answer: Callable[[str, list[Any]], str] = told
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                teacher.requests.append(body)
                status = teacher.failures.pop(0) if teacher.failures else 200
                if status is None:
                    self.connection.close()
                    return
                reply = json.dumps(teacher.reply(body)).encode()
                self.send_response(status)
                missing = teacher.missing.pop(0) if teacher.missing else 0
                self.send_header("Content-Length", str(len(reply) + missing))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        parts = body["messages"][0]["content"]
        pictures = [
            np.asarray(Image.open(io.BytesIO(base64.b64decode(one["image_url"]["url"][22:]))))
            for one in parts
            if one["type"] == "image_url"
        ]
        text = self.answer(parts[-1]["text"], pictures)
        return {"choices": [{"message": {"role": "assistant", "content": text}}]}


def told(prompt: str, pictures: list[Any]) -> str:
    """What a modest captioning model would say; captions depend on the pixels."""
    if pictures:
        red, green, blue = np.mean([one.mean((0, 1)) for one in pictures], 0).round().astype(int)
        return f"A room of tone {red} {green} {blue} with shapes that move."
    if "summaries of the scenes" in prompt:
        scenes = re.findall(r"^\[(\d+)\] (.*)$", prompt, re.MULTILINE)
        return " ".join(f"{text} [{number}]" for number, text in scenes)
    if "captions of consecutive clips" in prompt:
        return re.findall(r"^- (.*)$", prompt, re.MULTILINE)[0]
    if "multiple-choice question" in prompt:
        number = len(prompt)
        return "Here it is:\n" + json.dumps({
            "question": f"What tone has room {number}?", "answer": "tone dark grey",
            "distractors": ["tone pale pink", "tone deep blue", "tone warm gold"],
            "start_s": 1.0, "end_s": 3.5,
        })  # fmt: skip
    return "I cannot know."


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    served = Teacher()
    yield served
    served.server.shutdown()
    served.server.server_close()
