"""A step's attention at a point's own depth, against float32: what the gate is too short to see.

The gate compares logits over a thousand tokens; points have up to millions, and in bfloat16 and
over 36 layers a few hidden rows are lost in what its limit allows. So before a point is timed the
engine takes one step on the point's own cache, and in the first and the last layer the very call
that attends is asked further queries: of the newest rows, the token's own included, of rows all
over the depth, and flat ones that see all rows alike. Float32 says what is right, over stretches of
the rows that the cache says are there, merged by log-sum-exp.

Axes: B sequences, b = B or 1, H query heads, K stored heads, G query heads of one, N cached tokens,
M some of them, W width of a key, V width of a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from internvideo3.harness.profile.runners import state_kept
from internvideo3.model import engine_layers
from internvideo3.model.attention import RowAttention
from internvideo3.model.cache import SegmentedCache
from internvideo3.model.engine import Engine
from internvideo3.model.prerope import PreropeAttention

CALLS = ("latent_decode", "gqa_decode")
"""What an engine's layers attend by; each calls one of them once a step."""
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Largest distance of a head's output: in float32 sums of another order, else rounding; kernels are
within 8e-3 over all heads. A head whose row is hidden is off by more than a half."""
NEWEST = 8
"""Rows that are looked at one by one at the end."""
SAMPLE = 64
"""Rows from which the size of queries is chosen."""
FLAT_SPREAD = 2.0
"""Standard deviation of the scores of a query that looks at nothing in particular."""
SCRATCH_BYTES = 160 * 2**20
COPIES = 4
"""Of a stretch, in float32, that are there at once."""


class DepthError(Exception):
    """A point whose step is not right at its depth."""


@dataclass(frozen=True)
class Depth:
    """How far the worst head's output is from float32: norm of the difference over its norm."""

    error: float
    limit: float
    tokens: int
    """That a sequence saw, its own newest included."""

    @property
    def is_green(self) -> bool:
        """Whether what is timed is right."""
        return self.error <= self.limit

    def __str__(self) -> str:
        return (
            f"attention over {self.tokens} tokens is {self.error:.1e} from float32, at most "
            f"{self.limit:.0e} is right"
        )


@dataclass(frozen=True)
class _Cached:
    """The rows of one layer that its next step has to see."""

    attn: Any
    runs: Sequence[tuple[tuple[Tensor, ...], int]]
    """Storage, each [b, K, capacity, any], and how many of its tokens count."""

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(length for _, length in self.runs)

    @property
    def scale(self) -> float:
        """Factor on scores."""
        return float(getattr(self.attn, "scaling", None) or self.attn.scale)

    def pair(self, tensors: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys [b, K, M, W] and values [b, K, M, V] of some tokens of a run, in float32."""
        cut = [tensor[:, :, start:stop] for tensor in tensors]
        if isinstance(self.attn, PreropeAttention):
            keys, values = self.attn.rotated(cut[0], cut[1])
            return keys.float(), values.float()
        if isinstance(self.attn, RowAttention):
            rows = cut[0].float()
            if len(cut) > 1:  # in fp8: latents, rotary keys, scales
                rows = torch.cat([rows.mul_(cut[2].float()), cut[1].float()], dim=-1)
            return rows, rows[..., : self.attn.rank]
        return cut[0].float(), cut[1].float()

    def stretches(self, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of so many tokens at a time."""
        for tensors, length in self.runs:
            for start in range(0, length, tokens):
                yield self.pair(tensors, start, min(start + tokens, length))

    def keys(self, places: Sequence[int]) -> Tensor:
        """Keys [b, K, M, W] of tokens at these places."""
        return torch.cat([self._key(place) for place in places], dim=2)

    def _key(self, place: int) -> Tensor:
        for tensors, length in self.runs:
            if place < length:
                return self.pair(tensors, place, place + 1)[0]
            place -= length
        raise IndexError(f"no token {place} beyond the last")


def check_depth(engine: Engine, cache: SegmentedCache) -> Depth:
    """Let the engine take one step, and ask its attention; its state is put back afterwards.

    Raises:
        RuntimeError: the step did not attend once in each layer, so that nothing can be said.
    """
    layers = engine.model.model.language_model.layers
    first = cache.segmented(0)
    asked = {
        index: _Cached(layers[index].self_attn, _runs(cache, index, first))
        for index in {0, len(layers) - 1}
    }
    questions = _Questions(asked)
    with state_kept(engine), _asking(questions):
        engine.step()
    if questions.calls != len(layers):
        raise RuntimeError(f"{questions.calls} layers attended, there are {len(layers)}")
    dtype = engine.model.dtype
    return Depth(max(questions.errors), LIMITS[dtype], asked[0].tokens)


def _runs(cache: SegmentedCache, index: int, first: Any) -> list[tuple[tuple[Tensor, ...], int]]:
    """What a layer will hold after the step: its frozen runs, and its tail with the new token."""
    layer = cache.segmented(index)
    found = [(one.tensors, one.length) for one in layer.frozen]
    found.append((layer.tail, layer.length + 1))
    if len(layer.tail) == 1 and len(first.tail) > 1:
        # Rows before rotation: the angles of all tokens are in the first layer.
        turns = [*(one.tensors[1] for one in first.frozen), first.tail[1]]
        return [((rows[0], turn), length) for (rows, length), turn in
                zip(found, turns, strict=True)]  # fmt: skip
    return found


@dataclass
class _Questions:
    """Stands in for the calls by which layers attend."""

    asked: dict[int, _Cached]
    calls: int = 0
    errors: list[float] = field(default_factory=list)

    def attend(
        self, call: Callable[..., tuple[Tensor, Tensor]], q_BHW: Tensor, runs: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The step's own call; and the same with other queries, held to float32."""
        answer = call(q_BHW, runs, **options)
        cached = self.asked.get(self.calls)
        self.calls += 1
        if cached is not None:
            mine_BHW = _queries(q_BHW, cached, seed=self.calls)
            found_BHV, _ = call(mine_BHW, runs, **options)
            self.errors.append(_distance(found_BHV, _truth(mine_BHW, cached)))
        return answer


@contextmanager
def _asking(questions: _Questions) -> Iterator[None]:
    """While the engine takes a step.

    The names in `engine_layers` are exchanged, since only there is a call seen with the runs and
    lengths that the step itself gives it.
    """
    with ExitStack() as held:
        for name in CALLS:
            held.enter_context(_exchanged(name, questions))
        yield


@contextmanager
def _exchanged(name: str, questions: _Questions) -> Iterator[None]:
    right = getattr(engine_layers, name)

    def attend(q_BHW: Tensor, runs: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return questions.attend(right, q_BHW, runs, **options)

    setattr(engine_layers, name, attend)
    try:
        yield
    finally:
        setattr(engine_layers, name, right)


def _queries(like_BHW: Tensor, cached: _Cached, seed: int) -> Tensor:
    """Queries of three kinds, head by head: of a newest row, of one anywhere, of all alike."""
    N, scale = cached.tokens, cached.scale
    sample_bKMW = cached.keys(sorted({round(x) for x in _evenly(min(N, SAMPLE), 0, N - 1)}))
    mean_bK1W = sample_bKMW.mean(2, keepdim=True)
    B, H, _ = like_BHW.shape
    group = H // sample_bKMW.shape[1]
    kinds = [(head + head // group) % 3 for head in range(H)]
    newest, spread = (_numbered(kinds, kind) for kind in (0, 1))
    places = {head: N - 1 - n % min(N, NEWEST) for head, n in newest.items()}
    places |= {head: int((n + 0.5) / len(spread) * N) for head, n in spread.items()}
    drawn = torch.Generator(like_BHW.device).manual_seed(seed)
    found = []
    for head in range(H):
        stored = slice(head // group, head // group + 1)
        others_bMW = (sample_bKMW - mean_bK1W)[:, stored].squeeze(1)
        if head in places:
            toward_bW = (cached.keys([places[head]]) - mean_bK1W)[:, stored].flatten(1)
            size_b = _size(toward_bW, others_bMW, scale, math.log(N) + 1)
        else:
            toward_bW = torch.randn(B, like_BHW.shape[2], generator=drawn, device=like_BHW.device)
            size_b = FLAT_SPREAD / _scores(toward_bW, others_bMW, scale).std(1, correction=0)
        wanted_bW = toward_bW * size_b.nan_to_num(1.0, 1.0, 1.0)[:, None]
        found.append(wanted_bW.expand(B, -1))
    return torch.stack(found, dim=1).to(like_BHW.dtype)


def _evenly(count: int, low: float, high: float) -> list[float]:
    return [low + (high - low) * index / max(1, count - 1) for index in range(count)]


def _numbered(kinds: Sequence[int], kind: int) -> dict[int, int]:
    """Heads of a kind, numbered."""
    heads = [head for head, its in enumerate(kinds) if its == kind]
    return {head: number for number, head in enumerate(heads)}


def _scores(toward_bW: Tensor, others_bMW: Tensor, scale: float) -> Tensor:
    return torch.einsum("bw,bmw->bm", toward_bW, others_bMW) * scale


def _size(toward_bW: Tensor, others_bMW: Tensor, scale: float, lead: float) -> Tensor:
    """How long a query has to be to give its row e times the weight of all others together.

    The row's score grows with the length m as m g, what the others weigh together as their number
    times exp(m² σ² / 2); where no length is enough the best one is taken.
    """
    gain_b = toward_bW.square().sum(1) * scale
    spread_b = _scores(toward_bW, others_bMW, scale).var(1, correction=0)
    left_b = gain_b.square() - 2 * spread_b * lead
    return torch.where(
        left_b > 0, 2 * lead / (gain_b + left_b.clamp_min(0).sqrt()), gain_b / spread_b
    )


def _truth(q_BHW: Tensor, cached: _Cached) -> Tensor:
    """Attention in float32, [B, H, V], stretch by stretch."""
    sample_bK1W = cached.keys([0])
    K = sample_bK1W.shape[1]
    q_BKGW = q_BHW.float().unflatten(1, (K, -1)) * cached.scale
    numbers = sample_bK1W.numel() * COPIES
    found: tuple[Tensor, Tensor] | None = None
    for keys_bKMW, values_bKMV in cached.stretches(max(1, SCRATCH_BYTES // (4 * numbers))):
        scores_BKGM = q_BKGW @ keys_bKMW.mT
        lse_BKG = scores_BKGM.logsumexp(-1)
        out_BKGV = (scores_BKGM - lse_BKG[..., None]).exp() @ values_bKMV
        found = (out_BKGV, lse_BKG) if found is None else _merged(found, (out_BKGV, lse_BKG))
    assert found is not None, "a step sees its own token"
    return found[0].flatten(1, 2)


def _merged(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two outputs [B, K, G, V] as one, by their log-sum-exp [B, K, G]."""
    lse = torch.logaddexp(a[1], b[1])
    of_a, of_b = ((one[1] - lse).exp()[..., None] for one in (a, b))
    return a[0] * of_a + b[0] * of_b, lse


def _distance(found_BHV: Tensor, truth_BHV: Tensor) -> float:
    """Of the worst head; what is no number is infinitely far."""
    size_BH = truth_BHV.norm(dim=-1)
    apart_BH = (found_BHV.float() - truth_BHV).norm(dim=-1) / size_BH
    return float(apart_BH.nan_to_num(nan=math.inf, posinf=math.inf).max())
