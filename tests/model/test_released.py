"""The released layout: written, read, and equal to a forward pass written down here on its own.

Run: .venv/bin/python -m pytest tests/model/test_released.py -q
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from internvideo3.model.checkpoint import CheckpointError, inspect, load_model
from internvideo3.model.conversion.convert import convert
from internvideo3.model.released import ReleasedAttention, join_pairs, release, split_pairs

PREFIX = "model.language_model.layers"
TENSORS = {
    "q_proj.weight",
    "q_proj.bias",
    "kv_a_proj_with_mqa.weight",
    "kv_a_proj_with_mqa.bias",
    "kv_b_proj.weight",
    "o_proj.weight",
}
TOLERANCE = 1e-9


class PlainAttention(nn.Module):
    """The released forward pass of one layer from its tensors, step by step, causal."""

    def __init__(self, tensors: dict[str, Tensor], heads: int, head_dim: int) -> None:
        super().__init__()
        self.tensors, self.heads, self.head_dim = tensors, heads, head_dim

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        w, H, D = self.tensors, self.heads, self.head_dim
        x = hidden_states[0]
        T = len(x)
        rank = w["kv_b_proj.weight"].shape[1]
        q = (x @ w["q_proj.weight"].T + w["q_proj.bias"]).view(T, H, -1)
        down = x @ w["kv_a_proj_with_mqa.weight"].T + w["kv_a_proj_with_mqa.bias"]
        up = (down[:, :rank] @ w["kv_b_proj.weight"].T).view(T, H, 2 * D)
        cos, sin = (table[0] for table in position_embeddings)
        scores = torch.full((H, T, T), float("-inf"), dtype=x.dtype)
        k_rope = self.rotated(down[:, rank:], cos, sin)
        for h in range(H):
            q_rope = self.rotated(q[:, h, D:], cos, sin)
            q_whole = torch.cat([q[:, h, :D], q_rope], -1)
            k_whole = torch.cat([up[:, h, :D], k_rope], -1)
            scores[h] = q_whole @ k_whole.T / q_whole.shape[-1] ** 0.5
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        heads = torch.einsum("hqk,khd->qhd", weights, up[..., D:])
        return (heads.reshape(T, H * D) @ w["o_proj.weight"].T)[None], None

    @staticmethod
    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Pairs lie next to each other in the weights; rotate_half wants them half a row apart."""
        halves = x.view(len(x), -1, 2).transpose(1, 2).reshape(len(x), -1)
        first, second = halves.chunk(2, -1)
        return halves * cos + torch.cat([-second, first], -1) * sin


def plain_logits(source: Any, tensors: dict[str, Tensor], case: dict[str, Any]) -> Tensor:
    """Logits of the source with its text attention replaced by `PlainAttention`."""
    model = copy.deepcopy(source)
    text = model.config.text_config
    for index, layer in enumerate(model.model.language_model.layers):
        start = f"{PREFIX}.{index}.self_attn."
        own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
        assert set(own) == TENSORS
        layer.self_attn = PlainAttention(own, text.num_attention_heads, text.head_dim)
    return model(**case, use_cache=False).logits


def relative_difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.fixture(scope="module")
def released(
    source: Any, calibration: Any, processor: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A conversion in the released layout, float64."""
    folder = tmp_path_factory.mktemp("released")
    convert(source, calibration, "official").save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def as_the_authors_wrote_it(released: Path, source: Any, folder: Path) -> Path:
    """The same weights beside the GQA model's own config.json, as in the authors' release."""
    shutil.copytree(released, folder)
    source.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("which", [0, 2], ids=["video", "text"])
def test_logits_are_those_of_a_plain_forward_pass(
    released: Path, source: Any, calibration: Any, which: int, bar: Any
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(released, dtype=torch.float64)
    case = calibration[which]
    want = plain_logits(source, load_file(released / "model.safetensors"), case)
    for form in ("reconstruct", "absorbed"):
        model.config.text_config.attention_form = form
        apart = float(relative_difference(model(**case).logits, want))
        bar("released layout = plain forward pass, float64", apart, TOLERANCE)


def test_the_authors_config_is_understood(
    released: Path, source: Any, calibration: Any, tmp_path: Path
) -> None:
    folder = as_the_authors_wrote_it(released, source, tmp_path / "authors")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_vl"
    info = inspect(folder)
    assert info.attention == "m2la" and info.row_form == "released"
    assert 2 * info.numbers_per_token == info.gqa_numbers_per_token
    model, _ = load_model(folder, "cpu", "float64")
    assert isinstance(model.model.language_model.layers[0].self_attn, ReleasedAttention)
    want = plain_logits(source, load_file(folder / "model.safetensors"), calibration[0])
    assert relative_difference(model(**calibration[0]).logits, want) <= TOLERANCE


@pytest.mark.parametrize(
    ("lost", "found", "words"),
    [
        ("self_attn.kv_b_proj.weight", None, "lack kv_a_proj_with_mqa or kv_b_proj"),
        ("self_attn.q_proj.bias", None, r"missing keys \(.*layers.1.self_attn.q_proj.bias"),
        (None, "self_attn.q_norm.weight", r"unexpected keys \(.*layers.1.self_attn.q_norm.weight"),
    ],
)
def test_tensors_that_do_not_belong_are_named(
    released: Path, source: Any, tmp_path: Path, lost: str | None, found: str | None, words: str
) -> None:
    folder = as_the_authors_wrote_it(released, source, tmp_path / "authors")
    tensors = load_file(folder / "model.safetensors")
    if lost:
        del tensors[f"{PREFIX}.1.{lost}"]
    if found:
        tensors[f"{PREFIX}.1.{found}"] = torch.ones(4, dtype=torch.float64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        load_model(folder, "cpu", "float64")


def test_what_has_no_place_in_the_layout_is_refused(half: Any) -> None:
    with pytest.raises(ValueError, match="an exact QK-norm, modality adapters"):
        release(half.model.language_model.layers[0].self_attn)


def test_pairs_are_split_and_joined() -> None:
    x = torch.arange(6)
    assert split_pairs(x).tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(join_pairs(split_pairs(x)), x)
