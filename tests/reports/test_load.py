"""Run with: pytest tests/reports/test_load.py -q."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from internvideo3.harness.store import RunStore
from internvideo3.reports.load import RunError, load_run, load_runs
from internvideo3.tasks.scoring import Outcome

MakeRun = Callable[..., Path]


def test_a_run_is_read_in_dataset_order(make_run: MakeRun) -> None:
    folder = make_run(videos=4)
    file = folder / "samples" / "world_long.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    run = load_run(folder)
    ids = [s.id for s in run.samples["world_long"]]
    assert ids == [f"world_long/{i:06d}" for i in range(12)]
    assert run.id == "run-base" and run.control is None
    assert set(run.timings) == {"world_long", "world_grounding"}
    assert len(run.measurements) == 9 and run.notes == ()


def test_ids_without_zeros_sort_by_number(make_run: MakeRun) -> None:
    folder = make_run()
    file = folder / "samples" / "world_long.jsonl"
    file.write_text(file.read_text().replace("world_long/00000", "world_long/q").replace(
        '"world_long/q3"', '"world_long/q12"'))  # fmt: skip
    ids = [s.id for s in load_run(folder).samples["world_long"]]
    assert ids[:2] == ["world_long/q0", "world_long/q1"] and ids[-1] == "world_long/q12"


def test_a_torn_last_line_is_left_out_and_noted(make_run: MakeRun) -> None:
    folder = make_run()
    file = folder / "samples" / "world_long.jsonl"
    file.write_bytes(file.read_bytes()[:-25])
    run = load_run(folder)
    assert len(run.samples["world_long"]) == 8
    assert "torn" in run.notes[0]


def test_damage_elsewhere_is_an_error_that_says_where(make_run: MakeRun) -> None:
    folder = make_run()
    file = folder / "samples" / "world_long.jsonl"
    file.write_text("{broken\n" + file.read_text())
    with pytest.raises(RunError, match=r"world_long.jsonl, line 1"):
        load_run(folder)


def test_a_run_without_anything_recorded_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"schema": 1}')
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/world_long.jsonl").touch()
    with pytest.raises(RunError, match="no answers and no measurements yet"):
        load_run(tmp_path)


def test_a_repeated_sample_counts_once(make_run: MakeRun) -> None:
    folder = make_run()
    file = folder / "samples" / "world_long.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[0]]))
    run = load_run(folder)
    assert len(run.samples["world_long"]) == 9
    assert "twice" in run.notes[0]


@pytest.mark.parametrize("order", ["eg", "ge", "egh", "ghe", "ef", "gef"])
def test_of_a_repeated_sample_the_row_counts_that_the_store_takes(
    make_run: MakeRun, order: str
) -> None:
    """A retry that was not finished: e and f are errors, g and h answers."""
    folder = make_run()
    file = folder / "samples" / "world_long.jsonl"
    first, *rest = (json.loads(line) for line in file.read_text().splitlines())
    rows = [
        first
        | {"prediction": mark, "error": {"type": "E", "message": mark} if mark in "ef" else None}
        for mark in order
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in [rows[0], *rest, *rows[1:]]))
    taken = RunStore(folder, {}, []).answered("world_long")
    shown = load_run(folder).samples["world_long"]
    assert {one.id: one.prediction for one in shown} == {
        name: row["prediction"] for name, row in taken.items()
    }
    assert [one.prediction for one in shown if one.id == first["id"]] == [
        {"eg": "g", "ge": "g", "egh": "h", "ghe": "h", "ef": "f", "gef": "g"}[order]
    ]


def test_a_failed_sample_is_an_error_with_score_zero(make_run: MakeRun) -> None:
    folder = make_run()
    failed = load_run(folder).samples["world_long"][7]
    assert failed.prediction is None and failed.error == "VideoError: file is truncated"
    assert failed.official.outcome is Outcome.ERROR and failed.value == 0.0


def test_failed_samples_may_have_no_score_at_all(make_run: MakeRun) -> None:
    folder = make_run()
    file = folder / "samples" / "world_long.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[7] |= {"official": None, "plain": None}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load_run(folder).samples["world_long"][7].official.outcome is Outcome.ERROR


def test_text_that_is_not_unicode_and_line_separators_are_kept(make_run: MakeRun) -> None:
    folder = make_run()
    file = folder / "samples" / "world_long.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["prediction"] = "a\u2028b"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_bytes(text.encode().replace("\u2028".encode(), "\u2028".encode() + b"\xff"))
    assert load_run(folder).samples["world_long"][0].prediction == "a\u2028\ufffdb"


def test_unfinished_runs_have_no_results(make_run: MakeRun) -> None:
    folder = make_run()
    (folder / "results.json").unlink()
    assert load_run(folder).results == {}


def test_what_is_no_run_is_refused(tmp_path: Path, make_run: MakeRun) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        load_run(tmp_path)
    with pytest.raises(RunError, match="no run folders"):
        load_runs([])
    folder = make_run()
    file = folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema": 9}))
    with pytest.raises(RunError, match="schema 9"):
        load_run(folder)
    file.write_text("[1]")
    with pytest.raises(RunError, match="JSON object"):
        load_run(folder)


def test_a_sample_without_its_fields_is_an_error_that_names_it(make_run: MakeRun) -> None:
    folder = make_run()
    file = folder / "samples" / "world_long.jsonl"
    file.write_text('{"id": "x"}\n' + file.read_text())
    with pytest.raises(RunError, match="'x' cannot be read"):
        load_run(folder)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"length_s": math.nan}, "length_s is nan"),
        ({"length_s": math.inf}, "length_s is inf"),
        ({"evidence": [[0.0, math.inf]]}, "evidence is inf"),
        ({"official": {"value": math.nan, "parsed": "A", "outcome": "answered"}}, "official.value"),
        ({"plain": {"value": -math.inf, "parsed": "A", "outcome": "answered"}}, "plain.value"),
        ({"tokens": {"prompt": math.inf}}, "infinity"),
    ],
)
def test_a_number_that_is_none_is_refused_with_file_and_sample(
    make_run: MakeRun, changed: dict[str, object], said: str
) -> None:
    folder = make_run()
    file = folder / "samples" / "world_long.jsonl"
    first, *rest = file.read_text().splitlines(keepends=True)
    file.write_text("".join([json.dumps(json.loads(first) | changed) + "\n", *rest]))
    with pytest.raises(RunError, match=f"world_long.jsonl: sample 'world_long/000000' .*{said}"):
        load_run(folder)
