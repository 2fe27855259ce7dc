"""Small runs on disk, in the layout that the harness writes, over real little mp4 files."""

import json
import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from internvideo3.tasks.scoring import aggregate, score

HOSTILE = '<script>window.pwned=1</script><img src=x onerror="window.pwned=1">{{7*7}}</script>'
SKILL = {"base": 0.7, "m2la": 0.68, "control": 0.72, "blind": 0.26}
COLOURS = ("red", "green", "blue", "cyan")


def write_video(path: Path, seconds: int, colour: int) -> None:
    """Write a square that crosses the picture, 8 frames a second, 64 x 64 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(8))
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(8 * seconds):
            pixels_HWC = np.full((64, 64, 3), 230, np.uint8)
            x = (3 * i) % 48
            pixels_HWC[20:36, x : x + 16] = 40
            pixels_HWC[20:36, x : x + 16, colour % 3] = 220
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def documents(root: Path, videos: int) -> dict[str, list[dict[str, Any]]]:
    """Two suites: choices (one video with hostile text) and spans."""
    rng = random.Random(0)
    suites: dict[str, list[dict[str, Any]]] = {"world_long": [], "world_grounding": []}
    for v in range(videos):
        seconds = (4, 12, 24)[v % 3]
        path = root / "videos" / f"v{v}.mp4"
        if not path.exists():
            write_video(path, seconds, v)
        shared = {"video_id": f"v{v}", "video": str(path), "length_s": float(seconds)}
        for family in ("needle", "order", "count"):
            options = rng.sample(COLOURS, 4)
            if v % 4 == 0 and family == "needle":
                options[0] = HOSTILE
            start = rng.randrange(seconds - 2)
            suites["world_long"].append(
                shared
                | {
                    "family": family,
                    "question": HOSTILE
                    if v % 4 == 0 and family == "needle"
                    else f"Which colour is asked for in {family}?",
                    "options": options,
                    "answer": options[rng.randrange(4)],
                    "answer_type": "choice",
                    "evidence": [[start, start + 1.5]],
                }
            )
        start = rng.randrange(seconds - 2)
        suites["world_grounding"].append(
            shared
            | {
                "family": "ground_object",
                "question": "When is the square on screen?",
                "options": None,
                "answer": f"{start} - {start + 2}",
                "answer_type": "span",
                "evidence": [[start, start + 2]],
            }
        )
    for name, docs in suites.items():
        for i, doc in enumerate(docs):
            doc |= {"id": f"{name}/{i:06d}", "suite": name}
    return suites


def answer(doc: dict[str, Any], skill: float, rng: random.Random) -> str:
    """Answer rightly with a probability, else wrongly, now and then unreadably."""
    if doc["question"] == HOSTILE:
        return HOSTILE
    if rng.random() < 0.04:
        return "I cannot tell"
    if doc["answer_type"] == "span":
        start, end = (float(x) for x in doc["answer"].split(" - "))
        shift = 0.0 if rng.random() < skill else rng.uniform(-4, 4)
        return f"{max(0.0, start + shift):.1f} - {max(1.0, end + shift):.1f}"
    right = rng.random() < skill
    return str(doc["answer"] if right else rng.choice(doc["options"]))


def sample_line(doc: dict[str, Any], prediction: str | None) -> dict[str, Any]:
    """Return one line of samples/<suite>.jsonl."""
    suite = doc["suite"]
    failed = {"type": "VideoError", "message": "file is truncated"}
    return doc | {
        "prediction": prediction,
        "official": score(suite, doc, prediction).as_dict(),
        "plain": score(suite, doc, prediction, rule="plain").as_dict(),
        "tokens": {"prompt": 120, "new": 3},
        "error": failed if prediction is None else None,
    }


def run_json(name: str, docs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the content of run.json."""
    latent = name == "m2la"
    return {
        "schema": 1,
        "id": f"run-{name}",
        "created": "2026-11-22T13:00:00+00:00",
        "command": ["internvideo3", "eval", "--model", f"scale:{name}", "--suite", "scale"],
        "mode": "direct",
        "model": {
            "name": "scale:base" if name == "blind" else f"scale:{name}",
            "path": f"model/scale/{name}",
            "digest": f"sha256:{name:0<12}",
            "attention": "m2la" if latent else "gqa",
            "parameters": 4_730_000,
            "cache_bytes_per_token": 1536 if latent else 3072,
            "label": "scale",
        },
        "suites": {k: {"n": len(v), "data_digest": "d" * 8} for k, v in docs.items()},
        "config": {
            "fps": 2.0,
            "max_frames": 768,
            "seed": 0,
            "dtype": "float32",
            "control": "blind" if name == "blind" else None,
        },
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "packages": {"torch": "2.14.1", "transformers": "5.23.0"},
        "hardware": {"cpu": "two slow cores", "cores": 2},
        "comparable": {"paper": False, "reason": "scale model on the scale world"},
    }


def write_run(root: Path, name: str, docs: dict[str, list[dict[str, Any]]]) -> Path:
    """Write one whole run folder and return its path."""
    folder = root / f"run-{name}"
    rng = random.Random(name)
    results = {}
    for suite, suite_docs in docs.items():
        lines = []
        for i, doc in enumerate(suite_docs):
            prediction = None if i == 7 else answer(doc, SKILL[name], rng)
            lines.append(sample_line(doc, prediction))
        write_lines(folder / "samples" / f"{suite}.jsonl", lines)
        write_lines(folder / "timings" / f"{suite}.jsonl", [{"id": x["id"]} for x in lines])
        rows = [(x, score(suite, x, x["prediction"])) for x in lines]
        results[suite] = aggregate(suite, rows).as_dict()
    (folder / "run.json").write_text(json.dumps(run_json(name, docs)))
    (folder / "results.json").write_text(json.dumps(results))
    if name != "blind":
        write_lines(folder / "measurements.jsonl", measurements(name))
    return folder


def measurements(name: str) -> list[dict[str, Any]]:
    """Return profiler rows at three lengths."""
    latent = name == "m2la"
    shared = {"attention": "m2la" if latent else "gqa", "device": "cpu", "dtype": "float32",
              "threads": 1, "repeats": 5, "iqr_s": 0.001}  # fmt: skip
    rows = []
    for tokens in (256, 1024, 4096):
        prefill, decode = tokens / 9000, 0.002 + tokens * (1 if latent else 2) * 4e-7
        rows += [
            shared | {"kind": "prefill", "context_tokens": tokens, "median_s": prefill,
                      "tokens_per_s": tokens / prefill, "cache_bytes": None},
            shared | {"kind": "decode", "context_tokens": tokens, "median_s": decode,
                      "tokens_per_s": 1 / decode, "cache_bytes": None},
            shared | {"kind": "cache", "context_tokens": tokens, "median_s": None,
                      "tokens_per_s": None, "cache_bytes": tokens * (1536 if latent else 3072)},
        ]  # fmt: skip
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Base, M²LA, control and blind runs over 18 videos."""
    root = tmp_path_factory.mktemp("runs")
    docs = documents(root, 18)
    return [write_run(root, name, docs) for name in ("base", "m2la", "control", "blind")]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes one small run of its own, to be damaged by a test."""

    def make(name: str = "base", videos: int = 3) -> Path:
        return write_run(tmp_path, name, documents(tmp_path, videos))

    return make
