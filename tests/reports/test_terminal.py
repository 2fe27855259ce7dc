"""Reports of Markdown in a terminal: `pytest tests/reports/test_terminal.py`."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from internvideo3.reports.markdown import escape
from internvideo3.reports.markdown import table as markdown_table
from internvideo3.reports.terminal import print_markdown

HEAD = ["system", "score", "− random looks", "n"]
ROWS = [
    ["scale:m2la: looks [at] random", "27.1 (19.3–35.0)", "–", "140"],
    ["other_name", "82.1 (77.1–87.1)", "+32.1 (+21.4 … +42.9)", "1 677"],
]
TEXT = "\n\n".join(
    ["# Title", "Words [in brackets].", "## Suite",
     markdown_table(HEAD, [[escape(cell) for cell in row] for row in ROWS]), "The end."]
)  # fmt: skip


def printed(width: int, *, terminal: bool = True) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=terminal, color_system=None)
    print_markdown(TEXT, console=console)
    return out.getvalue()


def test_a_pipe_gets_the_markdown_as_it_stands() -> None:
    assert printed(20, terminal=False) == TEXT + "\n"


def test_what_is_piped_is_not_touched() -> None:
    out = io.StringIO()
    console = Console(file=out, width=20, force_terminal=False)
    text = "a :warning:\t[bold]b[/bold]\x1b[2J\n"
    print_markdown(text, console=console)
    assert out.getvalue() == text


def test_wide_characters_take_two_cells_and_none_steers_the_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, width=44, force_terminal=True, color_system=None)
    rows = [["模型一二三四五六", "百分之五十五十", "x\x1b[2Jy"], ["", "", ""]]
    print_markdown(markdown_table(["名字", "分数", "n"], rows), console=console)
    for cell in rows[0][:2]:
        assert cell in out.getvalue()
    assert "\x1b" not in out.getvalue()
    print_markdown(markdown_table(["", "n"], [["", "1"]]), console=console)


def test_a_table_that_fits_is_one_line_a_row() -> None:
    lines = printed(120).splitlines()
    for row in ROWS:
        assert any(all(cell in line for cell in row) for line in lines)
    assert "Words [in brackets]." in printed(120) and lines[-1].strip() == "The end."


@pytest.mark.parametrize("width", [64, 44])
def test_no_number_is_cut_where_there_is_less_room(width: int) -> None:
    """Intervals below their values at first, then a list; nothing longer than the terminal."""
    text = printed(width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    for piece in ("27.1", "(19.3–35.0)", "+32.1", "(+21.4 … +42.9)", "1 677", "[at]"):
        assert piece in text, piece
    assert ("\n  score           27.1 (19.3–35.0)\n" in text) == (width == 44)
