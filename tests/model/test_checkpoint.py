"""Checkpoints: found, described, loaded, or refused with a reason.

Run: .venv/bin/python -m pytest tests/model/test_checkpoint.py -q
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3VLProcessor
from transformers.utils import logging

from internvideo3.model import checkpoint as checkpoint_module
from internvideo3.model.checkpoint import (
    CheckpointError,
    cache_bytes_per_token,
    inspect,
    load_model,
    resolve_checkpoint,
    weights_digest,
)
from internvideo3.model.modeling import InternVideo3ForConditionalGeneration


@pytest.fixture
def saved(half: Any, processor: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "converted"
    half.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_checkpoint_is_loaded_as_it_was_saved(saved: Path, half: Any, inputs: Any) -> None:
    model, processor = load_model(saved, "cpu", "float64")
    assert isinstance(model, InternVideo3ForConditionalGeneration) and not model.training
    assert isinstance(processor, Qwen3VLProcessor)
    case = inputs("Hello?")
    assert torch.equal(model(**case).logits, half(**case).logits)
    assert load_model(saved, "cpu")[0].dtype == torch.float32
    assert load_model(saved, "cpu", torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_gqa_checkpoint_is_loaded_too(source: Any, processor: Any, tmp_path: Path) -> None:
    source.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, "cpu", "float64")
    assert not isinstance(model, InternVideo3ForConditionalGeneration)
    assert inspect(tmp_path).attention == "gqa" and inspect(tmp_path).latent_ranks == ()


@pytest.mark.parametrize(("long", "terminal"), [(True, True), (True, False), (False, True)])
def test_a_bar_is_shown_only_where_reading_takes_long_and_somebody_looks(
    saved: Path, monkeypatch: pytest.MonkeyPatch, long: bool, terminal: bool
) -> None:
    """And the setting of transformers' is left as it was."""
    seen = []
    kind = InternVideo3ForConditionalGeneration
    read = kind.from_pretrained

    def reading(*given: Any, **named: Any) -> Any:
        seen.append(logging.is_progress_bar_enabled())
        return read(*given, **named)

    before = logging.is_progress_bar_enabled()
    monkeypatch.setattr(kind, "from_pretrained", reading)
    monkeypatch.setattr(checkpoint_module, "LONG_BYTES", 0 if long else 2**40)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    load_model(saved, "cpu")
    assert seen == [long and terminal and before] and logging.is_progress_bar_enabled() == before


def test_a_description_needs_no_weights(saved: Path, half: Any, source: Any) -> None:
    found = inspect(saved)
    assert found.attention == "m2la" and found.has_kernels
    assert found.parameters == sum(p.numel() for p in half.parameters())
    assert 2 * found.numbers_per_token == found.gqa_numbers_per_token
    for given in (saved, half.config, half.config.to_dict()):
        assert cache_bytes_per_token(given, "bfloat16") == 2 * found.numbers_per_token
    assert cache_bytes_per_token(source.config, torch.float32) == 4 * found.gqa_numbers_per_token


@pytest.mark.parametrize(
    ("of_vision", "fits"), [(None, True), (384, True), (400, True), (904, False)]
)
def test_kernels_have_to_fit_vision_rows_too(
    saved: Path, tmp_path: Path, of_vision: int | None, fits: bool
) -> None:
    folder = shutil.copytree(saved, tmp_path / "wide")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"latent_rank": 896, "rope_slots": 64, "vision_rank": of_vision}
    (folder / "config.json").write_text(json.dumps(config))
    found, layers = inspect(folder), config["text_config"]["num_hidden_layers"]
    assert found.has_kernels == fits
    assert found.vision_ranks == (of_vision or 896,) * layers
    bytes_of = cache_bytes_per_token(folder, "bfloat16", vision=True)
    assert bytes_of == 2 * layers * (128 + (of_vision or 896))


def test_describing_does_not_import_torch(saved: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from internvideo3.model import checkpoint as c; "
        f"c.inspect({str(saved)!r}); c.weights_digest(Path({str(saved)!r})); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": sys.path[0]})


def test_the_digest_follows_weights_and_configuration(saved: Path) -> None:
    first = weights_digest(saved)
    assert first == weights_digest(saved) and len(first) == 64
    config = json.loads((saved / "config.json").read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = 1.0
    (saved / "config.json").write_text(json.dumps(config))
    second = weights_digest(saved)
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert len({first, second, weights_digest(saved)}) == 3


def test_near_names_are_offered(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="Did you mean .*scale:base"):
        resolve_checkpoint("scale:bse")
    with pytest.raises(CheckpointError, match="Did you mean .*converted"):
        resolve_checkpoint(str(saved)[:-1])
    with pytest.raises(CheckpointError, match="hf download"):
        resolve_checkpoint("nobody/nothing-of-this-name")
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_checkpoint(saved / "config.json")


def rewrite_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def break_architecture(folder: Path) -> None:
    rewrite_config(folder, model_type="llama")


def break_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def break_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def break_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def break_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    config["text_config"]["rope_slot_frequencies"].append([0] * config["text_config"]["rope_slots"])
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))


BROKEN = {
    break_architecture: "holds a 'llama' model",
    break_json: "is not JSON",
    break_pickled: "pickled weights only",
    break_missing: "no \\*.safetensors",
    break_cut: "cannot be loaded",
    break_shape: "does not fit its config.json",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda f: f.__name__)
def test_broken_checkpoints_are_refused(saved: Path, damage: Any) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=BROKEN[damage]):
        load_model(saved, "cpu")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ([], "holds a None model"),
        ({"model_type": "qwen3_vl"}, "num_hidden_layers, num_attention_heads, hidden_size"),
        ({"model_type": "qwen3_vl", "text_config": 3}, "says nothing of the text model"),
    ],
)
def test_what_is_no_configuration_is_told(saved: Path, config: Any, said: str) -> None:
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        inspect(saved)


def test_a_list_of_other_layers_is_told_and_defaults_are_known(
    saved: Path, source: Any, processor: Any, tmp_path: Path
) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["text_config"]["latent_rank"] = [8, 8, 8]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="a list in config.json is of 3 layers"):
        inspect(saved)
    source.save_pretrained(tmp_path / "gqa")
    file = tmp_path / "gqa/config.json"
    config = json.loads(file.read_text())
    del config["text_config"]["head_dim"], config["text_config"]["num_key_value_heads"]
    file.write_text(json.dumps(config))
    found = inspect(tmp_path / "gqa")
    assert (found.head_dim, found.kv_heads) == (128, 32)


def test_unknown_types_are_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="float8"):
        load_model(saved, "cpu", "float8")
    with pytest.raises(CheckpointError, match="int8"):
        cache_bytes_per_token(saved, "int8")
