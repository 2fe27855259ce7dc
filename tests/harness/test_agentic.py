"""Agentic evaluation: one rollout a question, traces kept, killed and resumed, equal to the byte.

pytest tests/harness/test_agentic.py
"""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internvideo3.harness.agent.budget import Budget
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.agentic import NO_VIDEO
from internvideo3.harness.agentic_options import agent_options
from internvideo3.harness.evaluate import evaluate
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.preflight import PreflightError
from internvideo3.harness.traces import TraceError, read_trace, trace_path

AGENT = AgentSettings(
    budget=Budget(turns=3, tool_calls=2, tokens=4000), zoom_frames=4, tools=(), seed=3
)


@pytest.fixture(scope="module")
def options(world: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalOptions:
    os.environ["IV3_AGENT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return EvalOptions(
        model=str(checkpoint), suites=("world_long",), root=world,
        out=tmp_path_factory.mktemp("runs") / "whole",
        limit=4, max_frames=8, max_new_tokens=4, agent=AGENT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(options: EvalOptions) -> Path:
    assert evaluate(options).computed == 4
    return options.out


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples/world_long.jsonl").open()]


def content(run: Path) -> dict[str, bytes]:
    files = [*sorted((run / "traces").rglob("*.gz")), run / "samples/world_long.jsonl"]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def test_every_question_has_a_rollout_with_its_cost(whole: Path) -> None:
    meta = json.loads((whole / "run.json").read_text())
    assert meta["mode"] == "agentic" and meta["config"]["agent"]["looks"] == "new"
    found = rows(whole)
    assert len(found) == 4
    for row in found:
        trace = read_trace(trace_path(whole, row["id"]))
        agent = row["agent"]
        assert agent["cost"] == trace["cost"] and 1 <= agent["cost"]["turns"] <= 3
        assert row["prediction"] == trace["answer"]["wording"]
        assert trace["answer"]["answer"] in row["options"]
        assert row["official"]["outcome"] == "answered", "it is worded as the question asks"
        assert trace["question"] == row["question"] + trace["question"][len(row["question"]) :]
    times = [json.loads(line) for line in (whole / "timings/world_long.jsonl").open()]
    assert all(sum(v for k, v in one.items() if k.endswith("_s")) > 0 for one in times)


DIES_AFTER_TWO = """
import os, pickle, signal, sys
from internvideo3.harness.evaluate import evaluate

def die(_, done, __):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

with open(sys.argv[1], "rb") as file:
    evaluate(pickle.load(file), die)
"""


def test_killed_after_two_rollouts_and_resumed_it_equals_the_uninterrupted_run(
    whole: Path, options: EvalOptions, tmp_path: Path
) -> None:
    killed = replace(options, out=tmp_path / "killed")
    given = tmp_path / "options.pickle"
    given.write_bytes(pickle.dumps(killed))
    child = subprocess.run([sys.executable, "-c", DIES_AFTER_TWO, str(given)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert len(rows(killed.out)) == 2
    summary = evaluate(killed)
    assert (summary.computed, summary.kept) == (2, 2), "no rollout is repeated"
    assert content(killed.out) == content(whole)


def test_what_has_no_video_to_look_at_again_is_answered_directly(
    options: EvalOptions, tmp_path: Path
) -> None:
    blind = replace(options, out=tmp_path / "text", control="text", limit=2)
    evaluate(blind)
    for row in rows(blind.out):
        assert row["agent"]["ended"] == NO_VIDEO and row["agent"]["cost"]["tool_calls"] == 0
        assert row["prediction"] is not None


def test_an_unreadable_video_is_a_failed_sample(
    options: EvalOptions, world: Path, tmp_path: Path
) -> None:
    video = world / "test" / rows_of(world)[0]["video"]
    kept = video.read_bytes()
    video.write_bytes(b"no video")
    try:
        broken = replace(options, out=tmp_path / "broken", limit=1)
        (error,) = evaluate(broken).errors
    finally:
        video.write_bytes(kept)
    assert error["prediction"] is None and "agent" not in error
    with pytest.raises(TraceError, match="no trace at"):
        read_trace(trace_path(broken.out, error["id"]))


def rows_of(world: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / "test/world_long.jsonl").open()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"looks": "nwe"}, "Did you mean new"),
        ({"tools": "asr,ocrr"}, "Did you mean ocr"),
        ({"direct_only": {"--thinking": True}}, "--thinking has no agentic form"),
        ({"budget": (0, 1, 4000)}, "too small"),
    ],
)
def test_a_senseless_agent_is_refused_before_any_work(given: dict[str, Any], said: str) -> None:
    asked: dict[str, Any] = {
        "policy": "controller", "budget": (3, 2, 4000), "looks": "new", "zoom_frames": 4,
        "tools": None, "verify": True, "direct_only": {},
    }  # fmt: skip
    with pytest.raises((PreflightError, ValueError), match=said):
        agent_options(**(asked | given))


def test_no_sample_id_leaves_the_folder_of_traces(tmp_path: Path) -> None:
    for sample in ("../../x", "a/../b", "world_long/000001", "a b/ü:*?", "."):
        assert trace_path(tmp_path, sample).is_relative_to(tmp_path / "traces")
        assert ".." not in trace_path(tmp_path, sample).parts
