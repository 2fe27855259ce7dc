"""The CPU profile: its gate, its rows; and what `inspect` says of a checkpoint.

pytest tests/harness/test_profile.py
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internvideo3.harness import profile_cpu
from internvideo3.harness.inspection import describe
from internvideo3.harness.profile_cpu import GateError, ProfileOptions, is_complete, profile
from internvideo3.harness.store import read_rows
from internvideo3.model.checkpoint import load_model
from internvideo3.model.session import Session


@pytest.fixture
def options(checkpoint: Path, tmp_path: Path) -> ProfileOptions:
    run = tmp_path / "base"
    run.mkdir()
    return ProfileOptions(
        models=(str(checkpoint), "scale:m2la"),
        out=tmp_path / "out",
        contexts=(64, 256),
        repeats=2,
        into={str(checkpoint): run},
    )


def test_rows_of_both_models_have_rates_bytes_and_the_gate(options: ProfileOptions) -> None:
    told: list[str] = []
    gqa_run, m2la_run = profile(options, told.append)
    assert gqa_run == options.into[options.models[0]]
    assert len(told) == 2 + 4
    cache: dict[str, dict[int, int]] = {}
    for run, attention in ((gqa_run, "gqa"), (m2la_run, "m2la")):
        rows = read_rows(run / "measurements.jsonl")
        assert [(row["kind"], row["context_tokens"]) for row in rows] == [
            (kind, context) for context in (64, 256) for kind in ("prefill", "decode", "cache")
        ]
        for row in rows:
            assert row["attention"] == attention and row["threads"] == 1
            assert row["gate_max_logit_difference"] <= 1e-3
            timed = row["kind"] != "cache"
            assert (row["tokens_per_s"] is not None) == timed
            if timed:
                assert row["median_s"] > 0 <= row["iqr_s"]
            else:
                cache.setdefault(attention, {})[row["context_tokens"]] = row["cache_bytes"]
    assert cache["gqa"][256] > cache["gqa"][64]
    described = json.loads((m2la_run / "run.json").read_text())
    assert described["mode"] == "profile" and described["model"]["label"] == "scale"


def test_a_complete_profile_is_not_repeated(options: ProfileOptions) -> None:
    only = replace(options, models=options.models[:1])
    assert not is_complete(only)
    profile(only)
    assert is_complete(only)
    assert not is_complete(replace(only, contexts=(64, 256, 512)))


def test_a_session_with_wrong_positions_turns_the_gate_red(
    options: ProfileOptions, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Session._place

    def shifted(self: Session, piece: Any) -> Any:
        tokens, following = place(self, piece)
        return tokens, following + 1

    assert profile_cpu.gate_difference(*load_model(checkpoint, "cpu", "float32")) <= 1e-4
    monkeypatch.setattr(Session, "_place", shifted)
    with pytest.raises(GateError, match="differ by .* in logits"):
        profile(replace(options, models=options.models[:1]))
    assert not (options.into[options.models[0]] / "measurements.jsonl").exists()


def test_inspect_says_what_a_checkpoint_is(checkpoint: Path) -> None:
    gqa, m2la = "\n".join(describe(str(checkpoint))), "\n".join(describe("scale:m2la"))
    assert "GQA" in gqa and "100% of GQA" in gqa
    assert "M²LA: latent rank" in m2la and "50% of GQA" in m2la and "runs in torch" in m2la
