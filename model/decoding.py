"""Generation for a batch of contexts that share a prefix.

The shared segments of the rows' caches are read where they are; only what a row has of its own is
copied, once, into a batched tail. Rows may differ in length: each row's tail is contiguous, and
`Placement` says where a prompt is written. Prompts go through the model's layers, replies through
the engine.

Axes: B rows, T new tokens, X text model width, Y vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Any

import torch
from torch import Tensor

from internvideo3.model.cache import Placement, Segment, SegmentedCache, SegmentedLayer
from internvideo3.model.device import current
from internvideo3.model.engine import Engine
from internvideo3.model.engine import Reply as Continuation
from internvideo3.model.forward import Tokens, logits, run

ROUND = 4096
"""Most steps between two allocations: a tail gets room for so many tokens at once."""


LEAST_TEMPERATURE = 1e-6
"""Below it the likeliest token is drawn all but surely, and logits divided by it overflow."""


class StopReason(StrEnum):
    """Why a reply ended."""

    STOP = "stop"
    """A stop token."""
    LENGTH = "length"
    """`max_new_tokens` was reached."""


@dataclass(frozen=True)
class Limits:
    """When a reply ends and how its tokens are chosen."""

    max_new_tokens: int
    stop_ids: Sequence[int] | None = None
    """Token ids that end the reply; None: the model's own end-of-turn ids."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    seed: int = 0
    """Seed of this reply's draws, if the temperature is not 0."""
    barred_ids: Sequence[int] = ()
    """Token ids that are never chosen."""

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: no token is allowed, the temperature or the seed is none that draws can
                be made with, or an id to be barred is negative.
        """
        if self.max_new_tokens < 1 or not (
            self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < inf
        ):
            raise ValueError(
                f"max_new_tokens must be at least 1, and temperature 0 (always the likeliest) or "
                f"at least {LEAST_TEMPERATURE}, not {self.max_new_tokens} and {self.temperature}."
            )
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"the seed {self.seed} is not of 64 bits; take a smaller one.")
        if min(self.barred_ids, default=0) < 0:
            raise ValueError(f"barred_ids holds {min(self.barred_ids)}, and ids begin at 0.")

    def check_vocabulary(self, size: int) -> None:
        """Whether the barred ids are of a vocabulary of this size, and leave something to say.

        Raises:
            ValueError: they are not, or do not.
        """
        barred = set(self.barred_ids)
        if max(barred, default=0) >= size:
            raise ValueError(f"barred_ids holds {max(barred)}; the vocabulary ends at {size - 1}.")
        if len(barred) == size:
            raise ValueError("every token of the vocabulary is barred; leave one that can be said.")


@dataclass
class Row:
    """A context to be continued."""

    cache: SegmentedCache
    """May be used up: continue with `Continued.cache`."""
    pending: list[int]
    """Text tokens that are not cached yet."""
    position: int
    """Position of the first of them."""
    logits_Y: Tensor | None
    """After the last cached token; needed if nothing is pending."""
    limits: Limits


@dataclass
class Continued:
    """A context with its reply. The last token of the reply is not cached."""

    cache: SegmentedCache
    position: int
    """Position of the first token that is not cached."""
    token_ids: list[int]
    logps: tuple[float, ...] | None
    """Of each token, where the reply is drawn: at its temperature, barred ids aside."""
    stop_reason: StopReason
    prefill_s: float
    """This row's share of the seconds that the batch's prompts took."""
    decode_s: float
    """This row's share of the seconds after that."""


@torch.no_grad()
def generate(
    model: Any, rows: Sequence[Row], stop_ids: Sequence[int], chunk: int
) -> list[Continued]:
    """Continues all rows together; equal to continuing each alone.

    Args:
        model: a Qwen3-VL for conditional generation, GQA or M²LA.
        rows: the contexts.
        stop_ids: ends replies whose limits name no stop ids.
        chunk: most tokens of a row prefilled at once.

    Raises:
        ValueError: an id to be barred is not in the vocabulary, or all of it is barred.
    """
    for row in rows:
        row.limits.check_vocabulary(model.config.text_config.vocab_size)
    with current(model.device):
        return _generated(model, rows, stop_ids, chunk)


def _generated(
    model: Any, rows: Sequence[Row], stop_ids: Sequence[int], chunk: int
) -> list[Continued]:
    started = time.perf_counter()
    batch = _Batch(model, rows)
    scores_BY = batch.prefill([row.pending for row in rows], chunk)
    wait_for(model.device)
    prefilled = time.perf_counter()
    stops = [
        tuple(stop_ids if row.limits.stop_ids is None else row.limits.stop_ids) for row in rows
    ]
    engine = Engine(model, batch.continuations([row.limits for row in rows], stops), scores_BY)
    left = max(row.limits.max_new_tokens for row in rows) - 1
    while left > 0 and not engine.ended:
        steps = min(left, ROUND)
        batch.make_room(steps)
        engine.length_B.copy_(torch.tensor(batch.lengths))
        engine.bind(batch.cache)
        engine.run(steps)
        batch.advance([len(ids) for ids in engine.said()])
        left -= steps
    said = engine.said()
    done = time.perf_counter()
    return [
        Continued(
            cache,
            position,
            ids,
            logps,
            StopReason.STOP if ids[-1] in stop else StopReason.LENGTH,
            (prefilled - started) / len(rows),
            (done - prefilled) / len(rows),
        )
        for cache, position, ids, logps, stop in zip(
            batch.split(), batch.positions, said, engine.logps(), stops, strict=True
        )
    ]


def wait_for(device: torch.device) -> None:
    """Lets queued work finish, so that a clock read next counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Batch:
    """Caches of the rows as one, and where each row stands."""

    def __init__(self, model: Any, rows: Sequence[Row]) -> None:
        self.model = model
        self.positions = [row.position for row in rows]
        self._known = [row.logits_Y for row in rows]
        self._replied = [0] * len(rows)
        self._alone = len(rows) == 1
        if self._alone:
            self.cache = rows[0].cache
            self.lengths = [_tail_length(self.cache)]
            return
        room = max(len(r.pending) + min(r.limits.max_new_tokens, ROUND) for r in rows)
        self.cache, self.lengths = _join([row.cache for row in rows], room)

    def prefill(self, pending: Sequence[Sequence[int]], chunk: int) -> Tensor:
        """Caches the pending tokens of every row; returns the next-token logits [B, Y]."""
        last: dict[int, Tensor] = {}
        for start in range(0, max(len(ids) for ids in pending), chunk):
            cut = [list(ids[start : start + chunk]) for ids in pending]
            hidden_BTX = self._run(cut)
            for row, ids in enumerate(cut):
                if ids and start + len(ids) == len(pending[row]):
                    last[row] = hidden_BTX[row, len(ids) - 1]
        found = list(self._known)
        if last:
            rows = sorted(last)
            fresh_BY = logits(self.model, torch.stack([last[row] for row in rows]))
            for row, scores_Y in zip(rows, fresh_BY, strict=True):
                found[row] = scores_Y
        assert all(scores is not None for scores in found), "a row has neither tokens nor logits"
        return torch.stack([scores for scores in found if scores is not None])

    def continuations(
        self, limits: Sequence[Limits], stops: Sequence[tuple[int, ...]]
    ) -> list[Continuation]:
        """What the engine needs to know of each row."""
        return [
            Continuation(
                position,
                length,
                one.max_new_tokens,
                stop,
                one.temperature,
                one.seed,
                one.barred_ids,
            )
            for position, length, one, stop in zip(
                self.positions, self.lengths, limits, stops, strict=True
            )
        ]

    def make_room(self, steps: int) -> None:
        """Allocates what `steps` steps will write; the last one may write behind its end."""
        for index in range(len(self.cache.layers)):
            self.cache.segmented(index).make_room(steps + 1, may_freeze=self._alone)
        if self._alone:
            self.lengths = [_tail_length(self.cache)]

    def advance(self, replied: Sequence[int]) -> None:
        """Accounts for the tokens that the engine cached: all of a reply but its last one."""
        for row, count in enumerate(replied):
            new = count - 1 - self._replied[row]
            self.positions[row] += new
            self.lengths[row] += new
            self._replied[row] += new
        for index in range(len(self.cache.layers)):
            self.cache.segmented(index).length = max(self.lengths)

    def _run(self, cut: Sequence[Sequence[int]]) -> Tensor:
        """Appends the given tokens of each row; returns hidden states [B, T, X]."""
        device, longest = self.model.device, max(len(ids) for ids in cut)
        # Shorter rows are filled up on the right. The filling is written behind the row's end,
        # where no query of the row looks and the next step writes again.
        ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in cut], device=device)
        first_B1 = torch.tensor(self.positions, device=device)[:, None]
        positions_BT = first_B1 + torch.arange(longest, device=device)
        placement = None if self._alone else Placement.of(self.lengths, longest, device)
        tokens = Tokens(ids_BT, positions_BT.expand(3, -1, -1))
        hidden_BTX = run(self.model, self.cache, tokens, placement)
        for row, ids in enumerate(cut):
            self.positions[row] += len(ids)
            self.lengths[row] += len(ids)
        return hidden_BTX

    def split(self) -> list[SegmentedCache]:
        """The rows' caches, each a view of the batch's storage."""
        if self._alone:
            return [self.cache]
        return [self.cache.row(row, length) for row, length in enumerate(self.lengths)]


def _join(caches: Sequence[SegmentedCache], room: int) -> tuple[SegmentedCache, list[int]]:
    """One cache over the tokens that all caches share, with a tail for what they do not.

    Args:
        caches: caches of one sequence each.
        room: tokens to leave free in the tail.

    Returns:
        The joined cache, and the tail length of each row.
    """
    # Layers differ in what they share where one of the caches was compressed half way.
    shared = min(
        _shared_tokens([cache.segmented(index).segments() for cache in caches])
        for index in range(len(caches[0].layers))
    )
    own = [cache.get_seq_length() - shared for cache in caches]
    layers = [
        _join_layer([cache.segmented(index) for cache in caches], shared, max(own) + room)
        for index in range(len(caches[0].layers))
    ]
    return caches[0].of_layers(layers), own


def _tail_length(cache: SegmentedCache) -> int:
    """Tokens in the tail: a step writes at the same place in every layer."""
    lengths = {cache.segmented(index).length for index in range(len(cache.layers))}
    assert len(lengths) == 1, f"layers have tails of {sorted(lengths)} tokens"
    return lengths.pop()


def _join_layer(layers: Sequence[SegmentedLayer], shared: int, capacity: int) -> SegmentedLayer:
    joined = SegmentedLayer(_cut(layers[0].segments(), 0, shared))
    rests = [_cut(layer.segments(), shared, layer.get_seq_length()) for layer in layers]
    cached = [segment for layer in layers for segment in layer.segments()]
    if not cached:
        return joined
    like = tuple(t[:1].expand(len(layers), -1, -1, -1) for t in cached[0].like())
    joined.reserve(like, capacity)
    joined.length = max(sum(segment.length for segment in rest) for rest in rests)
    for row, rest in enumerate(rests):
        start = 0
        for segment in rest:
            for storage, value in zip(joined.tail, segment.whole(), strict=True):
                storage[row, :, start : start + segment.length] = value[0]
            start += segment.length
    return joined


def _shared_tokens(chains: Sequence[Sequence[Segment]]) -> int:
    """How many leading tokens are one and the same in all chains.

    Of a run that a session has gone on writing behind its fork, the fork's tokens.
    """
    count = 0
    for same in zip(*chains, strict=False):
        if any(s.tensors[0] is not same[0].tensors[0] for s in same):
            break
        least = min(s.length for s in same)
        count += least
        if any(s.length != least for s in same):
            break
    return count


def _cut(chain: Sequence[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """The tokens from `start` to `stop` of a chain, as views; whole runs as they are."""
    made, before = [], 0
    for segment in chain:
        first, last = max(0, start - before), min(segment.length, stop - before)
        if first == 0 and last == segment.length:
            made.append(segment)
        elif first < last:
            tensors = tuple(t[:, :, first:] for t in segment.tensors) if first else segment.tensors
            made.append(Segment(tensors, last - first, segment.nested))
        before += segment.length
    return tuple(made)
