"""Figures and table of the profiler, from rows like its own.

pytest tests/harness/test_efficiency.py
"""

import json
from pathlib import Path
from typing import Any

import pytest

from internvideo3.reports import efficiency
from internvideo3.reports.efficiency import (
    EfficiencyError,
    cache_figure,
    decode_figure,
    draw,
    latency_figure,
    ratio_figure,
    read,
)


def written(run: Path, *rows: dict[str, Any]) -> Path:
    """A run directory with rows that are like the profiler's."""
    common = {
        "model": "scale:m2la", "attention": "m2la", "device": "cpu", "dtype": "bfloat16",
        "runner": "engine", "batch": 1, "cache": "native", "chunk": 0, "new_tokens": 8,
        "threads": 1, "fill": "random", "status": "ok", "kind": "decode", "tokens_per_s": 9.0,
        "median_s": 1.0, "roofline_share": 0.5, "context_tokens": 128,
    }  # fmt: skip
    run.mkdir(parents=True, exist_ok=True)
    filled = [common | row for row in rows]
    named = [row if "video" in row else {"point": "here"} | row for row in filled]
    lines = [json.dumps(row) + "\n" for row in named]
    (run / "measurements.jsonl").write_text("".join(lines))
    return run


@pytest.mark.parametrize("context", [64, 128, 1000, 32768])
def test_a_single_length_is_seen_beside_what_was_not_possible(context: int, tmp_path: Path) -> None:
    one = {"context_tokens": context}
    absent = one | {"kind": "none", "status": "not possible", "runner": "flash"}
    figure = decode_figure(read([written(tmp_path, one, absent)]))
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert low < context / 1.1 and context * 1.1 < high


def test_no_two_series_have_the_same_bars(tmp_path: Path) -> None:
    """Colours come round; those of series without bars are taken as well."""
    absent = [{"runner": "flash", "kind": "none", "status": "not possible"}]
    rows = [*absent, *({"batch": batch} for batch in range(1, 13))]
    (axes,) = latency_figure(read([written(tmp_path, *rows)])).axes
    bars = axes.get_legend_handles_labels()[0]
    looks = [(bar.patches[0].get_facecolor(), bar.patches[0].get_hatch()) for bar in bars]
    assert len(looks) == len(set(looks)) == 12


def test_a_reply_that_was_timed_whole_is_not_one_that_was_integrated(tmp_path: Path) -> None:
    whole = {"point": "m/engine/64+8 random"}
    # Seconds in older rows are of the median step; the table's rate is of the mean one.
    middle = {
        "point": "m/engine/64+8 random of 8192",
        "integrated": {"tokens": 8192, "seconds": 50.0},
        "tokens_per_s": 160.0,
        "batch": 1,
    }
    data = read([written(tmp_path, whole, middle)])
    assert [series.name.rpartition("(")[2] for series in data.series] == [
        "whole reply)",
        "integrated reply of 8192)",
    ]
    assert [series.reply_s(128) for series in data.series] == [1.0, 8192 / 160]
    (four,) = read([written(tmp_path, middle | {"batch": 4})]).series
    assert four.reply_s(128) == 4 * 8192 / 160
    assert "integrated" not in data.labels
    assert "integrated" in read([written(tmp_path, middle)]).labels


@pytest.mark.parametrize("status", ["gate red", "out of memory", "failed"])
def test_the_newest_row_of_a_point_rules(status: str, tmp_path: Path) -> None:
    """A gate that turns red, or other code that fails, takes back what was measured."""
    red = {"kind": "none", "status": status}
    (series,) = read([written(tmp_path, {}, {"kind": "prefill"}, red)]).series
    assert series.absent == {128: status}
    assert not series.decode and not series.prefill
    (series,) = read([written(tmp_path, red, {})]).series
    assert not series.absent and series.decode


def test_what_is_no_measurement_is_named(tmp_path: Path) -> None:
    run = written(tmp_path, {})
    with (run / "measurements.jsonl").open("a") as file:
        file.write('{"a": 1}\n')
    with pytest.raises(EfficiencyError, match="line 2 is no measurement .kind, model, device"):
        read([run])


@pytest.mark.parametrize("lacking", ["runner", "context_tokens", "median_s"])
def test_a_point_of_another_program_is_named(lacking: str, tmp_path: Path) -> None:
    run = written(tmp_path, {}, {lacking: None})
    with pytest.raises(EfficiencyError, match=rf"line 2 is no measurement .{lacking} missing"):
        read([run])


def test_rows_end_at_line_feeds_only(tmp_path: Path) -> None:
    """A file's name may hold what Python takes for a line's end; a kill may leave half a sign."""
    name = "a\u2028b\x85.mp4"
    row = {"video": name, "kind": "video_decoding", "frames": 20}
    file = written(tmp_path, {}, row) / "measurements.jsonl"
    rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in rows]
    file.write_bytes("".join([*lines, '{"kind": "é']).encode()[:-1])
    (stage,) = read([tmp_path]).stages
    assert stage["video"] == name


def test_a_table_of_two_versions_of_the_code_says_so(tmp_path: Path) -> None:
    old, new = ({"code": code, "versions": {"torch": "2"}, "tokens_per_s": 4.0} for code in "ab")
    table = draw([written(tmp_path, old, new | {"tokens_per_s": 5.0})], tmp_path)[0].read_text()
    assert "| 5.0 |" in table and "| 4.0 |" not in table and "versions" not in table
    other = new | {"context_tokens": 64}
    table = draw([written(tmp_path, old, other)], tmp_path)[0].read_text()
    assert "By 2 versions of the code or its packages" in table


def crosses(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Places of what could not be run, by label."""
    lines = (line for line in axes.lines if line.get_marker() == "x")
    return {line.get_label(): [tuple(xy) for xy in line.get_xydata()] for line in lines}


def test_crosses_of_several_series_are_seen_beside_each_other(tmp_path: Path) -> None:
    """And below what was measured; what is impossible on any device is in the table alone."""
    none = {"kind": "none", "status": "out of memory", "context_tokens": 256}
    rows = [{"batch": batch} | more for batch in (1, 2, 3) for more in ({}, none)]
    rows += [row | {"kind": "cache", "cache_bytes": 9.0} for row in rows[::2]]
    rows.append(none | {"status": "not possible", "runner": "sdpa"})
    data = read([written(tmp_path, *rows)])
    for figure in (decode_figure(data), latency_figure(data), cache_figure(data)):
        (axes,) = figure.axes
        found = crosses(axes)
        assert len(found) == 3 and all(": out of memory" in label for label in found)
        assert len({place for places in found.values() for place in places}) == 3
    (axes,) = decode_figure(data).axes
    highest = max(y for places in crosses(axes).values() for _, y in places)
    assert axes.transAxes.inverted().transform(axes.transData.transform((128, 9.0)))[1] > highest


def test_replies_that_were_possible_nowhere_have_their_figure(tmp_path: Path) -> None:
    """What was timed has the name without a suffix, be it shorter."""
    rows = [{"new_tokens": 64}, {"new_tokens": 16384, "kind": "none", "status": "out of memory"}]
    found = {file.name for file in draw([written(tmp_path / "run", *rows)], tmp_path)}
    assert {"figure6b-latency.svg", "figure6b-latency-16384.svg"} <= found
    crossed = (tmp_path / "figure6b-latency-16384.svg").read_text()
    assert "out of memory" in crossed and "of 16K tokens" in crossed


def test_ratios_are_of_models_of_one_size(tmp_path: Path) -> None:
    """A folder may hold what several commands measured; the nearest in size is the partner."""
    gqa = {"attention": "gqa", "tokens_per_s": 4000.0, "model": "small-gqa", "parameters": 10**6}
    large = {"attention": "gqa", "tokens_per_s": 10.0, "model": "gqa", "parameters": 8 * 10**9}
    m2la = {"tokens_per_s": 20.0, "model": "m2la", "parameters": 81 * 10**8}
    assert ratio_figure(read([written(tmp_path, gqa, m2la)])) is None
    figure = ratio_figure(read([written(tmp_path, gqa, large, m2la)]))
    assert figure is not None
    (line,) = [one for one in figure.axes[0].lines if one.get_label() == "m2la"]
    assert list(line.get_ydata()) == [2.0]
    small = {"tokens_per_s": 2000.0, "model": "small-m2la", "parameters": 10**6}
    figure = ratio_figure(read([written(tmp_path, gqa, large, m2la, small)]))
    assert figure is not None
    labels = {str(one.get_label()) for one in figure.axes[0].lines}
    assert {"m2la over gqa", "small-m2la over small-gqa"} <= labels


def test_each_length_of_reply_has_a_figure_of_its_own(tmp_path: Path) -> None:
    """The paper's replies stand beside those of their length, whatever else the folder holds."""
    long = {"point": "m/32768+128 random of 16384", "new_tokens": 128, "parameters": 8 * 10**9}
    long |= {"context_tokens": 32768, "integrate": 16384}
    short = long | {"point": "m/32768+64", "new_tokens": 64, "integrate": 0}
    timed = short | {"fill": "prefill"}
    run = written(tmp_path, long, short, timed, timed | {"kind": "prefill"})
    names = {file.name for file in draw([run], tmp_path) if "latency" in file.name}
    assert names == {
        f"figure6b-latency{suffix}.{ending}" for suffix in ("", "-64") for ending in ("svg", "png")
    }
    first, second = (
        (tmp_path / f"figure6b-latency{suffix}.svg").read_text() for suffix in ("", "-64")
    )
    assert "Reply of 16K tokens, seconds; prefill not timed" in first
    assert "computed: 16K over its tok/s" in first
    assert "Prefill (pale) and reply of 64 tokens" in second and "paper" not in second
    assert second.count("; prefill not timed") == 1 and "fill random" in second
    # A series has the same colour in all figures.
    assert "#cf5a1f" in second and "#cf5a1f" not in first
    draw([written(tmp_path, long)], tmp_path)
    assert not (tmp_path / "figure6b-latency-64.svg").exists()


def test_each_length_that_is_drawn_is_on_the_axis(tmp_path: Path) -> None:
    """Also of the paper's points beside fewer of ours, and of no others."""
    one = {"context_tokens": 32768, "parameters": 8 * 10**9, "kind": "decode"}
    both = [one | {"attention": name, "model": name} for name in ("gqa", "m2la")]
    data = read([written(tmp_path, *both, one | {"kind": "cache", "cache_bytes": 9.0})])
    ratio = ratio_figure(data)
    assert ratio is not None
    ticks = [
        [round(x / 1024) for x in figure.axes[0].get_xticks()]
        for figure in (decode_figure(data), ratio, cache_figure(data))
    ]
    assert ticks == [[32, 512], [32, 128, 256, 384], [32]]


def test_no_name_is_missing_from_a_legend_or_wider_than_its_figure(tmp_path: Path) -> None:
    rows = [{"model": name} for name in ("_ck", "checkpoint/" * 20, "b" * 60, "c" * 60)]
    for draw_one in (decode_figure, latency_figure):
        figure = draw_one(read([written(tmp_path, *rows)]))
        figure.draw_without_rendering()
        (axes,) = figure.axes
        legend = axes.get_legend()
        assert legend is not None
        assert "_ck" in legend.get_texts()[0].get_text() and len(legend.get_texts()) == 4
        assert legend.get_window_extent().width < figure.bbox.width


def test_names_and_lengths_are_told_as_they_are(tmp_path: Path) -> None:
    rows = [{"context_tokens": n, "model": "mm/$x^2_$|\n"} for n in (1000, 1024, 1400, 1536)]
    rows += [row | {"attention": "gqa", "model": "gqa"} for row in rows]
    for row in rows:
        row["moved_bytes_per_step"] = 1.0
    draw([written(tmp_path / "run", *rows)], tmp_path)
    table = (tmp_path / "efficiency.md").read_text()
    assert [line.split(" | ")[:2] for line in table.splitlines()[4:8]] == [
        ["| mm/$x^2_$/", told] for told in ("1000", "1K", "1400", "1536")
    ]
    assert (tmp_path / "m2la-over-gqa.png").is_file()
    draw([written(tmp_path / "run", rows[0])], tmp_path)
    assert not (tmp_path / "m2la-over-gqa.png").exists()


def test_a_full_disk_leaves_the_old_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = written(tmp_path / "run", {})
    draw([run], tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.glob("*.*")}

    def full(file: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EfficiencyError, match=r"efficiency.md: No space left.*are as they were"):
        draw([run], tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.glob("*.*")} == before


def test_the_last_row_of_a_stage_counts(tmp_path: Path) -> None:
    video = {"video": "a.mp4", "video_bytes": 9, "frames": 20}
    read_at = [video | {"kind": "video_decoding", "median_s": s} for s in (3.0, 1.5)]
    failed = video | {"kind": "none", "status": "failed", "reason": "too narrow."}
    written(tmp_path, {}, read_at[0], failed, read_at[1], failed)
    told = (draw([tmp_path], tmp_path)[0]).read_text().splitlines()
    assert told[-3:] == [
        "scale:m2la (cpu, bfloat16): 20 frames of a.mp4 are read in 1.500 s.",
        "",
        "scale:m2la (cpu, bfloat16): a.mp4: failed: too narrow.",
    ]
    encoded = video | {"kind": "vision_encoding", "tokens_per_s": 7.0}
    written(tmp_path, {}, *read_at, failed, encoded)
    told = (draw([tmp_path], tmp_path)[0]).read_text().splitlines()
    assert "7 vision tokens/s" in told[-1] and not any("failed" in line for line in told)


@pytest.mark.parametrize("folder", ["figure6", "prefill"])
def test_recorded_tables_are_what_their_rows_give(folder: str, tmp_path: Path) -> None:
    recorded = Path(efficiency.__file__).parent / "results/efficiency/h200" / folder
    runs = sorted(file.parent for file in recorded.glob("*/measurements.jsonl"))
    table = draw(runs, tmp_path)[0]
    assert table.read_text() == (recorded / "efficiency.md").read_text()


def test_a_table_has_no_rows_of_lengths_that_only_others_have() -> None:
    """Two prefills beside seven depths: rows of dashes would look like failures."""
    recorded = Path(__file__).parents[2] / "reports/results/efficiency/h200"
    runs = [
        run for folder in ("figure6", "prefill") for run in sorted(recorded.glob(f"{folder}/*/"))
    ]
    table = efficiency.markdown(read(runs))
    assert sum("fill prefill" in line for line in table) == 2 * 2
    assert sum("fill random" in line for line in table) == 2 * 7


@pytest.mark.parametrize("rates", [(101.0, 190.0), (103.0,), (9.0, 9000.0), (99.0, 101.0)])
def test_rates_can_be_read_off_also_where_they_are_close(
    rates: tuple[float, ...], tmp_path: Path
) -> None:
    rows = [{"context_tokens": 128 << n, "tokens_per_s": rate} for n, rate in enumerate(rates)]
    (axes,) = decode_figure(read([written(tmp_path, *rows)])).axes
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(shown) >= 2 and low < min(rates) and max(rates) < high
