"""FLOPs of a pass against a count of its products: `pytest tests/training/test_throughput.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from internvideo3.model.checkpoint import load_model
from internvideo3.training.policy import Policy
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Optimiser, Sft, WorldData
from internvideo3.training.throughput import attending_pairs, pass_flops
from internvideo3.training.train import build_stage

STAGE = Sft(
    kind="sft", steps=1, documents=3, pack_tokens=4096, optimiser=Optimiser(learning_rate=1e-3),
    data=WorldData(lengths={8: 1.0}, videos=6, questions=6),
)  # fmt: skip


@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("checkpoint", ["scale:base", "scale:m2la"])
def test_the_formula_counts_what_torch_counts(checkpoint: str, train_vision: bool) -> None:
    """Of a short row, where attention, which torch counts by kernel, is little."""
    model, processor = load_model(checkpoint, "cpu", torch.float32)
    policy = Policy(model, backend="mask", train_vision=train_vision)
    short = replace(STAGE, documents=1, data=WorldData(lengths={2: 1.0}, videos=6))
    stage = build_stage(short, processor, policy, 0, Processes())
    with FlopCounterMode(display=False) as counted:
        (work,), _ = stage.works(0, policy)
        policy(work.pack, work.loss).backward()
    assert pass_flops(model, work.pack) == pytest.approx(counted.get_total_flops(), rel=0.15)


def test_pairs_are_those_of_the_mask() -> None:
    model, processor = load_model("scale:m2la", "cpu", torch.float32)
    policy = Policy(model)
    (work,), _ = build_stage(STAGE, processor, policy, 0, Processes()).works(0, policy)
    from internvideo3.training.attention import PackedAttention

    seen = PackedAttention(work.pack.document_T, work.pack.branch_T).visible()
    assert attending_pairs(work.pack) == int(seen.sum())
