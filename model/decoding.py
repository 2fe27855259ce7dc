"""Generation for a batch of contexts that share a prefix.

The shared segments of the rows' caches are read where they are; only what a row has of its own is
copied, once, into a batched tail. Rows may differ in length: each row's tail is contiguous, and
`Placement` says where a step writes.

Axes: B rows, T new tokens, X text model width, Y vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from internvideo3.model.cache import Placement, Segment, SegmentedCache, SegmentedLayer
from internvideo3.model.forward import Tokens, logits, run

SPARE_TOKENS = 256
"""Most room for new tokens that a batched tail gets at once; it grows if that is too little."""


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

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: no token is allowed, or the temperature is negative.
        """
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(
                f"max_new_tokens must be at least 1 and temperature at least 0, not "
                f"{self.max_new_tokens} and {self.temperature}."
            )


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
    """
    started = time.perf_counter()
    batch = _Batch(model, rows)
    scores_BY = batch.prefill([row.pending for row in rows], chunk)
    wait_for(model.device)
    prefilled = time.perf_counter()
    writers = [_Writer(row.limits, stop_ids) for row in rows]
    while True:
        for writer, scores_Y in zip(writers, scores_BY, strict=True):
            writer.write(scores_Y)
        if all(writer.stop_reason for writer in writers):
            break
        scores_BY = batch.step(
            [w.token_ids[-1] for w in writers],
            [w.stop_reason is None for w in writers],
        )
    done = time.perf_counter()
    return [
        Continued(
            cache,
            position,
            writer.token_ids,
            writer.stop_reason or StopReason.LENGTH,
            (prefilled - started) / len(rows),
            (done - prefilled) / len(rows),
        )
        for cache, position, writer in zip(batch.split(), batch.positions, writers, strict=True)
    ]


def wait_for(device: torch.device) -> None:
    """Lets queued work finish, so that a clock read next counts it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Writer:
    """One reply as it grows."""

    def __init__(self, limits: Limits, stop_ids: Sequence[int]) -> None:
        self.limits = limits
        self.stop_ids = frozenset(stop_ids if limits.stop_ids is None else limits.stop_ids)
        self.token_ids: list[int] = []
        self.stop_reason: StopReason | None = None
        self._generator = torch.Generator().manual_seed(limits.seed)

    def write(self, scores_Y: Tensor) -> None:
        """Chooses the next token, unless the reply has ended."""
        if self.stop_reason:
            return
        token = self._choose(scores_Y)
        self.token_ids.append(token)
        if token in self.stop_ids:
            self.stop_reason = StopReason.STOP
        elif len(self.token_ids) >= self.limits.max_new_tokens:
            self.stop_reason = StopReason.LENGTH

    def _choose(self, scores_Y: Tensor) -> int:
        if self.limits.temperature == 0:
            return int(scores_Y.argmax())
        probs_Y = (scores_Y.float().cpu() / self.limits.temperature).softmax(-1)
        return int(torch.multinomial(probs_Y, 1, generator=self._generator))


class _Batch:
    """Caches of the rows as one, and where each row stands."""

    def __init__(self, model: Any, rows: Sequence[Row]) -> None:
        self.model = model
        self.positions = [row.position for row in rows]
        self._known = [row.logits_Y for row in rows]
        self._alone = len(rows) == 1
        if self._alone:
            self.cache, self._lengths = rows[0].cache, [0]
            return
        room = max(len(r.pending) + min(r.limits.max_new_tokens, SPARE_TOKENS) for r in rows)
        self.cache, self._lengths = _join([row.cache for row in rows], room)

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

    def step(self, token_ids: Sequence[int], goes_on: Sequence[bool]) -> Tensor:
        """Caches one token of each row that goes on; returns logits [B, Y] (those rows' count)."""
        cut = [[token] if on else [] for token, on in zip(token_ids, goes_on, strict=True)]
        return logits(self.model, self._run(cut)[:, 0])

    def _run(self, cut: Sequence[Sequence[int]]) -> Tensor:
        """Appends the given tokens of each row; returns hidden states [B, T, X]."""
        device, longest = self.model.device, max(len(ids) for ids in cut)
        # Shorter rows are filled up on the right. The filling is written behind the row's end,
        # where no query of the row looks and the next step writes again.
        ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in cut], device=device)
        first_B1 = torch.tensor(self.positions, device=device)[:, None]
        positions_BT = first_B1 + torch.arange(longest, device=device)
        placement = None if self._alone else Placement.of(self._lengths, longest, device)
        tokens = Tokens(ids_BT, positions_BT.expand(3, -1, -1))
        hidden_BTX = run(self.model, self.cache, tokens, placement)
        for row, ids in enumerate(cut):
            self.positions[row] += len(ids)
            self._lengths[row] += len(ids)
        return hidden_BTX

    def split(self) -> list[SegmentedCache]:
        """The rows' caches, each a view of the batch's storage."""
        if self._alone:
            return [self.cache]
        return [self.cache.row(row, length) for row, length in enumerate(self._lengths)]


def _join(caches: Sequence[SegmentedCache], room: int) -> tuple[SegmentedCache, list[int]]:
    """One cache over the segments that all caches share, with a tail for what they do not.

    Args:
        caches: caches of one sequence each.
        room: tokens to leave free in the tail.

    Returns:
        The joined cache, and the tail length of each row.
    """
    shared = _shared_segments([cache.segmented(0).segments() for cache in caches])
    own = [sum(s.length for s in cache.segmented(0).segments()[shared:]) for cache in caches]
    layers = [
        _join_layer([cache.segmented(index) for cache in caches], shared, max(own) + room)
        for index in range(len(caches[0].layers))
    ]
    return caches[0].of_layers(layers), own


def _join_layer(layers: Sequence[SegmentedLayer], shared: int, capacity: int) -> SegmentedLayer:
    joined = SegmentedLayer(layers[0].segments()[:shared])
    rests = [layer.segments()[shared:] for layer in layers]
    cached = [segment for layer in layers for segment in layer.segments()]
    if not cached:
        return joined
    like = tuple(t[:1].expand(len(layers), -1, -1, -1) for t in cached[0].tensors)
    joined.reserve(like, capacity)
    joined.length = max(sum(segment.length for segment in rest) for rest in rests)
    for row, rest in enumerate(rests):
        start = 0
        for segment in rest:
            for storage, value in zip(joined.tail, segment.views(), strict=True):
                storage[row, :, start : start + segment.length] = value[0]
            start += segment.length
    return joined


def _shared_segments(chains: Sequence[Sequence[Segment]]) -> int:
    """How many leading segments are one and the same in all chains."""
    count = 0
    for same in zip(*chains, strict=False):
        if any(s.tensors[0] is not same[0].tensors[0] or s.length != same[0].length for s in same):
            break
        count += 1
    return count
