"""Table 5's intervals over seeds, and its figure: `pytest tests/reports/test_table5.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from internvideo3.reports.ablation import Change, _changes_table, _over_seeds, _told, draw_curves

RECORDED = Path(__file__).parents[2] / "reports/results/ablation"


@pytest.mark.parametrize("scale", [True, False])
def test_curves_are_called_scale_only_where_the_table_is(tmp_path: Path, scale: bool) -> None:
    """A line a seed of the full recipe, from the metrics of its stages."""
    made = {"scale": scale, "stages": {f"full-s{n}": [f"stages/cpt-{n}"] for n in range(2)}}
    for (stage,) in made["stages"].values():
        (tmp_path / stage).mkdir(parents=True)
        rows = [json.dumps({"step": step, "loss": 3.0 - step}) for step in (1, 2)]
        (tmp_path / stage / "metrics.jsonl").write_text("\n".join(rows))
    draw_curves(tmp_path, made)
    drawn = (tmp_path / "curves.svg").read_text()
    # Beside the outlines of a text, matplotlib writes it as a comment.
    assert f"<!-- {'scale: ' if scale else ''}the stages of full -->" in drawn
    assert "<!-- full-s0 -->" in drawn and "<!-- full-s1 -->" in drawn


def of_seeds(differences: Sequence[float]) -> Change:
    """A change whose interval over questions excludes zero."""
    return Change(-0.05, (-0.09, -0.01), _over_seeds(differences), 100, len(differences))


@pytest.mark.parametrize(
    "differences",
    [[-0.05], [-0.05, -0.05], [-0.05, -0.06], [-0.05] * 3, [0.1 + 0.2, 0.3, 0.3], [-0.05] * 7],
)
def test_seeds_that_are_few_or_all_alike_make_nothing_significant(
    differences: list[float],
) -> None:
    """Their interval would have no width (or, of two, be of one degree of freedom)."""
    change = of_seeds(differences)
    assert change.over_seeds is None and not change.significant
    made = {"changes": {"no_rl": {"s": _told(change)}}, "questions": {"s": 100}}
    text = _changes_table(made)
    assert "-5.0 [-9.0 … -1.0] |" in text
    assert ("None over seeds where" in text) == (len(differences) > 1)


def test_seeds_that_spread_have_students_interval() -> None:
    """Student's t of two degrees of freedom is 4.302653 at 97.5 %."""
    change = of_seeds([-0.04, -0.05, -0.06])
    half = 4.302653 * 0.01 / 3**0.5
    assert change.over_seeds == pytest.approx((-0.05 - half, -0.05 + half), abs=1e-7)
    assert change.significant


@pytest.mark.parametrize("folder", ["", "scale", "former", "without_descriptions", "teacher"])
def test_recorded_tables_are_written_as_they_are(folder: str) -> None:
    made = json.loads((RECORDED / folder / "table5.json").read_text())
    assert _changes_table(made) in (RECORDED / folder / "table5.md").read_text()
