"""Table 5's figure from a folder of stages: `pytest tests/reports/test_table5.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from internvideo3.reports.ablation import draw_curves


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
