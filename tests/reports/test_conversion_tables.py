"""The conversion's tables are what the recorded files say.

Run: .venv/bin/python -m pytest tests/reports/test_conversion_tables.py -q
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internvideo3.harness.conversion_report import bars
from internvideo3.reports.conversion_tables import RESULTS, TABLES, written

PAGE = Path(__file__).parents[2] / "model" / "conversion" / "README.md"
RECORDED = {name: file for name, (file, _) in TABLES.items() if (RESULTS / file).is_file()}


def test_the_page_says_what_the_files_say() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert {"smollm2", "norms", "ablation of parts"} <= {*RECORDED}
    assert all(f"<!-- {name} -->\n| " in page for name in RECORDED)
    assert written(page) == page, "run: python -m internvideo3.reports.conversion_tables " + str(
        PAGE
    )


def test_another_figure_changes_the_page(tmp_path: Path) -> None:
    for file in RECORDED.values():
        (tmp_path / file).write_text((RESULTS / file).read_text())
    report = json.loads((tmp_path / "smollm2.json").read_text())
    report["seeds"]["0"]["absorbed 50 %"]["perplexity_ratio"] = 7.654
    (tmp_path / "smollm2.json").write_text(json.dumps(report))
    page = written(PAGE.read_text(encoding="utf-8"), tmp_path)
    assert "7.654" in page and "7.654" not in PAGE.read_text(encoding="utf-8")


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(KeyError, match="no such"):
        written("<!-- no such -->\n<!-- end no such -->")


def test_recorded_files_name_their_command_and_commit() -> None:
    for file in {*RECORDED.values()}:
        report = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        assert report.get("command") or report["commands"]
        assert len(report["commit"]) == 40 and report["dirty"] is False


def test_bars_are_of_the_recorded_rows_and_met() -> None:
    report = json.loads((RESULTS / "smollm2.json").read_text(encoding="utf-8"))
    assert bars(report["seeds"]) == report["bars"]
    missed = [name for name, bar in report["bars"].items() if not bar["met"]]
    # What is missed is said where the figures are.
    assert missed == ["absorbed 50 % over the best transmla 50 %"]
    assert "0.65 times the best baseline is missed" in PAGE.read_text(encoding="utf-8")
    norms = json.loads((RESULTS / "gemma3_norms.json").read_text(encoding="utf-8"))
    assert norms["bar"]["met"]


def test_a_bar_that_one_seed_misses_is_not_met() -> None:
    rows = {"absorbed 50 %": {"perplexity_ratio": 1.2}, "transmla 50 %": {"perplexity_ratio": 2.0}}
    worse = rows | {"absorbed 50 %": {"perplexity_ratio": 1.4}}
    assert all(bar["met"] for bar in bars({"0": rows}).values())
    assert not any(bar["met"] for bar in bars({"0": rows, "1": worse}).values())
