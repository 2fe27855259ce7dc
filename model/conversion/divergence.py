"""How far a converted model is from its source: KL(source || converted) per supervised token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from internvideo3.model.conversion.statistics import Batch, on_device, supervised

CHOICE_BATCHES = 16
"""Calibration batches on which alternatives are compared."""


@dataclass(frozen=True)
class Reference:
    """The source's answers to some batches."""

    batches: Sequence[Batch]
    log_probs: list[Tensor]
    """Of each batch, [supervised tokens, vocabulary], in host memory."""

    @classmethod
    @torch.no_grad()
    def of(cls, source: Qwen3VLForConditionalGeneration, batches: Sequence[Batch]) -> Reference:
        """Runs the source on the first `CHOICE_BATCHES` batches."""
        chosen = batches[:CHOICE_BATCHES]
        return cls(chosen, [_log_probs(source, batch) for batch in chosen])

    @torch.no_grad()
    def divergence(self, converted: Qwen3VLForConditionalGeneration) -> float:
        """Mean KL(source || converted), in nats."""
        total, tokens = 0.0, 0
        for batch, want in zip(self.batches, self.log_probs, strict=True):
            got = _log_probs(converted, batch)
            total += float((want.exp() * (want - got)).sum())
            tokens += len(want)
        return total / tokens


def _log_probs(model: Qwen3VLForConditionalGeneration, batch: Batch) -> Tensor:
    inputs = {k: v for k, v in on_device(batch, model.device).items() if k != "labels"}
    logits: Tensor = model(**inputs, use_cache=False).logits
    chosen = logits[supervised(model, batch, logits.device)]
    wide = torch.promote_types(chosen.dtype, torch.float32)
    return chosen.to(wide).log_softmax(-1).cpu()
