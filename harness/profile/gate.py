"""The profiler's gate: the engine's logits against a whole pass over the same tokens.

Each form in which a model is timed is held to it by itself: so many sequences, rows as they are or
in fp8; baselines of transformers on caches of their own, to the same limits. Without fp8 the truth
is the model's own forward pass, which has no cache. Rows in fp8 are rounded, which is no fault of
the engine; so there the truth is a pass of the model over the same rows, decoded and cached in
full, and these may be no further from the rows before than fp8 rounds. A thousand tokens are not
the depth that is timed: what a step does there is `depth`'s to see.

Axes: B sequences, T tokens, Y vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from internvideo3.harness.profile.plan import NEW_TOKENS, PIECES
from internvideo3.harness.profile.runners import (
    Clock,
    EngineRunner,
    TransformersRunner,
    make_runner,
    random_ids,
)
from internvideo3.harness.profile.subjects import Subject
from internvideo3.model.attention import LatentAttention
from internvideo3.model.cache import Segment, SegmentedCache, SegmentedLayer
from internvideo3.model.forward import Tokens, logits, run

EXACT = 1e-4
"""Largest distance in float32: sums of different order."""
SLACK = 1.5
FP8_ROUNDING = 2**-4 + 2**-8
"""Of a row: half a step of e4m3's three bits, and of the bfloat16 that it is decoded to."""


@dataclass(frozen=True, order=True)
class Form:
    """A form in which the engine is used, or a baseline."""

    batch: int = 1
    cache: str = "native"
    runner: str = "engine"
    room: int = 0
    """Tokens of a static cache, whose size the step is compiled for; 0: what the gate needs."""

    def __str__(self) -> str:
        if self.runner == "engine":
            return f"batch {self.batch}, {self.cache} cache"
        room = f", room for {self.room} tokens" if self.room else ""
        return f"{self.runner}, batch {self.batch}{room}"

    @property
    def scope(self) -> str:
        """What the gate has looked at, in words."""
        if self.runner == "engine":
            return f"the engine, {self}, {sum(PIECES) + NEW_TOKENS} tokens"
        return f"{self}, at most {sum(PIECES) + NEW_TOKENS} tokens"


@dataclass(frozen=True)
class Gate:
    """How far logits are from a reference: norm of the difference over the norm of it."""

    engine: float
    """Of the engine."""
    forward: float
    """Of the model's own pass in the same number format."""
    reference: str
    """Which passes serve as the truth."""
    rounding: float | None = None
    """How far the worst row in fp8 is from what it was; None: there are none."""

    @property
    def is_green(self) -> bool:
        """Whether the engine is right.

        Rounding to bfloat16 adds up over the layers, for the model's own pass as for the engine; so
        there the engine may be no further from float32 than `SLACK` times that.
        """
        limit = SLACK * self.forward if self.forward else EXACT
        return self.engine <= limit and (self.rounding or 0.0) <= FP8_ROUNDING


def gate(
    subject: Subject,
    form: Form = Form(),
    pieces: Sequence[int] = PIECES,
    new_tokens: int = NEW_TOKENS,
) -> Gate:
    """Compares the engine, prefilled in pieces and then token by token, with whole passes.

    Raises:
        MissingPackageError: the form is a baseline whose package is not installed.
    """
    if form.runner != "engine":
        return _baseline_gate(subject, form, sum(pieces), new_tokens)
    runner = EngineRunner(subject, form.batch, max(pieces), fp8=form.cache == "fp8")
    runner.keeps_logits = True
    in_full: list[SegmentedCache] = []
    runner.before_compressing = lambda cache: in_full.append(cache.fork())
    ids_BT = random_ids(subject, form.batch, sum(pieces))
    for cut_BT in ids_BT.split(list(pieces), dim=1):
        first_BY = runner.prefill(cut_BT, 0)
    rows = runner.cache.fork() if runner.fp8 else None
    said = runner.decode(first_BY, new_tokens, Clock(runner.device))
    said_BT = torch.tensor(said, device=runner.device)[:, :-1]
    engine_BTY = torch.stack(runner.logits, dim=1)
    engine_BTY = torch.cat([first_BY.float()[:, None], engine_BTY], dim=1)
    if rows is not None:
        over_rows = functools.partial(_over_rows, subject.model, rows, cut_BT, said_BT)
        found = _compared(subject, engine_BTY, over_rows, "a pass over the same fp8 rows")
        return replace(found, rounding=max(_rounding(one, rows) for one in in_full))
    whole_BT = torch.cat([ids_BT, said_BT], dim=1)
    whole = functools.partial(_whole, subject.model, whole_BT, new_tokens + 1)
    return _compared(subject, engine_BTY, whole, "its forward pass")


def _baseline_gate(subject: Subject, form: Form, tokens: int, new_tokens: int) -> Gate:
    """The same of a baseline: prefilled in two chunks, on a cache as large as the point's."""
    runner = make_runner(subject, form.runner, batch=form.batch, chunk=1)
    assert isinstance(runner, TransformersRunner)
    runner.keeps_logits, runner.room = True, form.room
    if form.room:
        tokens = max(1, min(tokens, form.room - runner.untimed - new_tokens - 1))
        new_tokens = min(new_tokens, form.room - runner.untimed - tokens - 1)
    runner.chunk = -(-tokens // 2)
    ids_BT = random_ids(subject, form.batch, tokens)
    first_BY = runner.prefill(ids_BT, new_tokens)
    runner.decode(first_BY, new_tokens, Clock(runner.device))
    assert runner.said_BT is not None, "decoded above"
    found_BTY = torch.stack([first_BY.float(), *runner.logits], dim=1)
    whole_BT = torch.cat([ids_BT, runner.said_BT[:, :-1]], dim=1)
    del runner
    # The truth is a pass by torch's attention, which takes float32 as well, whatever is timed.
    subject.model.set_attn_implementation("sdpa")
    whole = functools.partial(_whole, subject.model, whole_BT, found_BTY.shape[1])
    return _compared(subject, found_BTY, whole, "its forward pass")


def _compared(
    subject: Subject, engine_BTY: Tensor, model_pass: Callable[[torch.dtype], Tensor], told: str
) -> Gate:
    """The engine's logits against the model's pass, which is taken in float32 as well."""
    forward_BTY = model_pass(subject.model.dtype)
    if subject.model.dtype == torch.float32:
        return Gate(_distance(engine_BTY, forward_BTY), 0.0, told)
    with _widened(subject.model):
        truth_BTY = model_pass(torch.float32)
    engine, forward = (_distance(found, truth_BTY) for found in (engine_BTY, forward_BTY))
    return Gate(engine, forward, f"{told} in float32")


@torch.no_grad()
def _whole(model: Any, ids_BT: Tensor, last: int, dtype: torch.dtype) -> Tensor:
    """Logits after each of the last tokens, of a pass without a cache, sequence by sequence."""
    found = [
        model(input_ids=ids_1T, use_cache=False, logits_to_keep=last).logits
        for ids_1T in ids_BT.split(1)
    ]
    return torch.cat(found).float()


@torch.no_grad()
def _over_rows(
    model: Any, rows: SegmentedCache, piece_BT: Tensor, said_BT: Tensor, dtype: torch.dtype
) -> Tensor:
    """Logits after the last piece and after each token said, sequence by sequence.

    Args:
        model: it.
        rows: compressed ones of all pieces, a run each.
        piece_BT: the last piece, which saw the runs before its own.
        said_BT: what was decoded, which saw them all.
        dtype: number format that the rows are decoded to.
    """
    found = []
    for index in range(len(piece_BT)):
        before, whole = (_in_full(rows, index, stop, dtype) for stop in (-1, None))
        after_piece_1TX = _hidden(model, before, piece_BT[index : index + 1])
        after_said_1TX = _hidden(model, whole, said_BT[index : index + 1])
        found.append(logits(model, torch.cat([after_piece_1TX[:, -1:], after_said_1TX], dim=1)))
    return torch.cat(found).float()


def _hidden(model: Any, cache: SegmentedCache, ids_1T: Tensor) -> Tensor:
    """Final hidden states of tokens that follow what is cached."""
    first = cache.get_seq_length()
    positions_T = torch.arange(first, first + ids_1T.shape[1], device=ids_1T.device)
    return run(model, cache, Tokens(ids_1T, positions_T.expand(3, 1, -1)))


def _in_full(
    cache: SegmentedCache, index: int, stop: int | None, dtype: torch.dtype
) -> SegmentedCache:
    """One sequence's compressed rows, decoded to a number format; of the runs up to `stop`."""

    def decoded(segment: Segment) -> Segment:
        latent, rope, scale = (t[index : index + 1] for t in segment.tensors)
        rows = replace(segment, tensors=(latent, rope.to(dtype), scale))
        return replace(segment, tensors=rows.views())

    layers = (cache.segmented(number) for number in range(len(cache.layers)))
    return cache.of_layers(
        SegmentedLayer(tuple(map(decoded, layer.segments()[:stop]))) for layer in layers
    )


def _distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def _rounding(before: SegmentedCache, after: SegmentedCache) -> float:
    """How far the worst row that one cache holds in full is from what the other holds in fp8.

    Norm of the difference over the norm of the latent; the rotary key is no other.
    """
    worst = 0.0
    for index in range(len(after.layers)):
        # What came after this moment is in the second one only.
        chains = (cache.segmented(index).segments() for cache in (before, after))
        for full, compressed in zip(*chains, strict=False):
            if full.compressed:
                continue
            (was_b1NW,), (is_b1NW,) = full.views(), compressed.views()
            rank = compressed.tensors[0].shape[3]
            if not torch.equal(was_b1NW[..., rank:], is_b1NW[..., rank:]):
                return float("inf")
            was_b1NR, is_b1NR = (t[..., :rank].float() for t in (was_b1NW, is_b1NW))
            size = was_b1NR.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
            found = ((is_b1NR - was_b1NR).norm(dim=-1) / size).nan_to_num(nan=float("inf")).max()
            worst = max(worst, float(found))
    return worst


@contextlib.contextmanager
def _widened(model: Any) -> Iterator[None]:
    """The text model computes in float32 for a moment; its weights do so one part at a time.

    All of them in float32 would take three times the memory that the model is timed in.
    """
    text = model.model.language_model
    with contextlib.ExitStack() as held:
        wide = text.embed_tokens.register_forward_hook(lambda _, __, out: out.float())
        held.callback(wide.remove)
        for part in (*text.layers, text.norm, model.lm_head):
            held.enter_context(_wide_while_it_runs(part))
        for layer in text.layers:
            if isinstance(layer.self_attn, LatentAttention):
                held.callback(layer.self_attn.forget_folded)
        yield


@contextlib.contextmanager
def _wide_while_it_runs(part: nn.Module) -> Iterator[None]:
    running = contextlib.ExitStack()

    def begin(*_: Any) -> None:
        running.enter_context(_in_float32(list(part.parameters())))

    def end(*_: Any) -> None:
        running.close()

    hooks = (
        part.register_forward_pre_hook(begin),
        part.register_forward_hook(end, always_call=True),
    )
    try:
        yield
    finally:
        running.close()
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _in_float32(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    narrow = [(p, p.data) for p in parameters]
    try:
        for p, data in narrow:
            p.data = data.float()
        yield
    finally:
        for p, data in narrow:
            p.data = data
