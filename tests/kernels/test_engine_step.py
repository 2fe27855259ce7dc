"""A whole decode step through Triton's interpreter: the engine hands the kernels what they take.

.venv/bin/python -m pytest tests/kernels/test_engine_step.py -q
"""

import pytest
import torch

from internvideo3.harness.profile.gate import PIECES
from internvideo3.harness.profile.runners import Clock, EngineRunner, random_ids
from internvideo3.harness.profile.subjects import Subject, class_of, config_of, load, randomised
from internvideo3.kernels.choice import interpreted
from internvideo3.kernels.gqa_decode import triton as gqa
from internvideo3.kernels.latent_decode import triton as latent

STEPS = 1


def of(name: str) -> Subject:
    """A model with random weights; `released`: in the layout of the authors' checkpoint."""
    if name != "released":
        return load(name, torch.device("cpu"), "float32")
    config = config_of("random:tiny-m2la")
    text = config.text_config
    text.row_form, text.qk_norm, text.rope_slots = "released", "linear", text.head_dim // 2
    model = class_of(config)._from_config(config, dtype=torch.float32).eval()
    return Subject(name, randomised(model), None, "m2la")


def step(name: str, batch: int, *, fp8: bool = False) -> torch.Tensor:
    """Logits of the last step, [B, Y], after a prefill in several chunks."""
    subject = of(name)
    runner = EngineRunner(subject, batch, chunk=16, fp8=fp8)
    runner.keeps_logits = True
    logits_BY = runner.prefill(random_ids(subject, batch, 37), STEPS)
    runner.decode(logits_BY, STEPS, Clock(runner.device))
    return runner.logits[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch", "fp8"),
    [
        ("random:tiny-gqa", 1, False),
        ("random:tiny-gqa", 2, False),
        ("random:tiny-m2la", 1, False),
        ("random:tiny-m2la", 2, False),
        ("random:tiny-m2la", 2, True),
        ("released", 1, False),
        ("released", 2, True),
    ],
)
def test_a_step_through_the_kernels_is_the_step_in_torch(name: str, batch: int, fp8: bool) -> None:
    want_BY = step(name, batch, fp8=fp8)
    with interpreted():
        got_BY = step(name, batch, fp8=fp8)
    assert float((got_BY - want_BY).abs().max() / want_BY.abs().max()) <= 1e-5
    assert want_BY.std() > 1e-3


def test_kernels_deal_out_the_rows_of_the_gate() -> None:
    """As they do those of long contexts, whatever tile a card gets."""
    plans = [*latent.PLANS.values(), *latent.FP8_PLANS.values(), latent.HOPPER_PLAN]
    rows = max(PIECES)
    for plan in plans:
        assert rows > 3 * plan.tile.block_n * latent.BLOCKS_PER_SPLIT
        assert rows % plan.tile.block_n
    assert rows > 3 * gqa.TILE.block_n * gqa.BLOCKS_PER_SPLIT
