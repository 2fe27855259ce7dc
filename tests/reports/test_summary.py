"""Run with: pytest tests/reports/test_summary.py -q."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from internvideo3.harness.store import RunStore, read_rows
from internvideo3.reports import export, markdown, page, wording
from internvideo3.reports.load import load_run
from internvideo3.reports.profile import collect
from internvideo3.reports.summary import Summary, readings, summarise, summarise_paths
from internvideo3.reports.terminal import footnotes, print_report

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def summary(runs: list[Path]) -> Summary:
    return summarise_paths(runs)


def test_cells_equal_what_scoring_recorded(summary: Summary, runs: list[Path]) -> None:
    for path, system in zip(runs, ("GQA base", "M²LA", "GQA control"), strict=False):
        recorded = json.loads((path / "results.json").read_text())
        for suite in summary.suites:
            cell = suite.cells[system]
            assert cell.value == pytest.approx(recorded[suite.name]["value"])
            assert cell.n == recorded[suite.name]["n"]
            assert cell.unreadable == recorded[suite.name]["unreadable"]
            assert cell.errors == 1
            assert cell.interval.low <= cell.value <= cell.interval.high
            for family, group in recorded[suite.name]["by_family"].items():
                assert suite.by_family[system, family].value == pytest.approx(group["value"])
            for band, group in recorded[suite.name]["by_length"].items():
                assert suite.by_length[system, band].value == pytest.approx(group["value"])


def test_controls_come_last_and_set_the_floor(summary: Summary) -> None:
    assert [s.name for s in summary.systems][-1] == "GQA base, blind"
    long = summary.suites[0]
    assert long.name == "world_long" and long.chance == pytest.approx(0.25)
    floor = max(0.25, long.cells["GQA base, blind"].value)
    for name in ("GQA base", "M²LA"):
        assert long.cells[name].above_floor == (long.cells[name].interval.low > floor)
    assert long.cells["GQA base, blind"].above_floor is None
    assert summary.suites[1].chance is None


def test_the_shuffled_control_is_no_floor(runs: list[Path], tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(runs[3], mixed)
    meta = json.loads((mixed / "run.json").read_text())
    meta["config"]["control"] = "shuffled"
    (mixed / "run.json").write_text(json.dumps(meta))
    got = summarise_paths([*runs[:2], mixed])
    (control,) = (s for s in got.systems if s.is_control)
    for suite in got.suites:
        assert suite.cells[control.name].above_floor is None
        for name in ("GQA base", "M²LA"):
            cell = suite.cells[name]
            expected = None if suite.chance is None else cell.interval.low > suite.chance
            assert cell.above_floor == expected


def test_pairs_are_latent_against_gqa_and_never_the_control(summary: Summary) -> None:
    names = [c.name for c in summary.suites[0].comparisons]
    assert names == ["M²LA − GQA base", "M²LA − GQA control", "GQA control − GQA base"]
    first = summary.suites[0].comparisons[0].difference
    cells = summary.suites[0].cells
    assert first.interval.mean == pytest.approx(cells["M²LA"].value - cells["GQA base"].value)
    assert first.wins + first.losses + first.ties == 54


def test_the_mean_weighs_suites_alike(summary: Summary) -> None:
    mean = summary.mean("M²LA")
    assert mean is not None
    values = [s.cells["M²LA"].value for s in summary.suites]
    assert mean.mean == pytest.approx(sum(values) / 2)
    below = [s.cells["M²LA"].value - s.cells["M²LA"].interval.low for s in summary.suites]
    assert mean.mean - mean.low == pytest.approx(sum(b * b for b in below) ** 0.5 / 2)
    difference = summary.mean_difference("M²LA − GQA base")
    base = summary.mean("GQA base")
    assert difference is not None and base is not None
    assert difference.mean == pytest.approx(mean.mean - base.mean)


def test_a_system_without_a_suite_has_no_mean(make_run: MakeRun, runs: list[Path]) -> None:
    folder = make_run("m2la")
    (folder / "samples" / "world_grounding.jsonl").unlink()
    got = summarise([load_run(runs[0]), load_run(folder)])
    assert got.mean("M²LA") is None
    assert "M²LA" not in got.suites[1].cells


def test_a_run_that_was_stopped_has_no_mean_and_says_what_is_left(make_run: MakeRun) -> None:
    run = make_run()
    samples = run / "samples"
    whole = summarise_paths([run])
    (name,) = (one.name for one in whole.systems)
    assert whole.mean(name) is not None and "begun" not in " ".join(footnotes(whole))
    (run / "results.json").unlink()
    (samples / "world_grounding.jsonl").unlink()
    begun = summarise_paths([run])
    assert begun.mean(name) is None
    assert "failed; 1 not begun" in footnotes(begun)[1]
    assert any("not begun: world_grounding" in note for note in begun.notes)
    lines = (samples / "world_long.jsonl").read_text().splitlines()
    (samples / "world_long.jsonl").write_text("\n".join(lines[:4]) + "\n")
    assert "; 1 suite incomplete, 1 not begun" in footnotes(summarise_paths([run]))[1]


def test_a_mean_of_differences_is_of_whole_suites(make_run: MakeRun) -> None:
    runs = [make_run(), make_run("m2la")]
    pair = "M²LA − GQA base"
    assert summarise_paths(runs).mean_difference(pair) is not None
    # The same questions with subtitles would count once with them, so they take no mean away.
    meta = json.loads((runs[0] / "run.json").read_text())
    meta["suites"]["world_long_subtitles"] = meta["suites"]["world_long"]
    (runs[0] / "run.json").write_text(json.dumps(meta))
    assert summarise_paths(runs).mean_difference(pair) is not None
    samples = runs[1] / "samples" / "world_long.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:4]))
    assert summarise_paths(runs).mean_difference(pair) is None


def test_an_unfinished_suite_is_marked_and_its_stale_result_unused(make_run: MakeRun) -> None:
    folder = make_run(videos=4)
    file = folder / "samples" / "world_long.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:6]))
    cell = summarise([load_run(folder)]).suites[0].cells["GQA base"]
    assert not cell.complete and (cell.n, cell.expected) == (6, 12)
    assert cell.value == pytest.approx(cell.interval.mean)


def finished(make_run: MakeRun) -> tuple[Path, list[dict[str, Any]]]:
    """A run whose first suite was finished by the store, and that suite's rows."""
    folder = make_run()
    rows = read_rows(folder / "samples/world_long.jsonl")
    result = json.loads((folder / "results.json").read_text())["world_long"]
    RunStore(folder, {}, ()).finish("world_long", [row["id"] for row in rows], result)
    return folder, rows


def shown(folder: Path) -> tuple[float | None, bool]:
    """The headline of the first suite, and whether a note says that results.json is of others."""
    summary = summarise_paths([folder])
    stale = any("world_long: results.json is of other answers" in note for note in summary.notes)
    return summary.suites[0].cells["GQA base"].value, stale


def test_a_finished_suite_shows_its_recorded_result(make_run: MakeRun) -> None:
    folder, _ = finished(make_run)
    file = folder / "results.json"
    results = json.loads(file.read_text())
    results["world_long"]["value"] = 0.123  # by which one sees that it is read
    file.write_text(json.dumps(results))
    assert shown(folder) == (0.123, False)


def test_a_retry_that_has_not_ended_shows_the_answers_of_now(make_run: MakeRun) -> None:
    """As many answers as before, so that their number tells nothing."""
    folder, rows = finished(make_run)
    before, _ = shown(folder)
    (failed,) = (row for row in rows if row["error"])
    right = {"value": 1.0, "parsed": failed["answer"], "outcome": "answered"}
    retried = failed | {"prediction": failed["answer"], "error": None, "official": right}
    RunStore(folder, {}, ()).add("world_long", [retried], [])
    assert before is not None
    assert shown(folder) == (pytest.approx(before + 1 / len(rows)), True)
    # Results of earlier versions have no digest; the sample that is there twice tells.
    file = folder / "results.json"
    results = json.loads(file.read_text())
    del results["world_long"]["samples_sha256"]
    file.write_text(json.dumps(results))
    assert shown(folder) == (pytest.approx(before + 1 / len(rows)), True)


def test_a_scoring_that_has_not_ended_shows_the_scores_of_now(make_run: MakeRun) -> None:
    folder, rows = finished(make_run)
    nothing = {"value": 0.0, "parsed": None, "outcome": "unreadable"}
    RunStore(folder, {}, ()).rewrite("world_long", [row | {"official": nothing} for row in rows])
    assert shown(folder) == (0.0, True)


def test_verdicts_that_are_missing_are_counted_before_the_run_ends(tmp_path: Path) -> None:
    """The number comes from the answers where there is no result that is of them."""
    waiting = {"value": None, "parsed": None, "outcome": "judge_needed"}
    row = {"id": "q0", "video_id": "v0", "question": "?", "answer": "a", "answer_type": "text",
           "benchmark": "tomato", "doc": {"answer": "a"}, "prediction": "b", "error": None,
           "official": waiting, "plain": waiting}  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "suites": {}}))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/tomato.jsonl").write_text(json.dumps(row) + "\n")
    assert [one.judge_needed for one in readings(summarise_paths([tmp_path]))] == [1]


def test_other_averages_than_the_mean_have_no_interval(make_run: MakeRun) -> None:
    folder = make_run()
    file = folder / "results.json"
    results = json.loads(file.read_text())
    results["world_long"]["value"] = 0.123
    file.write_text(json.dumps(results))
    got = summarise([load_run(folder)])
    cell = got.suites[0].cells["GQA base"]
    assert cell.value == 0.123 and cell.interval is None
    assert "12.3 (" not in markdown.render(got, "t") and "12.3" in markdown.render(got, "t")


def test_runs_on_different_data_are_not_compared(make_run: MakeRun, runs: list[Path]) -> None:
    folder = make_run("m2la")
    file = folder / "run.json"
    file.write_text(file.read_text().replace("d" * 8, "e" * 8))
    got = summarise([load_run(runs[0]), load_run(folder)])
    assert got.suites[0].comparisons == ()
    assert any("different data" in note for note in got.notes)


def test_equal_names_are_told_apart_by_run(runs: list[Path]) -> None:
    got = summarise([load_run(runs[0]), load_run(runs[0])])
    assert len({s.name for s in got.systems}) == 2


def test_profile_curves(summary: Summary) -> None:
    profile = collect(summary)
    assert profile.lengths == (256, 1024, 4096)
    assert profile.systems == ("GQA base", "M²LA", "GQA control")
    assert profile.cache["M²LA"][1024] * 2 == profile.cache["GQA base"][1024]
    assert profile.conditions == ("cpu, float32, 1 thread, median of 5",)


def measured(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the profiler's rows."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_profile_curves_are_of_one_sequence_in_the_engine(make_run: MakeRun) -> None:
    """What a baseline, a batch or another cache gives is no rate of the model's own engine."""
    folder = make_run("m2la")
    plain = {"attention": "m2la", "device": "cpu", "dtype": "float32", "threads": 1, "repeats": 5}
    plain |= {"runner": "engine", "batch": 1, "cache": "native", "fill": "prefill", "chunk": 0}
    plain |= {"context_tokens": 64, "kind": "decode", "status": "ok", "tokens_per_s": 500.0}
    other: list[dict[str, Any]] = [{"runner": "sdpa"}, {"batch": 4}, {"cache": "fp8"}]
    rows = [plain, *(plain | one | {"tokens_per_s": 9.0} for one in other)]
    file = folder / "measurements.jsonl"
    measured(file, rows)
    profile = collect(summarise([load_run(folder)]))
    assert profile.decode == {"M²LA": {64: 500.0}}
    assert profile.conditions == (
        "cpu, float32, 1 thread, one sequence in the model's own engine, median of 5",
    )
    # Of two number formats the one that was measured last, and not points of both in one curve.
    last = plain | {"dtype": "bfloat16", "context_tokens": 128, "tokens_per_s": 700.0}
    measured(file, [*rows, last])
    profile = collect(summarise([load_run(folder)]))
    assert profile.decode == {"M²LA": {128: 700.0}}
    assert all("bfloat16" in one for one in profile.conditions)


@pytest.mark.parametrize(
    ("device", "names", "told"),
    [("two slow cores", ("base", "m2la"), True), ("NVIDIA H200", ("base", "m2la"), False),
     ("two slow cores", ("base", "control"), False)],
)  # fmt: skip
def test_rates_of_a_cpu_are_no_measure_of_latent_attention(
    make_run: MakeRun, device: str, names: tuple[str, ...], told: bool
) -> None:
    """The page says so where both kinds were timed there."""
    folders = [make_run(name) for name in names]
    for folder in folders:
        file = folder / "measurements.jsonl"
        rows = [json.loads(line) | {"device": device} for line in file.read_text().splitlines()]
        measured(file, rows)
    assert collect(summarise_paths(folders)).of_a_cpu == told


@pytest.mark.parametrize("status", ["gate red", "out of memory"])
def test_profile_curves_lose_what_a_later_row_takes_back(make_run: MakeRun, status: str) -> None:
    folder = make_run("m2la")
    plain = {"attention": "m2la", "device": "cpu", "runner": "engine", "batch": 1, "status": "ok"}
    rows = [
        plain | {"context_tokens": n, "kind": kind, "tokens_per_s": 9.0, "cache_bytes": 9}
        for n in (64, 128)
        for kind in ("prefill", "decode", "cache")
    ]
    red = plain | {"context_tokens": 128, "kind": "none", "status": status}
    measured(folder / "measurements.jsonl", [*rows, red])
    profile = collect(summarise([load_run(folder)]))
    assert profile.lengths == (64,) and profile.systems == ("M²LA",)
    measured(folder / "measurements.jsonl", [*rows, red, *rows])
    assert collect(summarise([load_run(folder)])).lengths == (64, 128)


def test_terminal_shows_the_numbers_and_the_label(runs: list[Path], summary: Summary) -> None:
    out = io.StringIO()
    print_report(runs, console=Console(file=out, width=140))
    text = out.getvalue()
    for suite in summary.suites:
        assert f"{100 * suite.cells['M²LA'].value:.1f}" in text
    assert "Leaderboard (scale)" in text and "chance" in text and "1 failed" not in text
    assert "2 failed" in text and "M²LA − GQA base" in text


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_number_is_cropped_in_a_narrow_terminal(
    runs: list[Path], summary: Summary, width: int
) -> None:
    out = io.StringIO()
    print_report(runs, console=Console(file=out, width=width))
    text = out.getvalue()
    for suite in summary.suites:
        assert f"{100 * suite.cells['M²LA'].value:.1f}" in text
        assert wording.span(suite.cells["M²LA"].interval) in text


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("count", [3, 6])
def test_many_systems_of_long_names_keep_their_numbers_in_a_narrow_terminal(
    make_run: MakeRun, tmp_path: Path, width: int, count: int
) -> None:
    names = [
        f"internvideo3-8b-m2la_checkpoint_{number}_of_a_longer_training" for number in range(9)
    ]
    copies = []
    for name in names[:count]:
        copies.append(Path(shutil.copytree(make_run(), tmp_path / name)))
        file = copies[-1] / "run.json"
        run = json.loads(file.read_text())
        run["model"] |= {"name": name, "attention": ""}
        file.write_text(json.dumps(run))
    summary = summarise_paths(copies)
    out = io.StringIO()
    print_report(copies, console=Console(file=out, width=width))
    text = out.getvalue()
    assert "…" not in text.replace(" … ", "") and max(map(len, text.splitlines())) <= width
    for suite in summary.suites:
        for cell in suite.cells.values():
            assert text.count(wording.span(cell.interval)) >= count
        for pair in suite.comparisons:
            assert wording.signed_span(pair.difference.interval) in text


def test_markdown_is_labelled_and_inert(summary: Summary) -> None:
    text = markdown.render(summary, "<b>|x|</b>")
    assert text.startswith("# \\<b\\>\\|x\\|")
    assert "**scale**" in text and "GQA base *scale*" in text
    assert "comparable with the paper: no, scale model on the scale world" in text


def test_csv_has_every_cell_unrounded(summary: Summary) -> None:
    rows = list(csv.DictReader(io.StringIO(export.render(summary))))
    whole = [r for r in rows if r["group"] == "suite"]
    assert len(whole) == 8 and {r["label"] for r in rows} == {"scale"}
    by_key = {(r["system"], r["suite"]): r for r in whole}
    cell = summary.suites[0].cells["M²LA"]
    assert float(by_key["M²LA", "world_long"]["value"]) == cell.value
    assert {r["group"] for r in rows} == {"suite", "family", "length_s", "further"}


def test_names_do_not_become_formulas(make_run: MakeRun) -> None:
    folder = make_run()
    file = folder / "run.json"
    file.write_text(file.read_text().replace('"name": "scale:base"', '"name": "=1+1"'))
    rows = list(csv.DictReader(io.StringIO(export.render(summarise([load_run(folder)])))))
    assert rows[0]["system"] == "'=1+1"


def test_the_first_sentence_says_who_answered_fewer(make_run: Callable[..., Path]) -> None:
    """One system that failed on most of its questions must not pass for one that answered all."""
    paths = [make_run("base"), make_run("m2la")]
    assert "Not all of them" not in page._lede(summarise_paths(paths))
    file = next((paths[1] / "samples").glob("*.jsonl"))
    lines = file.read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["error"]] + lines[:1]
    file.write_text("\n".join(kept) + "\n")
    lede = page._lede(summarise_paths(paths))
    every, fewer = map(int, re.findall(r" (\d+)[,;]", lede.partition("Not all of them:")[2]))
    assert every - fewer == len(lines) - len(kept) > 0
