"""Stock lmms-eval finds and runs our model; our class does the work of stock's own class.

pytest tests/harness/test_stock.py
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from internvideo3.harness.compare_stock import (
    CompareError,
    CompareOptions,
    check_answers,
    compare,
    lines,
)
from internvideo3.harness.store import read_rows


def test_the_entry_point_is_declared_and_light() -> None:
    (entry,) = (
        one for one in metadata.entry_points(group="lmms_eval.models") if one.name == "internvideo3"
    )
    (manifest,) = entry.load()()
    assert manifest.model_id == "internvideo3"
    assert manifest.chat_class_path == "internvideo3.harness.lmms.InternVideo3"


def test_stock_lmms_eval_runs_our_model_on_our_tasks(
    world: Path, checkpoint: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "lmms_eval", "--model", "internvideo3"]
    command += ["--model_args", f"pretrained={checkpoint},device=cpu,max_new_tokens=8"]
    command += ["--include_path", str(world / "test/lmms"), "--tasks", "iv3_world_short"]
    command += ["--log_samples", "--output_path", str(tmp_path / "out"), "--limit", "6"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=tmp_path, env=env
    )
    # lmms-eval exits with 0 after an error too, so the files have to be there.
    found = list((tmp_path / "out").rglob("*_samples_iv3_world_short.jsonl"))
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    rows = read_rows(found[0])
    assert len(rows) == 6
    for row in rows:
        assert row["token_counts"][0]["input_tokens"] > 20
        assert 1 <= row["token_counts"][0]["output_tokens"] <= 8
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert "accuracy,none" in json.loads(results.read_text())["results"]["iv3_world_short"]


def test_our_class_and_stocks_own_see_and_say_the_same(
    manyq: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options = CompareOptions(
        model=str(checkpoint),
        videos=1,
        repeats=1,
        out=tmp_path / "figures.json",
        root=manyq,
        answers=1,
    )
    result = compare(options)
    assert result["questions"] == 15
    assert result["gate"]["equal_inputs"] and result["gate"]["equal_answers"]
    for phases in result["median"].values():
        assert all(seconds > 0 for name, seconds in phases.items() if name != "decode_s"), phases
    assert (
        result["median"]["stock"]["decode_s"] > result["median"]["stock, frames kept"]["decode_s"]
    )
    assert result["ratio_total"] > 2 and result["ratio_without_decoding"] > 1
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    assert "ratio in total" in lines(result)[-1]


def test_the_gate_is_red_where_answers_differ_or_say_little() -> None:
    assert check_answers(["red", "3", "red"], ["red", "3", "red"], 2) == 2
    with pytest.raises(CompareError, match="1 of 2 answers differ, first question 1: stock 'b'"):
        check_answers(["a", "b"], ["a", "c"], 1)
    with pytest.raises(CompareError, match="only 1 different answers, the gate asks for 30"):
        check_answers(["a", "a"], ["a", "a"], 30)
