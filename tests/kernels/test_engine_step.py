"""A whole decode step through Triton's interpreter: the engine hands the kernels what they take.

.venv/bin/python -m pytest tests/kernels/test_engine_step.py -q
"""

import pytest
import torch

from internvideo3.harness.profile.runners import Clock, EngineRunner, random_ids
from internvideo3.harness.profile.subjects import load
from internvideo3.kernels.choice import interpreted

STEPS = 1


def step(name: str, batch: int) -> torch.Tensor:
    """Logits of the last step, [B, Y]."""
    subject = load(name, torch.device("cpu"), "float32")
    runner = EngineRunner(subject, batch, chunk=32)
    runner.keeps_logits = True
    logits_BY = runner.prefill(random_ids(subject, batch, 21), STEPS)
    runner.decode(logits_BY, STEPS, Clock(runner.device))
    return runner.logits[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random:tiny-gqa", "random:tiny-m2la"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_through_the_kernels_is_the_step_in_torch(name: str, batch: int) -> None:
    want_BY = step(name, batch)
    with interpreted():
        got_BY = step(name, batch)
    assert float((got_BY - want_BY).abs().max() / want_BY.abs().max()) <= 1e-5
    assert want_BY.std() > 1e-3
