"""Figures and table of the profiler, from rows like its own.

pytest tests/harness/test_efficiency.py
"""

import json
from pathlib import Path
from typing import Any

import pytest

from internvideo3.reports.efficiency import (
    EfficiencyError,
    decode_figure,
    draw,
    latency_figure,
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
    middle = {
        "point": "m/engine/64+8 random of 8192",
        "integrated": {"tokens": 8192, "seconds": 50.0},
    }
    data = read([written(tmp_path, whole, middle)])
    assert [series.name.rpartition("(")[2] for series in data.series] == [
        "whole reply)",
        "integrated reply of 8192)",
    ]
    assert [series.reply_s(128) for series in data.series] == [1.0, 50.0]
    assert "integrated" not in data.labels
    assert "integrated" in read([written(tmp_path, middle)]).labels


def test_a_gate_that_turns_red_takes_back_what_was_measured(tmp_path: Path) -> None:
    red = {"kind": "none", "status": "gate red"}
    (series,) = read([written(tmp_path, {}, {"kind": "prefill"}, red)]).series
    assert series.absent == {128: "gate red"}
    assert not series.decode and not series.prefill
    (series,) = read([written(tmp_path, red, {})]).series
    assert not series.absent and series.decode


def test_what_is_no_measurement_is_named(tmp_path: Path) -> None:
    run = written(tmp_path, {})
    with (run / "measurements.jsonl").open("a") as file:
        file.write('{"a": 1}\n')
    with pytest.raises(EfficiencyError, match="line 2 is no measurement .kind, model, device"):
        read([run])


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
