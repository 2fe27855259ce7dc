"""The shipped `scale:agent` drives the loop by its own calls, on a video that it has never seen.

pytest tests/agent/test_acting.py
"""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from internvideo3.harness.agent.actions import parse_call
from internvideo3.harness.agent.budget import Budget
from internvideo3.harness.agent.context import CALL
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.evaluate import evaluate
from internvideo3.harness.options import EvalOptions
from internvideo3.model.checkpoint import SCALE_FOLDER, SCALE_NAMES, load_model, weights_digest
from internvideo3.reports.trace import WIDTH, timeline
from internvideo3.tasks.brief import build_brief
from internvideo3.tasks.scoring import score


@pytest.fixture(scope="module")
def acted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[Any]]:
    """Samples and traces of seven questions about five minutes of video."""
    folder = tmp_path_factory.mktemp("acting")
    build_brief(folder, limit_videos=1)
    out = folder / "run"
    evaluate(
        EvalOptions(
            model="scale:agent",
            suites=("world_brief",),
            root=folder,
            out=out,
            max_frames=64,
            agent=AgentSettings(
                policy="trained", budget=Budget(turns=7, tool_calls=4), zoom_frames=8, tools=()
            ),
        )
    )
    samples = [json.loads(row) for row in (out / "samples/world_brief.jsonl").open()]
    traces = [
        json.loads(
            gzip.decompress((out / "traces/world_brief" / f"{number:06d}.json.gz").read_bytes())
        )
        for number in range(len(samples))
    ]
    return samples, traces


def test_its_calls_bring_the_evidence_and_its_answers_rest_on_it(
    acted: tuple[list[dict[str, Any]], list[Any]],
) -> None:
    samples, traces = acted
    right = [score("world_brief", sample, sample["prediction"]).value for sample in samples]
    assert len(samples) == 7 and sum(right) >= 5, [sample["prediction"] for sample in samples]
    for sample, trace in zip(samples, traces, strict=True):
        kinds = [entry["kind"] for entry in trace["entries"]]
        assert kinds.count("observation") == 1 + sample["agent"]["cost"]["tool_calls"]
    assert sum(sample["agent"]["cost"]["tool_calls"] for sample in samples) >= 7
    assert sum(sample["agent"]["ended"] == "verified" for sample in samples) >= 5


def test_every_call_is_one_that_the_model_wrote(
    acted: tuple[list[dict[str, Any]], list[Any]],
) -> None:
    """Not the controller's: the words of a turn that looked parse to the action of its entry."""
    _, processor = load_model("scale:agent", "cpu")
    seen = 0
    for trace in acted[1]:
        said = ""
        for entry in trace["entries"]:
            if entry["kind"] == "reasoning":
                said = processor.tokenizer.decode(entry["data"]["ids"])
            if entry["kind"] == "action" and '"name":"pick_clips"' in entry["text"]:
                call = parse_call(said.partition(CALL[0])[2].partition(CALL[1])[0])
                assert call.model_dump(mode="json") == json.loads(entry["text"])
                seen += 1
    assert seen >= 7


def test_the_timeline_shows_the_parts_that_were_seen_and_no_more(
    acted: tuple[list[dict[str, Any]], list[Any]],
) -> None:
    looks = 0
    for trace in acted[1]:
        bars = timeline(trace, 300.0)
        seen = [e for e in trace["entries"] if e["kind"] == "observation" and e["span"]]
        for row, entry in enumerate(seen, 1):
            mine = [bar for bar in bars if bar.row == row]
            parts = entry["data"].get("parts") or [entry["span"]]
            assert len(mine) == len(parts)
            length_s = sum(end_s - start_s for start_s, end_s in parts)
            assert sum(bar.width for bar in mine) == pytest.approx(WIDTH * length_s / 300, abs=3)
            looks += len(parts) > 1
    assert looks >= 7


def test_the_card_is_of_the_weights_that_are_shipped() -> None:
    text = (SCALE_FOLDER / "AGENT_CARD.md").read_text(encoding="utf-8")
    (told,) = re.findall(r"Weights digest `(\w+)`", text)
    assert weights_digest(SCALE_NAMES["scale:agent"]).startswith(told)
    assert (Path(SCALE_FOLDER) / "agent_curve.svg").is_file()
