"""A command that is killed loses at most the samples under way, whenever that happens.

pytest tests/harness/test_kills.py takes some of the moments at which a run changes the disk, and
`make kill-report` all of them, in minutes; its result is reports/results/kills.json.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from internvideo3.harness import provenance
from internvideo3.harness.store import write_json

EVERY = int(os.environ.get("IV3_KILLS_EVERY", 29))
OUT = os.environ.get("IV3_KILLS_OUT")
RECORDED = Path(__file__).parents[2] / "reports/results/kills.json"


@pytest.fixture(scope="module")
def report(
    world: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lab")
    lab = Path(__file__).with_name("kill_lab.py")
    done = subprocess.run(
        [sys.executable, str(lab), str(world), str(checkpoint), str(folder), str(EVERY)],
        capture_output=True,
        text=True,
        timeout=280 if EVERY > 1 else 3600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.slow
def test_a_command_killed_at_any_change_of_the_disk_goes_on_to_the_same_bytes(
    report: dict[str, Any],
) -> None:
    commands = report["commands"]
    assert set(commands) == {"eval", "eval of merged shards", "score"}
    for one in commands.values():
        possible = one["changes"] + one["writes"]
        assert one["changes"] > 20 and one["writes"] > 3
        assert one["kills"] == -(-possible // EVERY)
    # What is under way is a batch: the questions about one video.
    assert commands["eval"]["most_samples_lost"] <= report["samples"] / 7
    assert commands["eval of merged shards"]["most_samples_lost"] == 0
    assert commands["score"]["most_samples_lost"] == 0
    if OUT:
        commit, dirty = provenance.revision()
        made = {"command": "make kill-report", "created": provenance.now(), "commit": commit,
                "dirty": dirty, "hardware": provenance.hardware()}  # fmt: skip
        write_json(Path(OUT), made | report)


def test_the_recorded_proof_took_every_moment() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert recorded["every"] == 1 and not recorded["dirty"]
    for one in recorded["commands"].values():
        assert one["kills"] == one["changes"] + one["writes"]
