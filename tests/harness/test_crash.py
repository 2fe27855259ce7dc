"""Evaluations that are killed, interrupted or out of disk, and what the next command makes of it.

pytest tests/harness/test_crash.py
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUITES = ("world_short", "world_long")


@pytest.fixture(scope="module")
def lab(
    world: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("lab")
    script = Path(__file__).with_name("crash_lab.py")
    seed = random.SystemRandom().randrange(10**6)
    subprocess.run(
        [sys.executable, str(script), str(world), str(checkpoint), str(folder), str(seed)],
        check=True,
        timeout=200,
    )
    return folder, json.loads((folder / "report.json").read_text())


def content(run: Path) -> dict[str, bytes]:
    """The bytes that equal runs have in common: all but run.json and timings."""
    files = [run / "samples" / f"{suite}.jsonl" for suite in SUITES] + [run / "results.json"]
    return {path.name: path.read_bytes() for path in files}


def test_two_equal_runs_are_byte_equal(lab: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = lab
    assert content(folder / "again") == content(folder / "whole")


def test_killed_five_times_and_resumed_equals_uninterrupted(
    lab: tuple[Path, dict[str, Any]],
) -> None:
    folder, report = lab
    assert content(folder / "killed") == content(folder / "whole"), report["seed"]
    # A last batch can end the run within the moment before its kill.
    assert [kill["status"] for kill in report["kills"]].count(-9) >= 4, report["seed"]


def test_no_answered_sample_is_computed_twice(lab: tuple[Path, dict[str, Any]]) -> None:
    _, report = lab
    for kill in report["kills"]:
        assert not set(kill["on_disk"]) & set(kill["computed_later"]), report["seed"]
        assert len(set(kill["computed_later"])) == len(kill["computed_later"])


def test_timings_have_one_line_a_sample(lab: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = lab
    for suite in SUITES:
        samples, timings = (
            [
                json.loads(line)["id"]
                for line in (folder / "killed" / kind / f"{suite}.jsonl").open()
            ]
            for kind in ("samples", "timings")
        )
        assert timings == samples


def test_ctrl_c_keeps_what_is_answered_and_says_how_to_go_on(
    lab: tuple[Path, dict[str, Any]],
) -> None:
    folder, report = lab
    seen = report["interrupted"]
    assert seen["status"] == 130
    assert "repeat the same command to continue" in seen["said"]
    assert "Traceback" not in seen["said"]
    assert seen["on_disk"]
    assert seen["resumed"] == 0
    assert content(folder / "interrupted") == content(folder / "whole")


def test_a_full_disk_is_one_message_and_the_run_goes_on_later(
    lab: tuple[Path, dict[str, Any]],
) -> None:
    folder, report = lab
    assert report["full"]["status"] == 1
    assert "no space left" in report["full"]["said"]
    assert "Traceback" not in report["full"]["said"]
    assert report["full_resumed"] == 0
    assert content(folder / "full") == content(folder / "whole")
