"""What a profile does with what it cannot measure: shapes, memory, packages; what is tried again.

pytest tests/harness/test_profile_amiss.py
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from internvideo3.harness.profile import command, host, plan
from internvideo3.harness.profile.amiss import Amiss
from internvideo3.harness.profile.command import (
    ProfileOptions,
    UnfinishedError,
    _Group,
    is_complete,
    profile,
)
from internvideo3.harness.profile.host import CardMemory
from internvideo3.harness.profile.plan import device_bytes, gate_batch, need_of, size_told
from internvideo3.harness.profile.subjects import Subject, config_of
from internvideo3.harness.profile.workload import Workload, WorkloadError
from internvideo3.harness.store import read_rows
from internvideo3.model.checkpoint import CheckpointError
from internvideo3.reports.efficiency import read

GQA, M2LA = "random:tiny-gqa", "random:tiny-m2la"


@pytest.fixture
def tiny(tmp_path: Path) -> ProfileOptions:
    workload = Workload(models=(GQA,), contexts=(48,), new_tokens=3, chunks=(32,), repeats=1)
    return ProfileOptions(workload=workload, out=tmp_path / "out")


def measured(options: ProfileOptions, model: int = 0) -> list[dict[str, Any]]:
    return read_rows(options.runs()[model] / "measurements.jsonl")


# --- shapes -----------------------------------------------------------------------------------


def broken(checkpoint: Path, folder: Path, **changes: Any) -> str:
    """A checkpoint's configuration alone, with other values in its text model."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"] |= changes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": -5}, "hidden_size is -5; it must be a whole number from 1 to"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; it must divide num_attention_h"),
        ({"hidden_size": "abc"}, 'hidden_size is "abc"; it must be a whole number'),
        ({"head_dim": None}, "head_dim is null; it must be a whole number"),
        ({"head_dim": True}, "head_dim is true; it must be a whole number"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000; .* from 1 to 1000"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5; it must be a whole number"),
    ],
)
def test_a_shape_of_which_there_is_no_model_is_named(
    checkpoint: Path, tiny: ProfileOptions, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    name = broken(checkpoint, tmp_path / "broken", **changes)
    workload = replace(tiny.workload, models=(GQA, name))
    with pytest.raises(CheckpointError, match=said):
        plan.plan(workload, device_bytes("h200"))
    with pytest.raises(CheckpointError, match=said):
        profile(replace(tiny, workload=workload))
    assert not tiny.out.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "must hold an object, not \\[\\]"),
        ('{"model_type": "qwen3_vl"}', "text_config is null; it must be an object"),
        ('{"model_type": "qwen3_vl", "text_config": 5}', "text_config is 5; it must be an object"),
        (
            '{"model_type": "internvideo3", "text_config": {"num_hidden_layers": 2, '
            '"latent_rank": [4]}}',
            "latent_rank has 1 numbers; there are 2 layers",
        ),
        (
            '{"model_type": "internvideo3", "text_config": {"rope_slots": -1}}',
            "rope_slots is -1; it must be a whole number from 0",
        ),
        (
            '{"model_type": "qwen3_vl", "text_config": {}, "vision_config": {"depth": 0}}',
            "vision_config.depth is 0",
        ),
    ],
)
def test_a_configuration_of_another_form_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        config_of(str(tmp_path))


def test_a_shape_that_no_rule_names_is_refused_before_anything_is_written(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impossible(_: str) -> int:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("internvideo3.harness.profile.options.parameters_of", impossible)
    with pytest.raises(WorkloadError, match="no model can be made.*cannot be multiplied"):
        profile(tiny)
    assert not tiny.out.exists()


def test_shapes_that_are_there_are_taken(checkpoint: Path) -> None:
    for name in (str(checkpoint), "scale:base", "scale:m2la"):
        assert config_of(name).text_config.num_hidden_layers > 0


def test_a_model_that_cannot_be_made_does_not_stop_the_others(
    checkpoint: Path, tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is wrong with its configuration."""

    def wrong(name: str, dtype: str) -> int:
        if name == str(checkpoint):
            raise RuntimeError("Trying to create tensor with negative dimension")
        return 0

    monkeypatch.setattr(command, "_weights", wrong)
    workload = replace(tiny.workload, models=(str(checkpoint), GQA))
    options = replace(tiny, workload=workload)
    with pytest.raises(UnfinishedError, match="not loaded, .* negative dimension"):
        profile(options)
    assert {row["status"] for row in measured(options, 0)} == {"failed"}
    assert {row["status"] for row in measured(options, 1)} == {"ok"}


# --- memory -----------------------------------------------------------------------------------


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")


@pytest.mark.parametrize(
    ("memory", "again"),
    [
        (None, True),
        (CardMemory(100 * 10**9, 99 * 10**9), False),
        (CardMemory(100 * 10**9, 90 * 10**9), True),
    ],
)
def test_memory_that_others_may_have_had_is_asked_for_again(
    tiny: ProfileOptions, memory: Any, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "card_memory", lambda _: memory)
    monkeypatch.setattr(command, "run_once", out_of_memory)
    profile(tiny)
    (row,) = measured(tiny)
    assert row["status"] == "out of memory" and row["retry"] == again
    assert row.get("device_unclaimed_bytes") == (memory and memory.unclaimed)
    assert is_complete(tiny) != again


def test_a_card_that_answers_no_more_is_rows(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kernel's fault every call of the driver fails."""

    def gone(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(host, "card_memory", gone)
    monkeypatch.setattr(command, "run_once", gone)
    with pytest.raises(UnfinishedError, match="1 points failed.*illegal memory access"):
        profile(tiny)
    assert measured(tiny)[0]["status"] == "failed"


def test_a_run_that_warms_up_is_the_one_that_is_looked_at(tiny: ProfileOptions) -> None:
    profile(replace(tiny, workload=replace(tiny.workload, warmups=1, repeats=2)))
    rows = measured(tiny)
    assert rows and all(0 <= row["depth_error"] < 1e-4 for row in rows)


def group(options: ProfileOptions) -> _Group:
    return _Group(options, torch.device("cuda"), "bfloat16", None, print, Amiss(), None, None)


def test_a_refusal_says_that_others_hold_memory(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    (point,) = Workload(
        models=("random:8b-m2la",), contexts=(524288,), dtypes=("bfloat16",), fill="random"
    ).points()
    config, mine = config_of("random:8b-m2la"), group(tiny)
    total = 85 * 10**9

    def refused(total: int, unclaimed: int) -> Any:
        monkeypatch.setattr(host, "card_memory", lambda _: CardMemory(total, unclaimed))
        return mine._refusal(point, config, 19 * 10**9)

    assert refused(total, total - 10**9) is None
    by_others = refused(total, 45 * 10**9)
    assert by_others["retry"] and "other programs hold 40.0 GB of the" in by_others["reason"]
    by_itself = refused(48 * 10**9, 20 * 10**9)
    assert not by_itself["retry"] and "other programs" not in by_itself["reason"]
    # Others hold some, and it fits beside them.
    assert refused(2 * total, total + 10**9) is None


def test_a_batch_that_cannot_fit_is_refused_before_anything_is_loaded(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    right = command.load

    def load(name: str, *rest: Any) -> Subject:
        loaded.append(name)
        return right(name, *rest)

    monkeypatch.setattr(command, "load", load)
    workload = replace(tiny.workload, batches=(2**31,))
    profile(replace(tiny, workload=workload))
    (row,) = measured(tiny)
    assert row["status"] == "does not fit" and not loaded
    forms: list[Any] = []
    green = command.gate
    monkeypatch.setattr(command, "gate", lambda subject, form: forms.append(form) or green(
        subject, form))  # fmt: skip
    profile(replace(tiny, workload=replace(workload, batches=(1, 2**31))))
    assert loaded == [GQA] and {form.batch for form in forms} == {1}


def test_a_gate_takes_no_more_memory_than_its_point() -> None:
    config = config_of("random:8b-gqa")

    def batch(context: int, batch: int) -> int:
        (point,) = Workload(
            models=("random:8b-gqa",), contexts=(context,), batches=(batch,), fill="random",
            dtypes=("bfloat16",), new_tokens=8,
        ).points()  # fmt: skip
        found = gate_batch(point, config)
        gated = replace(point, batch=found, context=1133, chunk=1037, new_tokens=8, fill="prefill")
        own, its = (need_of(one, config, 0) for one in (point, gated))
        assert its.cache + its.scratch <= max(own.cache + own.scratch, plan.GATE_BYTES)
        return found

    assert [batch(32768, n) for n in (1, 4, 16)] == [1, 4, 16]
    assert 2 <= batch(16, 64) < 8
    assert batch(4096, 512) == plan.MOST_GATED


def test_ceilings_that_cannot_be_measured_are_rows_and_the_rest_goes_on(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = command._ceilings

    def ceilings(device: Any, dtype: str) -> Any:
        return out_of_memory() if dtype == "float32" else right(device, dtype)

    both = replace(tiny, workload=replace(tiny.workload, dtypes=("float32", "bfloat16")))
    with monkeypatch.context() as patched, pytest.raises(UnfinishedError, match="ceilings could"):
        patched.setattr(command, "_ceilings", ceilings)
        profile(both)
    found = {row["dtype"]: row for row in measured(both)}
    assert found["float32"]["status"] == "failed" and found["bfloat16"]["status"] == "ok"
    read(both.runs())
    profile(both)
    # Where all is there, nothing is measured, ceilings neither.
    monkeypatch.setattr(command, "_ceilings", out_of_memory)
    profile(both)
    assert is_complete(both)


def test_small_sizes_have_digits() -> None:
    told = [size_told(size) for size in (12, 1500, 2_500_000, 150.11e9)]
    assert told == ["12 bytes", "1.5 kB", "2.5 MB", "150.1 GB"]


def test_devices_are_as_large_as_torch_says() -> None:
    assert device_bytes("h200") == 150109880320
    assert 84.5e9 < device_bytes("h100") < 85.2e9


def test_a_gpu_is_warm_before_a_prefill_is_timed(
    tiny: ProfileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver hands memory out before, and once: nothing is given back between repeats."""
    done: list[str] = []
    right = command.run_once

    def run_once(subject: Subject, point: Any, *, first: bool) -> Any:
        done.append(f"run, {first}")
        return right(subject, point, first=first)

    def warm_up(*_: Any) -> int:
        done.append("warm-up")
        return 64

    monkeypatch.setattr(command, "run_once", run_once)
    monkeypatch.setattr(command, "warm_up", warm_up)
    monkeypatch.setattr(command, "release", lambda: done.append("release"))
    own = _Group(tiny, torch.device("cuda"), "float32", None, print, Amiss(), None, None)
    subject = command.load(GQA, torch.device("cpu"), "float32")
    (point,) = tiny.workload.points()
    monkeypatch.setattr(host, "card_memory", lambda _: None)
    told: dict[str, Any] = {}
    for first in (True, False):
        assert isinstance(own._tried(subject, point, told, first=first), command.Run)
    assert done == ["release", "warm-up", "run, True", "run, False"]
    assert told == {"warmup_tokens": 64}
    asked = replace(tiny, workload=replace(tiny.workload, warmups=1))
    own = replace(own, options=asked)
    done.clear()
    own._tried(subject, point, told, first=True)
    assert done == ["release", "run, True"]


# --- names ------------------------------------------------------------------------------------


def test_a_models_folder_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "ckpt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")

    def folder(name: str) -> str:
        return ProfileOptions(workload=Workload(models=(name,)), out=Path("out")).runs()[0].name

    assert folder("./ckpt") == folder("../here/ckpt") == folder("ckpt") == "ckpt"
    assert folder("runs/a/ckpt") == "runs-a-ckpt" and folder("scale:base") == "scale-base"
