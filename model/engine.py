"""The decode loop: a static step that chooses its own tokens, captured in a CUDA graph.

`Engine` continues a batch of contexts that are cached already. All of its state (last token,
position, tail length, which sequences go on, the tokens chosen) lives in tensors on the device and
is updated in place by `step`; the host only looks now and then whether all have ended. On CUDA the
step is captured once for each batch and replayed; on a CPU the same function runs eagerly. GQA
and M²LA differ in `engine_layers` alone.

Axes: B sequences, N tokens of a reply, X model width, Y vocabulary, Z stop ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from internvideo3.kernels.decode_linear.dispatch import decode_linear
from internvideo3.model.cache import SegmentedCache
from internvideo3.model.engine_layers import Where, bind, check_plain

LOOK_EVERY = {"cpu": 1, "cuda": 16}
"""Steps between two looks at whether all replies have ended, by device: each look waits for it,
and on a CPU there is nothing to wait for."""

EAGER_STEPS = 3
"""Steps before a capture: they compile the kernels."""

CAPTURE_FROM = 24
"""Fewer steps than this are not worth a capture."""


@dataclass(frozen=True)
class Reply:
    """How one sequence is to be continued."""

    position: int
    """Rotary position of the first new token."""
    length: int
    """Tokens in the sequence's tail."""
    max_new_tokens: int
    stop_ids: Sequence[int]
    temperature: float
    seed: int
    barred_ids: Sequence[int] = ()
    """Tokens that are never chosen."""


@cache
def _capturing(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures on a card.

    Without one of its own, a capture would use one made for all cards, which makes the card of the
    process's first capture the current one. With a new one each time, each would leave a workspace
    of cuBLAS behind.
    """
    return torch.cuda.Stream(device)


class Engine:
    """Continues a batch of cached contexts, token by token.

    Args:
        model: a Qwen3-VL for conditional generation, GQA or M²LA.
        replies: one for each sequence.
        logits_BY: next-token logits after the cached tokens.
    """

    def __init__(self, model: Any, replies: Sequence[Reply], logits_BY: Tensor) -> None:
        self.model = model
        self.device = logits_BY.device

        def on_device(values: Sequence[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        most, stops = max(r.max_new_tokens for r in replies), max(len(r.stop_ids) for r in replies)
        padded = [[*r.stop_ids, *[-1] * (stops - len(r.stop_ids))] for r in replies]
        self.stop_BZ = on_device(padded, torch.int64).view(len(replies), stops)
        self.limit_B = on_device([r.max_new_tokens for r in replies], torch.int64)
        self.position_B = on_device([r.position for r in replies], torch.int64)
        self.length_B = on_device([r.length for r in replies], torch.int64)
        self.drawn_B = on_device([r.temperature > 0 for r in replies], torch.bool)
        # Of a reply that is not drawn, 1: its odds are computed and not looked at.
        self.temperature_B1 = on_device([[r.temperature or 1.0] for r in replies], torch.float32)
        self.token_B = torch.zeros_like(self.limit_B)
        self.count_B = torch.zeros_like(self.limit_B)
        self.goes_on_B = torch.ones_like(self.limit_B, dtype=torch.bool)
        self.said_BN = torch.zeros(len(replies), most, dtype=torch.int64, device=self.device)
        self.logp_BN = torch.zeros_like(self.said_BN, dtype=torch.float32)
        """Of each token that was drawn, under the odds that it was drawn by."""
        self.generators = [
            torch.Generator(self.device).manual_seed(r.seed) if r.temperature else None
            for r in replies
        ]
        self.barred_BY = _barred(replies, logits_BY)
        self.logits_BY = logits_BY
        """What the last token was chosen from; a replay overwrites it."""
        self.choose(logits_BY)

    @property
    def ended(self) -> bool:
        """Whether all replies have ended; waits for the device."""
        return not bool(self.goes_on_B.any())

    def said(self) -> list[list[int]]:
        """Tokens of each reply so far, the stop token included."""
        counts = self.count_B.tolist()
        return [row[:count] for row, count in zip(self.said_BN.tolist(), counts, strict=True)]

    def logps(self) -> list[tuple[float, ...] | None]:
        """Log-probabilities of each reply's tokens; None for one that is not drawn."""
        counts = self.count_B.tolist()
        return [
            tuple(row[:count]) if generator is not None else None
            for row, count, generator in zip(
                self.logp_BN.tolist(), counts, self.generators, strict=True
            )
        ]

    def bind(self, cache: SegmentedCache) -> None:
        """Decodes on this cache from now on; its tails need room for the steps to come."""
        check_plain(self.model)
        layers = self.model.model.language_model.layers
        first = cache.segmented(0)
        self._layers = [bind(m, cache.segmented(i), first) for i, m in enumerate(layers)]
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, steps: int) -> None:
        """Takes at most so many steps; fewer if all replies end before."""
        look = LOOK_EVERY.get(self.device.type, 1)
        for taken in range(steps):
            if taken % look == 0 and self.ended:
                return
            if taken == EAGER_STEPS and steps >= CAPTURE_FROM:
                self.capture()
            self.advance()

    def advance(self) -> None:
        """One step: a replay of the captured graph where there is one."""
        # The engine keeps no method of its own: such a cycle would keep the cache alive.
        if self._graph is None:
            self.step()
        else:
            self._graph.replay()

    @property
    def capturable(self) -> bool:
        """Whether a step reads nothing on the host, and there is a device to capture it on."""
        return self.device.type == "cuda" and all(layer.attend.static for layer in self._layers)

    def capture(self) -> None:
        """Makes `advance` replay a CUDA graph of one step, if it can be captured.

        Capturing executes nothing. The kernels must have been compiled: take `EAGER_STEPS` before.
        """
        if not self.capturable:
            return
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            if generator is not None:
                graph.register_generator_state(generator)
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph, stream=_capturing(self.device)):
            self.step()
        self._graph = graph

    def bytes_read(self) -> int:
        """Bytes of weights that one step reads, whatever the batch; without the embedding row."""
        text = self.model.model.language_model
        tensors: list[Tensor] = [self.model.lm_head.weight, text.norm.weight]
        return sum(t.nbytes for t in tensors) + sum(layer.bytes_read() for layer in self._layers)

    @torch.no_grad()
    def step(self) -> None:
        """Caches the last token of each sequence that goes on and chooses the next one."""
        text = self.model.model.language_model
        x_BX = text.embed_tokens(self.token_B)
        cos_B1D, sin_B1D = text.rotary_emb(x_BX[:, None], self.position_B[None, :, None])
        # Both halves of the head turn by the same angles.
        cos_BF, sin_BF = (t[:, 0].chunk(2, dim=-1)[0].contiguous() for t in (cos_B1D, sin_B1D))
        where = Where(self.length_B, (self.length_B + 1).to(torch.int32), cos_BF, sin_BF)
        for layer in self._layers:
            x_BX = layer(x_BX, where)
        # A sequence that has ended writes behind its end, again and again at the same place.
        self.length_B += self.goes_on_B
        self.position_B += self.goes_on_B
        self.logits_BY = decode_linear(
            x_BX,
            self.model.lm_head.weight,
            norm_weight_K=text.norm.weight,
            eps=text.norm.variance_epsilon,
        )
        self.choose(self.logits_BY)

    def choose(self, logits_BY: Tensor) -> None:
        """Appends each reply's next token, unless the reply has ended."""
        goes_on_B, count_B = self.goes_on_B, self.count_B
        if self.barred_BY is not None:
            logits_BY = logits_BY.masked_fill(self.barred_BY, -torch.inf)
        picked_B, logp_B = self._pick(logits_BY)
        self.token_B.copy_(torch.where(goes_on_B, picked_B, self.token_B))
        place_B1 = count_B.clamp_max(self.said_BN.shape[1] - 1)[:, None]
        self._note(self.said_BN, place_B1, self.token_B)
        if logp_B is not None:
            self._note(self.logp_BN, place_B1, logp_B)
        count_B += goes_on_B
        stops_B = (self.token_B[:, None] == self.stop_BZ).any(1)
        goes_on_B &= ~stops_B & (count_B < self.limit_B)

    def _note(self, notes_BN: Tensor, place_B1: Tensor, value_B: Tensor) -> None:
        """Writes what belongs to the new token, unless the reply has ended."""
        kept_B1 = notes_BN.gather(1, place_B1)
        notes_BN.scatter_(
            1, place_B1, torch.where(self.goes_on_B[:, None], value_B[:, None], kept_B1)
        )

    def _pick(self, logits_BY: Tensor) -> tuple[Tensor, Tensor | None]:
        """The likeliest token of each row, or one drawn at its temperature.

        A draw divides every probability by exponential noise and takes the largest ratio, which
        is the index with that probability; each row has a generator of its own, so that it draws
        the same alone and in a batch.

        Returns:
            Tokens `[B]`, and the log-probabilities of those that are drawn if any is.
        """
        likeliest_B = logits_BY.argmax(-1)
        if not any(self.generators):
            return likeliest_B, None
        logp_BY = (logits_BY.float() / self.temperature_B1).log_softmax(-1)
        noise_BY = torch.ones_like(logp_BY)
        for noise_Y, generator in zip(noise_BY, self.generators, strict=True):
            if generator is not None:
                noise_Y.exponential_(generator=generator)
        likely_B = logp_BY.exp().div_(noise_BY.clamp_min_(1e-30)).argmax(-1)
        picked_B = torch.where(self.drawn_B, likely_B, likeliest_B)
        return picked_B, logp_BY.gather(1, picked_B[:, None])[:, 0]


def _barred(replies: Sequence[Reply], logits_BY: Tensor) -> Tensor | None:
    """Where a token is never chosen; nothing if all may be."""
    if not any(reply.barred_ids for reply in replies):
        return None
    barred_BY = torch.zeros_like(logits_BY, dtype=torch.bool)
    for row, reply in enumerate(replies):
        barred_BY[row, list(reply.barred_ids)] = True
    return barred_BY
