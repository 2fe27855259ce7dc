"""The memory plan against what is allocated: `pytest tests/training/test_plan.py`."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from internvideo3.model.config import InternVideo3Config
from internvideo3.model.modeling import InternVideo3ForConditionalGeneration
from internvideo3.training.plan import (
    activation_bytes,
    fake_peak,
    plan_step,
    released_config,
    run_pass,
)

TOKENS = 1500


def middle_config() -> InternVideo3Config:
    """A tenth of the released widths and layers."""
    config = released_config().to_dict()
    config["text_config"] |= {
        "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "latent_rank": 112,
        "rope_slots": 16,
    }  # fmt: skip
    config["text_config"]["rope_parameters"] |= {"mrope_section": [12, 10, 10]}
    config["vision_config"] |= {
        "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4,
        "out_hidden_size": 384, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    made: InternVideo3Config = InternVideo3Config.from_dict(config)
    return made


def allocated_peak(work: Any) -> int:
    """Most bytes that torch's allocator held at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    held = peak = 0
    events = watched.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(
        (e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [True, False])
def test_the_plan_is_within_15_percent_of_what_is_allocated(recompute: bool) -> None:
    config = middle_config()
    planned = fake_peak(config, TOKENS, recompute=recompute, bfloat16=False)
    model = InternVideo3ForConditionalGeneration(config).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    embeds_1TW = torch.randn(1, TOKENS, config.text_config.hidden_size, requires_grad=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    peak = allocated_peak(lambda: run_pass(model, embeds_1TW, False))
    assert planned == pytest.approx(peak, rel=0.15)
    # Two shallow models tell what all six layers need.
    two = activation_bytes(config, TOKENS, recompute=recompute, bfloat16=False)
    assert two == pytest.approx(planned, rel=0.03)


@pytest.mark.slow
def test_the_released_shape_is_planned_in_seconds() -> None:
    """A quarter of 256K tokens, as one of four processes that share a row has them."""
    started = time.process_time()
    plan = plan_step(released_config(), 65536, 8, recompute=True, bfloat16=True)
    assert time.process_time() - started < 30
    assert 7e9 < plan.weights < 9.5e9
    assert plan.states == 16 * plan.weights // 8
    # A layer keeps its input, 65536 x 4096 numbers in float32; 36 of them, and one pass inside.
    assert 36 * (1 << 30) < plan.activations < 80 * (1 << 30)
