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
        assert row["filtered_resps"][0] and row["token_counts"][0]["input_tokens"] > 20
        assert row["token_counts"][0]["output_tokens"] <= 8
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert "accuracy,none" in json.loads(results.read_text())["results"]["iv3_world_short"]


def test_our_class_and_stocks_own_see_and_say_the_same(
    manyq: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from internvideo3.harness.compare_stock import CompareError, CompareOptions, compare, lines

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
        assert all(seconds > 0 for name, seconds in phases.items() if name != "decode_s")
    assert (
        result["median"]["stock"]["decode_s"] > result["median"]["stock, frames kept"]["decode_s"]
    )
    assert result["ratio_total"] > 2 and result["ratio_without_decoding"] > 1
    assert json.loads((tmp_path / "figures.json").read_text()) == result
    assert "ratio in total" in lines(result)[-1]
    with pytest.raises(CompareError, match="different answers, the gate asks for 99"):
        compare(CompareOptions(**(vars(options) | {"answers": 99, "out": None})))
