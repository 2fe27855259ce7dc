"""Absorbed = reconstructed = generate = the source model, on logits.

Run: .venv/bin/python -m pytest tests/model/test_equivalence.py -q
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForImageTextToText

from internvideo3.model.cache import LatentCache
from internvideo3.model.modeling import InternVideo3ForConditionalGeneration, InternVideo3Model

FORMS = ("reconstruct", "absorbed", "auto")
CASES = ("text", "video", "two videos", "image", "image and video", "padded batch")


@pytest.fixture
def case(request: pytest.FixtureRequest, inputs: Any, frames: Any, pad: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    text = inputs("Is there a blue square?")
    video = inputs("What is seen first?", (frames(10, 7),))
    made = {
        "text": lambda: text,
        "video": lambda: video,
        "two videos": lambda: inputs("Which is longer?", (frames(9, 3), frames(4, 4, 96))),
        "image": lambda: inputs("What colour?", (), (image,)),
        "image and video": lambda: inputs("Is it in the video?", (frames(6, 5),), (image,)),
        "padded batch": lambda: pad([video, text, inputs("And here?", (frames(4, 6),))]),
    }
    return made[request.param]()


def difference(a: Tensor, b: Tensor, rows_BT: Tensor) -> float:
    return float((a - b)[rows_BT.bool()].abs().max())


def generate(model: Any, case: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Ids and next-token logits; `generate` itself returns logits rounded to float32."""
    caught: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _m, _i, out: caught.append(out[:, -1]))
    try:
        ids = model.generate(**case, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    finally:
        hook.remove()
    return ids, caught


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, indirect=True)
def test_one_pass_equals_the_source(
    case: dict[str, Any], form: str, source: Any, with_form: Any
) -> None:
    got = with_form(form)(**case).logits
    assert difference(got, source(**case).logits, case["attention_mask"]) <= 1e-9


@pytest.mark.parametrize("case", ["two videos", "padded batch"], indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_float32_equals_the_source(
    case: dict[str, Any], form: str, source: Any, with_form: Any
) -> None:
    got = copy.deepcopy(with_form(form)).float()(**case).logits
    want = copy.deepcopy(source).float()(**case).logits
    assert difference(got, want, case["attention_mask"]) <= 1e-4


@pytest.mark.parametrize("case", CASES, indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_generate_equals_the_source(
    case: dict[str, Any], form: str, source: Any, with_form: Any
) -> None:
    got_ids, got = generate(with_form(form), case)
    want_ids, want = generate(source, case)
    assert torch.equal(got_ids, want_ids)
    assert len(got) == 5
    assert max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)) <= 1e-9


@pytest.mark.parametrize("case", ["padded batch"], indirect=True)
def test_beam_search_equals_the_source(case: dict[str, Any], source: Any, identity: Any) -> None:
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    assert torch.equal(identity.generate(**case, **options), source.generate(**case, **options))


@pytest.mark.parametrize("case", ["two videos"], indirect=True)
def test_any_mask_is_obeyed(case: dict[str, Any], source: Any, with_form: Any) -> None:
    """Two questions packed after one prefix must not see each other, boolean or additive."""
    length = case["input_ids"].shape[1]
    packed = {k: v for k, v in case.items() if k != "attention_mask"}
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    mask[..., -6:, -12:-6] = False
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e300)
    positions = source.model.get_rope_index(
        case["input_ids"],
        mm_token_type_ids=torch.as_tensor(case["mm_token_type_ids"]),
        video_grid_thw=case["video_grid_thw"],
    )[0]
    positions[..., -6:] = positions[..., -12:-6]
    want = source(**packed, attention_mask=mask, position_ids=positions).logits
    for form in FORMS:
        model = with_form(form)
        for given in (mask, additive):
            got = model(**packed, attention_mask=given, position_ids=positions).logits
            assert float((got - want).abs().max()) <= 1e-9
    unmasked = source(**packed, position_ids=positions).logits
    assert float((unmasked - want).abs().max()) > 1e-3


@pytest.mark.parametrize("case", ["video"], indirect=True)
def test_gradients_equal_the_source(case: dict[str, Any], source: Any, identity: Any) -> None:
    labels = case["input_ids"]
    norms: list[Tensor] = []
    for model in (source, identity):
        with torch.enable_grad():
            model.zero_grad()
            out = model(**case, labels=labels)
            out.loss.backward()
        assert out.past_key_values is None or model is source
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert not missing
        layer = model.model.language_model.layers[0]
        norms.append(layer.mlp.up_proj.weight.grad.clone())
        model.zero_grad()
    assert float((norms[0] - norms[1]).abs().max()) <= 1e-9


def test_a_cache_refuses_gradients(inputs: Any, identity: Any) -> None:
    with torch.enable_grad(), pytest.raises(ValueError, match="use_cache=False"):
        identity(**inputs("Hello?"), past_key_values=LatentCache(8), use_cache=True)


@pytest.mark.parametrize("case", ["two videos"], indirect=True)
def test_saved_and_loaded_through_auto_classes(
    case: dict[str, Any], identity: InternVideo3ForConditionalGeneration, tmp_path: Path
) -> None:
    identity.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float64)
    assert isinstance(loaded, InternVideo3ForConditionalGeneration)
    assert torch.equal(loaded(**case).logits, identity(**case).logits)
    base, report = AutoModel.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert isinstance(base, InternVideo3Model)
    assert not report["missing_keys"] and not report["mismatched_keys"]


def test_another_cache_is_refused(inputs: Callable[..., Any], source: Any, identity: Any) -> None:
    other = source(**inputs("Hello?"), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="LatentCache"):
        identity(**inputs("Hello?"), past_key_values=other)
