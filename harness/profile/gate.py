"""The profiler's gate: the engine's logits against a whole pass over the same tokens.

Each form in which a model is timed is held to it by itself: so many sequences, rows as they are or
in fp8. Without fp8 the truth is the model's own forward pass, which has no cache. Rows in fp8 are
rounded, which is no fault of the engine; so there the truth is a pass of the model over the same
compressed rows.

Axes: B sequences, T tokens, Y vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from internvideo3.harness.profile.runners import Clock, EngineRunner, random_ids
from internvideo3.harness.profile.subjects import Subject
from internvideo3.model.cache import Segment, SegmentedCache, SegmentedLayer
from internvideo3.model.forward import Tokens, logits, run

PIECES, NEW_TOKENS = (32, 64), 8
"""Tokens prefilled, piece by piece, and tokens decoded."""
EXACT = 1e-4
"""Largest distance in float32: sums of different order."""
SLACK = 1.5


@dataclass(frozen=True, order=True)
class Form:
    """A form in which the engine is used."""

    batch: int = 1
    cache: str = "native"

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.cache} cache"


@dataclass(frozen=True)
class Gate:
    """How far logits are from a reference: norm of the difference over the norm of it."""

    engine: float
    """Of the engine."""
    forward: float
    """Of the model's own pass in the same number format."""
    reference: str
    """Which passes serve as the truth."""

    @property
    def is_green(self) -> bool:
        """Whether the engine is right.

        Rounding to bfloat16 adds up over the layers, for the model's own pass as for the engine; so
        there the engine may be no further from float32 than `SLACK` times that.
        """
        limit = SLACK * self.forward if self.forward else EXACT
        return self.engine <= limit


def gate(
    subject: Subject,
    form: Form = Form(),
    pieces: Sequence[int] = PIECES,
    new_tokens: int = NEW_TOKENS,
) -> Gate:
    """Compares the engine, prefilled in pieces and then token by token, with whole passes."""
    runner = EngineRunner(subject, form.batch, max(pieces), fp8=form.cache == "fp8")
    runner.keeps_logits = True
    ids_BT = random_ids(subject, form.batch, sum(pieces))
    for cut_BT in ids_BT.split(list(pieces), dim=1):
        first_BY = runner.prefill(cut_BT, 0)
    rows = runner.cache.fork() if runner.fp8 else None
    said = runner.decode(first_BY, new_tokens, Clock(runner.device))
    said_BT = torch.tensor(said, device=runner.device)[:, :-1]
    engine_BTY = torch.stack(runner.logits, dim=1)
    if rows is not None:
        over_rows = functools.partial(_over_rows, subject.model, rows, said_BT)
        return _compared(subject, engine_BTY, over_rows, "a pass over the same fp8 rows")
    whole_BT = torch.cat([ids_BT, said_BT], dim=1)
    engine_BTY = torch.cat([first_BY.float()[:, None], engine_BTY], dim=1)
    whole = functools.partial(_whole, subject.model, whole_BT, new_tokens + 1)
    return _compared(subject, engine_BTY, whole, "its forward pass")


def _compared(
    subject: Subject, engine_BTY: Tensor, model_pass: Callable[[], Tensor], told: str
) -> Gate:
    """The engine's logits against the model's pass, which is taken in float32 as well."""
    forward_BTY = model_pass()
    if subject.model.dtype == torch.float32:
        return Gate(_distance(engine_BTY, forward_BTY), 0.0, told)
    with _widened(subject.model):
        truth_BTY = model_pass()
    engine, forward = (_distance(found, truth_BTY) for found in (engine_BTY, forward_BTY))
    return Gate(engine, forward, f"{told} in float32")


@torch.no_grad()
def _whole(model: Any, ids_BT: Tensor, last: int) -> Tensor:
    """Logits after each of the last tokens, of one pass without a cache."""
    found: Tensor = model(input_ids=ids_BT, use_cache=False, logits_to_keep=last).logits
    return found.float()


@torch.no_grad()
def _over_rows(model: Any, rows: SegmentedCache, ids_BT: Tensor) -> Tensor:
    """Logits after each token, of one pass that sees compressed rows before them."""
    cache = _in_format_of(model, rows)
    first, (batch, T) = cache.get_seq_length(), ids_BT.shape
    positions_T = torch.arange(first, first + T, device=ids_BT.device)
    tokens = Tokens(ids_BT, positions_T.expand(3, batch, -1))
    return logits(model, run(model, cache, tokens)).float()


def _in_format_of(model: Any, cache: SegmentedCache) -> SegmentedCache:
    """The same compressed rows, decoded to the model's number format; the fp8 stays as it is."""

    def cast(segment: Segment) -> Segment:
        latent, rope, scale = segment.tensors
        return replace(segment, tensors=(latent, rope.to(model.dtype), scale))

    layers = (cache.segmented(index) for index in range(len(cache.layers)))
    return cache.of_layers(SegmentedLayer(tuple(map(cast, one.segments()))) for one in layers)


def _distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


@contextlib.contextmanager
def _widened(model: Any) -> Iterator[None]:
    """The model in float32 for a moment; the way back loses nothing."""
    narrow = {p: p.dtype for p in model.parameters()}
    for p in narrow:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, dtype in narrow.items():
            p.data = p.data.to(dtype)
