"""Where a report is written: over an earlier one, and over nothing else.

pytest tests/reports/test_place.py -q
"""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from internvideo3.harness import cli
from internvideo3.reports.load import RunError
from internvideo3.reports.page import build_report


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["report.html", "report.md", "leaderboard.csv", "tables.tex", "plots/lengths.svg"]
)
def test_files_of_others_are_never_overwritten(name: str, runs: list[Path], tmp_path: Path) -> None:
    mine = tmp_path / "page" / name
    if name.startswith("plots/"):
        drawn = build_report(runs, tmp_path / "other", title="T").parent / "plots"
        mine = tmp_path / "page" / "plots" / sorted(drawn.iterdir())[0].name
    mine.parent.mkdir(parents=True)
    mine.write_text("<p>mine</p>")
    before = content(tmp_path / "page")
    # Figures that only the runs decide are known when these are read.
    if name.startswith("plots/"):
        with pytest.raises(RunError, match=rf"holds .*{mine.name}.*Give another --out"):
            build_report(runs, tmp_path / "page", title="T")
    else:
        command = ["report", *map(str, runs), "--out", str(tmp_path / "page")]
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 1 and f"holds {name}, which no report of ours" in done.output
        demo = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "page")])
        assert demo.exit_code == 1 and f"holds {name}, which" in demo.output
        assert "1/4" not in demo.output
    assert content(tmp_path / "page") == before


def test_a_report_is_written_over_an_earlier_one_beside_other_files(
    runs: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    first = build_report(runs[:1], tmp_path, title="One")
    (tmp_path / "plots" / "my.svg").write_text("mine")
    command = ["report", *map(str, runs), "--out", str(tmp_path), "--title", "Two"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert "<title>Two</title>" in first.read_text()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "plots" / "my.svg").read_text() == "mine"
    # What is said to be the report's is.
    assert "notes.txt" not in done.output and "report.md" in done.output
    assert not list(tmp_path.rglob("*.part"))
