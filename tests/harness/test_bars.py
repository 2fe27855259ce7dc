"""The list of bars: what tests say and what files hold, with verdicts.

Run: .venv/bin/python -m pytest tests/harness/test_bars.py -q
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from internvideo3.harness.bars import ROOT, measured_now
from internvideo3.harness.bars_recorded import RESULTS, Bar, BarsError, agent, conversion
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


def test_a_least_is_kept_from_above(tmp_path: Path) -> None:
    (one,) = judged(tmp_path, "    bar('three', 0.95, 0.9, least=True)\n")
    assert one.met and one.least and "at least 0.9" in one.line()
    (missed,) = judged(tmp_path, "    bar('three', 0.85, 0.9, least=True)\n")
    assert not missed.met and "MISSED" in missed.line()


def test_the_agents_bars_are_those_of_its_tables(tmp_path: Path) -> None:
    bars = {bar.name: bar for bar in agent()}
    rows = json.loads((RESULTS / "agent/m2la/table6.json").read_text())["rows"]
    (row,) = [row for row in rows if row["system"] == "agentic (controller)"]
    over = bars["m2la, agentic (controller): points over direct"]
    assert over.found[""] == 100 * row["difference"] and over.limit == 10
    assert bars["base, agentic (controller): points over direct"].limit == 10
    (tmp_path / "base").mkdir()
    (tmp_path / "base/table6.json").write_text('{"rows": []}')
    with pytest.raises(BarsError, match="no row agentic"):
        list(agent(tmp_path))


@pytest.mark.parametrize("figure", ["2.0", "float('nan')"])
def test_a_missed_bar_is_in_the_list_although_its_test_fails(tmp_path: Path, figure: str) -> None:
    (missed,) = judged(tmp_path, f"    bar('two', {figure}, 1.0)\n")
    assert not missed.met and "MISSED" in missed.line()


def test_recorded_bars_are_the_files_with_their_own_verdicts(tmp_path: Path) -> None:
    bars = {bar.name: bar for bar in conversion()}
    smollm2 = json.loads((RESULTS / "conversion/smollm2.json").read_text())["bars"]
    for name, own in smollm2.items():
        bar = bars[f"SmolLM2-135M, {name}"]
        assert (bar.found, bar.met) == (own["found"], own["met"])
    assert {f"SmolLM2-135M, {name}" for name in BARS} <= set(bars)
    assert all(
        bar.limit == BARS.get(name.partition(", ")[2], bar.limit) for name, bar in bars.items()
    )
    with pytest.raises(BarsError, match="smollm2.json is missing"):
        list(conversion(tmp_path))
