"""Vision tokens of a smaller rank take fewer bytes, and nothing else changes.

That sessions on such a model compute what the whole model does is shown by test_session.py, whose
tests run on it too; here are the bytes, the other forms of row, and what cannot be.

Run: .venv/bin/python -m pytest tests/model/test_nested.py -q
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from internvideo3.model.conversion.convert import convert
from internvideo3.model.conversion.options import PRESETS
from internvideo3.model.session import Limits, Session

QUESTION = "Who moves left, then right of the red circle?"


def watched(model: Any, processor: Any, chat: Any, frames: Any, **options: Any) -> Session:
    """A session that has seen two videos and was asked about them."""
    session = Session(model, processor, **options)
    session.append(chat(QUESTION, 2), (frames(14, 5), frames(6, 6)))
    session.prefill()
    return session


def test_rows_of_vision_tokens_keep_their_own_rank_alone(
    nested: Any, processor: Any, chat: Any, frames: Any
) -> None:
    text = nested.config.text_config
    for chunk in (9, 4096):
        session = watched(nested, processor, chat, frames, chunk=chunk)
        seen = session.ids.count(nested.config.video_token_id)
        for index in range(text.num_hidden_layers):
            vision, *others = session.cache.segmented(index).segments()
            rank, kept = text.rank(index), text.rank_of_vision(index)
            (rows,) = vision.tensors
            assert kept < rank and vision.length == rows.shape[2] == seen
            assert rows.shape[3] == kept + 2 * text.slots(index)
            assert {one.tensors[0].shape[3] for one in others} == {text.row_width(index)}
            assert sum(one.length for one in others) == len(session.ids) - seen
            # What the rows lack is zero: whole, they are those of a cache that was never cut.
            (whole,) = vision.whole()
            assert whole.shape[3] == text.row_width(index)
            assert float(whole[..., kept:rank].abs().max()) == 0.0


def test_a_cache_takes_the_bytes_of_its_ranks(
    nested: Any, processor: Any, chat: Any, frames: Any
) -> None:
    """No spare room but that of the tail, and no copy in full width that stays."""
    text = nested.config.text_config
    session = watched(nested, processor, chat, frames, chunk=64)
    seen = session.ids.count(nested.config.video_token_id)
    numbers = sum(
        seen * (text.rank_of_vision(i) + 2 * text.slots(i))
        + (len(session.ids) - seen) * text.row_width(i)
        for i in range(text.num_hidden_layers)
    )
    spare = 64 * sum(text.row_width(i) for i in range(text.num_hidden_layers))
    assert 8 * numbers <= session.bytes() <= 8 * (numbers + spare)
    whole = len(session.ids) * sum(text.row_width(i) for i in range(text.num_hidden_layers))
    assert numbers < 0.9 * whole


def test_rows_before_rotation_are_cut_too(
    source: Any, calibration: Any, processor: Any, chat: Any, frames: Any, inputs: Any
) -> None:
    """Their angles lie in the first layer's segments and move along."""
    options = PRESETS["prerope"](source.config.text_config).with_(vision_rank_share=0.5)
    model = convert(source, calibration, options)
    want = model(**inputs(QUESTION, (frames(14, 5), frames(6, 6)))).logits[0, -1]
    for chunk in (9, 4096):
        session = watched(model, processor, chat, frames, chunk=chunk)
        vision = session.cache.segmented(1).segments()[0]
        assert vision.tensors[0].shape[3] < model.config.text_config.rank(1)
        assert float((session.logits_last - want).abs().max()) <= 1e-9
    session.generate(Limits(max_new_tokens=4, stop_ids=()))
    again = model(**as_ids(session, inputs(QUESTION, (frames(14, 5), frames(6, 6)))))
    assert float((session.logits_last - again.logits[0, -1]).abs().max()) <= 1e-9


def as_ids(session: Session, case: dict[str, Any]) -> dict[str, Any]:
    """The case with the reply added to its ids."""
    ids = torch.tensor([session.ids])
    more = ids.shape[1] - case["input_ids"].shape[1]
    kinds = torch.nn.functional.pad(torch.as_tensor(case["mm_token_type_ids"]), (0, more))
    return {**case, "input_ids": ids, "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": kinds}  # fmt: skip


def test_cut_rows_are_compressed_like_whole_ones(
    nested: Any, processor: Any, chat: Any, frames: Any
) -> None:
    """A zero stays zero in fp8, so the scales and the outcome are those of whole rows."""
    model = nested.to(torch.float64)
    cut = watched(model, processor, chat, frames)
    plain = cut.logits_last
    whole = watched(model, processor, chat, frames)
    for index in range(model.config.text_config.num_hidden_layers):
        layer = whole.cache.segmented(index)
        layer.frozen = tuple(type(one)(one.whole(), one.length) for one in layer.frozen)
    for session in (cut, whole):
        session.compress()
        session.append_text("Why?")
    assert cut.bytes() < whole.bytes()
    assert float((cut.logits_last - whole.logits_last).abs().max()) <= 1e-9
    assert not torch.equal(cut.logits_last, plain)


@pytest.mark.parametrize("hidden", [False, float("-inf")])
def test_a_mask_cannot_hide_one_of_the_tokens_that_lie_out_of_order(
    nested: Any, processor: Any, chat: Any, frames: Any, hidden: bool | float
) -> None:
    layer = watched(nested, processor, chat, frames).cache.segmented(0)
    cached = layer.get_seq_length()
    mask = torch.full((1, 1, 1, cached), True if hidden is False else 0.0)
    assert [part.mask_BxTN is None for part in layer.parts(1, mask)] == [True, True, False]
    mask[..., 3] = hidden
    with pytest.raises(ValueError, match="vision tokens lie apart"):
        layer.parts(1, mask)
