"""Recovery: a short distillation of the converted attention from the source.

    loss = mean over tokens of KL(source || converted)

Only parameters of converted attention are trained, inside the source model (one copy of the
weights); the source's final hidden states are those that the calibration pass left. Batches are
whole: a crop without its first token, the attention sink, would give a wrong target.

Adam with a learning rate relative to each tensor's own spread (1e-3 of its standard deviation; 1e-2
diverges) and a cosine over the time that is given.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from internvideo3.model.attention import RowAttention
from internvideo3.model.conversion.divergence import Reference, attending, log_probs
from internvideo3.model.conversion.recording import HEAD_TOKENS, Progress, silent

RELATIVE_RATE = 1e-3
WARMUP_STEPS = 4
HALF_SCALE = 2.0**12
"""Of losses in float16 to begin with."""


class RecoveryError(ValueError):
    """A distillation that cannot go on."""


@dataclass(frozen=True)
class Recovery:
    """How it went."""

    steps: int
    seconds: float
    """By the clock that was given."""
    losses: list[float]
    """KL of each step's batch, in nats."""


def recover(
    reference: Reference,
    layers: Sequence[RowAttention],
    *,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
    progress: Progress = silent,
) -> tuple[list[RowAttention], Recovery]:
    """Trains copies of the converted layers, round after round over the batches, for a while.

    Args:
        reference: the source and its hidden states.
        layers: converted layers, in the order of the source's.
        seconds: limit by `clock`; the step under way is finished.
        clock: wall time, or `time.process_time` where other work shares the processors.
        progress: called after every step, in seconds.
    """
    # Copies: an untrained layer's projections are the source's own modules.
    layers = [copy.deepcopy(layer) for layer in layers]
    owned = [parameter for layer in layers for parameter in layer.parameters()]
    # In float32 whatever the model is in: most steps are smaller than bfloat16's, and squares of
    # gradients are nothing in float16.
    masters = [parameter.detach().float().clone() for parameter in owned]
    groups = [{"params": [p], "lr": RELATIVE_RATE * _spread(p)} for p in masters]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    rates = [group["lr"] for group in optimiser.param_groups]
    scale = Scale(HALF_SCALE if owned[0].dtype == torch.float16 else 1.0)
    started, losses = clock(), list[float]()
    with _training(reference, owned):
        while (used := clock() - started) < seconds:
            warm = min(1.0, (len(losses) + 1) / WARMUP_STEPS)
            factor = warm * 0.5 * (1 + math.cos(math.pi * used / seconds))
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = factor * rate
            index = len(losses) % len(reference.batches)
            losses.append(_step(reference, layers, index, scale.value))
            if scale.hand_over(owned, masters):
                optimiser.step()
            _copy(masters, owned)
            progress("recovery", int(min(seconds, clock() - started)), int(seconds))
    return layers, Recovery(len(losses), clock() - started, losses)


class Scale:
    """What a loss is multiplied by, so that float16 has its gradients."""

    def __init__(self, value: float) -> None:
        self.value = value

    def hand_over(self, owned: Sequence[nn.Parameter], masters: Sequence[Tensor]) -> bool:
        """Gives parameters' gradients to their masters; False, and a smaller scale, if too large.

        Raises:
            RecoveryError: there are none that are finite at any scale.
        """
        finite = True
        for parameter, master in zip(owned, masters, strict=True):
            master.grad = None  # a batch need not reach every parameter
            if parameter.grad is not None:
                master.grad = parameter.grad.float() / self.value
                finite = finite and bool(master.grad.isfinite().all())
                parameter.grad = None
        if finite:
            return True
        if self.value <= 1:
            raise RecoveryError(
                "distillation has gradients that are not finite. Leave --distil-minutes out, or "
                "give --dtype float32 or bfloat16."
            )
        self.value /= 2
        return False


@torch.no_grad()
def _copy(masters: Sequence[Tensor], owned: Sequence[nn.Parameter]) -> None:
    for parameter, master in zip(owned, masters, strict=True):
        parameter.copy_(master)


def _spread(parameter: Tensor) -> float:
    """Standard deviation; of a bias of zeros, that of nothing."""
    return float(parameter.detach().float().std()) if parameter.numel() > 1 else 0.0


@contextmanager
def _training(reference: Reference, owned: list[nn.Parameter]) -> Iterator[None]:
    model = reference.source.model
    frozen = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    for parameter in owned:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in owned:
            parameter.requires_grad_(False)
        for parameter in frozen:
            parameter.requires_grad_(True)


@torch.enable_grad()
def _step(reference: Reference, layers: Sequence[RowAttention], index: int, scale: float) -> float:
    """Gradients of one batch's mean KL, times a scale; returns the KL itself."""
    source, batch, want_NX = reference.source, reference.batches[index], reference.hidden[index]
    with attending(source, layers, batch):
        hidden_BTX = source.hidden(batch)
    got_NX = hidden_BTX[source.supervised(batch).to(hidden_BTX.device)]
    # The head's logits are the largest tensor: a few tokens at a time, gradients by the states.
    leaf_NX = got_NX.detach().requires_grad_(True)
    total = 0.0
    for want, got in zip(want_NX.split(HEAD_TOKENS), leaf_NX.split(HEAD_TOKENS), strict=True):
        with torch.no_grad():
            p = log_probs(source.head, want)
        kl = (p.exp() * (p - log_probs(source.head, got))).sum() / len(leaf_NX)
        (kl * scale).backward()
        total += float(kl.detach())
    got_NX.backward(leaf_NX.grad)
    return total
