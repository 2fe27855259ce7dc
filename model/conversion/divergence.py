"""How far converted attention layers are from their source.

The converted layers are put into the source model in place of its own: everything else is shared,
so there is one copy of the weights.

Axes: N supervised tokens, X model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from internvideo3.model.attention import RowAttention
from internvideo3.model.conversion.recording import HEAD_TOKENS
from internvideo3.model.conversion.source import Batch, Source

Layers = Sequence[RowAttention]
"""Converted layers in the source's order; may be loaded when they are asked for."""

CHOICE_BATCHES = 16
"""Calibration batches on which alternatives are compared."""


@dataclass(frozen=True)
class Agreement:
    """A converted model beside its source on the same tokens."""

    tokens: int
    kl: float
    """Mean KL(source || converted) per supervised token, in nats."""
    source_perplexity: float
    perplexity: float
    top1: float
    """Share of tokens whose most likely successor is the source's."""

    @property
    def perplexity_ratio(self) -> float:
        """Converted over source."""
        return self.perplexity / self.source_perplexity


@dataclass(frozen=True)
class Reference:
    """The source's answers to some batches."""

    source: Source
    batches: Sequence[Batch]
    hidden: list[Tensor]
    """Of each batch, final hidden states at supervised tokens [N, X]."""

    @classmethod
    @torch.no_grad()
    def of(cls, source: Source, batches: Sequence[Batch]) -> Reference:
        """Runs the source."""
        return cls(source, batches, [_supervised_hidden(source, batch) for batch in batches])

    @torch.no_grad()
    def source_loss(self) -> float:
        """The source's own mean loss per supervised token, in nats."""
        total, tokens = 0.0, 0
        for batch, hidden_NX in zip(self.batches, self.hidden, strict=True):
            labels_N = self.labels(batch).to(hidden_NX.device)
            total += float(_compare(self.source.head, hidden_NX, hidden_NX, labels_N)[1])
            tokens += len(hidden_NX)
        return total / tokens

    def labels(self, batch: Batch) -> Tensor:
        """The tokens that follow supervised positions."""
        found: Tensor = batch["input_ids"][:, 1:][self.source.supervised(batch)[:, :-1]]
        return found

    @torch.no_grad()
    def agreement(self, layers: Layers, only: int | None = None) -> Agreement:
        """Runs the source with all converted attention layers, or one alone."""
        found = torch.zeros(4, dtype=torch.float64)
        tokens = 0
        for batch, want_NX in zip(self.batches, self.hidden, strict=True):
            with attending(self.source, layers, batch, only):
                got_NX = _supervised_hidden(self.source, batch)
            labels_N = self.labels(batch).to(got_NX.device)
            found += _compare(self.source.head, want_NX, got_NX, labels_N)
            tokens += len(got_NX)
        kl, before, after, same = (found / tokens).tolist()
        return Agreement(tokens, kl, math.exp(before), math.exp(after), same)

    def divergence(self, layers: Layers) -> float:
        """Mean KL(source || converted), in nats."""
        return self.agreement(layers).kl

    def divergences(self, layers: Layers) -> list[float]:
        """The same for every layer alone, with all others the source's own."""
        return [self.agreement(layers, only=index).kl for index in range(len(layers))]


@contextmanager
def attending(
    source: Source, layers: Layers, batch: Batch, only: int | None = None
) -> Iterator[None]:
    """The source with converted attention layers (or one alone), for one batch."""
    vision_BT = source.vision_tokens(batch).to(source.device)
    decoders = source.layers
    own = [decoder.self_attn for decoder in decoders]
    chosen = range(len(decoders)) if only is None else [only]
    assert len(layers) == len(decoders), "a converted layer for each of the source's"
    try:
        for index in chosen:
            decoders[index].self_attn = _OfModality(layers, index, vision_BT)
        yield
    finally:
        for decoder, attention in zip(decoders, own, strict=True):
            decoder.self_attn = attention


class _OfModality(nn.Module):
    """A converted layer that is told which tokens are vision; a source model does not say."""

    def __init__(self, layers: Layers, index: int, vision_BT: Tensor) -> None:
        super().__init__()
        self.layers, self.index = layers, index
        self.vision_BT = vision_BT

    def forward(self, **kwargs: Any) -> Any:
        # Asked for here, so that of layers on disk one is in memory at a time.
        return self.layers[self.index](**kwargs, modality_mask=self.vision_BT)


def _supervised_hidden(source: Source, batch: Batch) -> Tensor:
    hidden_BTX = source.hidden(batch)
    return hidden_BTX[source.supervised(batch).to(hidden_BTX.device)]


def _compare(head: nn.Linear, want_NX: Tensor, got_NX: Tensor, labels_N: Tensor) -> Tensor:
    """Sums of KL, of both models' losses, and of agreeing first choices."""
    total = torch.zeros(4, dtype=torch.float64)
    parts = zip(*(x.split(HEAD_TOKENS) for x in (want_NX, got_NX, labels_N)), strict=True)
    for want, got, labels in parts:
        p, q = (log_probs(head, x) for x in (want, got))
        loss = [-x.gather(1, labels[:, None]).sum() for x in (p, q)]
        same = (p.argmax(-1) == q.argmax(-1)).sum()
        total += torch.stack([(p.exp() * (p - q)).sum(), *loss, same]).double().cpu()
    return total


def log_probs(head: nn.Linear, hidden_NX: Tensor) -> Tensor:
    """Log-probabilities of all words, float32 or wider."""
    logits: Tensor = head(hidden_NX)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
