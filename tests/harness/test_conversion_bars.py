"""The list of bars: what tests say and what files hold, with verdicts.

Run: .venv/bin/python -m pytest tests/harness/test_conversion_bars.py -q
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from internvideo3.harness.conversion_bars import (
    RESULTS,
    ROOT,
    Bar,
    BarsError,
    measured_now,
    recorded,
)
from internvideo3.harness.conversion_report import BARS


def judged(tmp_path: Path, body: str) -> list[Bar]:
    """What pytest writes of a test with this body, beside the real conftest.py."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(f"def test_it(bar):\n{body}")
    junit = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    subprocess.run([*command, str(tmp_path), f"--junitxml={junit}"], check=False)
    return measured_now(junit)


def test_a_bar_of_several_cases_is_met_if_all_are(tmp_path: Path) -> None:
    found = judged(tmp_path, "    bar('one', 1e-7, 1e-5)\n    bar('one', 2e-6, 1e-5)\n")
    (one,) = found
    assert sorted(one.found.values()) == [1e-7, 2e-6] and one.met and one.limit == 1e-5
    assert "2e-06 worst of 2" in one.line() and "met" in one.line()
    assert one.source == "test_it.py" and one.measured == "now"


@pytest.mark.parametrize("figure", ["2.0", "float('nan')"])
def test_a_missed_bar_is_in_the_list_although_its_test_fails(tmp_path: Path, figure: str) -> None:
    (missed,) = judged(tmp_path, f"    bar('two', {figure}, 1.0)\n")
    assert not missed.met and "MISSED" in missed.line()


def test_recorded_bars_are_the_files_with_their_own_verdicts(tmp_path: Path) -> None:
    bars = {bar.name: bar for bar in recorded()}
    smollm2 = json.loads((RESULTS / "smollm2.json").read_text())["bars"]
    for name, own in smollm2.items():
        bar = bars[f"SmolLM2-135M, {name}"]
        assert (bar.found, bar.met) == (own["found"], own["met"])
    assert {f"SmolLM2-135M, {name}" for name in BARS} <= set(bars)
    assert all(
        bar.limit == BARS.get(name.partition(", ")[2], bar.limit) for name, bar in bars.items()
    )
    with pytest.raises(BarsError, match="smollm2.json is missing"):
        list(recorded(tmp_path))
