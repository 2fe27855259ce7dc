"""How a point is run: by our engine, or by transformers' own caches as the baselines.

Axes: B sequences, T tokens, K stored heads, N cached tokens, W row width, Y vocabulary.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from internvideo3.harness.profile.subjects import Subject
from internvideo3.harness.profile.workload import Point, WorkloadError
from internvideo3.model.cache import LatentCache, SegmentedCache, allocated_bytes
from internvideo3.model.engine import EAGER_STEPS, Engine, Reply
from internvideo3.model.forward import Tokens, logits, new_cache, run
from internvideo3.model.session import CHUNK

UNTIMED_STEPS = 3
"""Of transformers' baselines on a GPU: torch.compile works, and captures, in the first ones."""


def untimed_steps(device: torch.device) -> int:
    """Steps that a baseline takes before those that are timed."""
    return UNTIMED_STEPS if device.type == "cuda" else 0


def static_room(point: Point, device: torch.device) -> int:
    """Tokens that a point's static cache has room for."""
    return point.depth + point.new_tokens + untimed_steps(device) + 1


class Clock:
    """Moments on the device: CUDA events, or the processor's clock.

    Args:
        device: whose work is timed.
        counter: read at the first stamp, when all work before it is done, and at the end, when all
            is; say, of energy.
    """

    def __init__(
        self, device: torch.device, counter: Callable[[], float | None] = lambda: None
    ) -> None:
        self.on_gpu = device.type == "cuda"
        self.moments: list[Any] = []
        self.counted: list[float | None] = []
        """What the counter read, and"""
        self.counted_at: list[float] = []
        """when, in seconds."""
        self._counter = counter

    def stamp(self) -> None:
        """Notes this moment in the device's order of work; only at the first the host waits."""
        if not self.moments:
            self._count()
        if not self.on_gpu:
            self.moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.moments.append(event)

    def _count(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        self.counted.append(self._counter())
        self.counted_at.append(time.perf_counter())

    def counted_in_all(self) -> tuple[float | None, float]:
        """What the counter went up by since the first stamp, and in how many seconds.

        Waits for the device.
        """
        self._count()
        (before, *_, after), (began, *_, ended) = self.counted, self.counted_at
        return None if before is None or after is None else after - before, ended - began

    def seconds(self) -> list[float]:
        """Seconds between one moment and the next; waits for the device."""
        pairs = list(zip(self.moments, self.moments[1:], strict=False))
        if not self.on_gpu:
            return [b - a for a, b in pairs]
        self.moments[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


class Runner(ABC):
    """One context of a batch of sequences: prefilled once, then decoded."""

    def __init__(self, subject: Subject, batch: int, chunk: int) -> None:
        self.subject, self.model, self.batch = subject, subject.model, batch
        self.device: torch.device = subject.model.device
        self.chunk = chunk or CHUNK.get(self.device.type, CHUNK["cpu"])
        self.keeps_logits = False
        self.logits: list[Tensor] = []
        """Of each step, if they are kept."""

    @abstractmethod
    def prefill(self, ids_BT: Tensor, new_tokens: int) -> Tensor:
        """Caches the tokens after what is there, with room for a reply; next-token logits [B, Y].

        Only what `fill` left room for can follow it.
        """

    @abstractmethod
    def fill(self, tokens: int, new_tokens: int) -> Tensor:
        """Caches random numbers, with room for so many tokens more; random logits [B, Y]."""

    @abstractmethod
    def decode(self, logits_BY: Tensor, steps: int, clock: Clock) -> list[list[int]]:
        """Takes the steps, stamping the clock at the first one's start and each one's end.

        Returns:
            The tokens of each sequence: the one chosen from the logits given, and one a step.
        """

    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of cache storage, spare room included."""

    @abstractmethod
    def step_bytes(self) -> int:
        """Bytes of weights that a decode step has to read."""


class EngineRunner(Runner):
    """Our engine."""

    def __init__(self, subject: Subject, batch: int, chunk: int, *, fp8: bool = False) -> None:
        super().__init__(subject, batch, chunk)
        self.fp8 = fp8
        self.cache = new_cache(self.model)
        self.length = 0
        self.before_compressing: Callable[[SegmentedCache], object] = lambda _: None
        """Is shown the cache while what was prefilled is still in full."""
        self.before_timing: Callable[[Engine, SegmentedCache], object] = lambda *_: None
        """Is shown the engine on its cache before a step is compiled, captured and timed."""
        self._engine: Engine | None = None

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor, new_tokens: int) -> Tensor:
        """As `Runner.prefill`: chunk by chunk into one allocation."""
        T = ids_BT.shape[1]
        self.cache.expect(T + new_tokens + 1)
        positions_T = torch.arange(self.length, self.length + T, device=self.device)
        tokens = Tokens(ids_BT, positions_T.expand(3, self.batch, -1))
        for cut in tokens.chunks(self.chunk):
            hidden_BTX = run(self.model, self.cache, cut)
        self.length += T
        if isinstance(self.cache, LatentCache) and self.fp8:
            self.before_compressing(self.cache)
            self.cache.compress(self.model.config.text_config)
        return logits(self.model, hidden_BTX[:, -1])

    @torch.no_grad()
    def fill(self, tokens: int, new_tokens: int) -> Tensor:
        """As `Runner.fill`."""
        for index in range(len(self.cache.layers)):
            layer = self.cache.segmented(index)
            like = self._one_token(index)
            # What is compressed gets a tail of its own for what follows.
            layer.reserve(like, tokens if self.fp8 else tokens + new_tokens + 1)
            for tensor in layer.tail:
                tensor[:, :, :tokens].normal_()
            layer.length = tokens
            if self.fp8:
                layer.compress(self.model.config.text_config.rank(index))
        self.length = tokens
        width = self.model.config.text_config.vocab_size
        return torch.randn(self.batch, width, device=self.device)

    def _one_token(self, index: int) -> tuple[Tensor, ...]:
        """Storage of one token in a layer."""
        text = self.model.config.text_config
        kind = {"dtype": self.model.dtype, "device": self.device}
        if self.subject.attention == "m2la":
            return (torch.empty(self.batch, 1, 1, text.row_width(index), **kind),)
        shape = (self.batch, text.num_key_value_heads, 1, text.head_dim)
        return torch.empty(shape, **kind), torch.empty(shape, **kind)

    @torch.no_grad()
    def decode(self, logits_BY: Tensor, steps: int, clock: Clock) -> list[list[int]]:
        """As `Runner.decode`; what has to be compiled and captured is so before the first stamp."""
        engine = self._started(logits_BY, steps)
        self.before_timing(engine, self.cache)
        self._warm_up(engine)
        self.logits = []
        clock.stamp()
        for _ in range(steps):
            engine.advance()
            clock.stamp()
            if self.keeps_logits:
                self.logits.append(engine.logits_BY.float().clone())
        self._engine = engine
        return engine.said()

    def _started(self, logits_BY: Tensor, steps: int) -> Engine:
        cached = self.cache.segmented(0).length
        replies = [Reply(self.length, cached, steps + 1, (), 0.0, 0)] * self.batch
        engine = Engine(self.model, replies, logits_BY)
        for index in range(len(self.cache.layers)):
            self.cache.segmented(index).make_room(steps + 1, may_freeze=False)
        engine.bind(self.cache)
        return engine

    def _warm_up(self, engine: Engine) -> None:
        """Compiles and captures, then puts the engine's state back."""
        if self.device.type != "cuda":
            return
        with state_kept(engine):
            for _ in range(EAGER_STEPS):
                engine.advance()
            engine.capture()
            engine.advance()

    def cache_bytes(self) -> int:
        """As `Runner.cache_bytes`."""
        return allocated_bytes([self.cache])

    def step_bytes(self) -> int:
        """As `Runner.step_bytes`; known once a reply has been decoded."""
        assert self._engine is not None, "decode first"
        return self._engine.bytes_read()


@contextmanager
def state_kept(engine: Engine) -> Iterator[None]:
    """Puts the engine's state back: steps that are taken meanwhile are taken again."""
    state = {name: t for name, t in vars(engine).items() if isinstance(t, Tensor)}
    before = {name: t.clone() for name, t in state.items()}
    try:
        yield
    finally:
        for name, tensor in before.items():
            getattr(engine, name).copy_(tensor)


class TransformersRunner(Runner):
    """Transformers' own attention and caches: what people run today."""

    def __init__(self, subject: Subject, batch: int, chunk: int, kind: str) -> None:
        super().__init__(subject, batch, chunk)
        self.kind = kind
        self.untimed = untimed_steps(self.device)
        self.cache: Any = None
        self.length = 0
        self.room = 0
        """Tokens that a static cache has room for at least."""
        self.said_BT: Tensor | None = None
        """Every token that was chosen, those of untimed steps included."""
        self._forward: Callable[..., Any] = self.model.forward

    @torch.no_grad()
    def prefill(self, ids_BT: Tensor, new_tokens: int) -> Tensor:
        """As `Runner.prefill`."""
        T = ids_BT.shape[1]
        if self.cache is None:
            self.cache = self._new_cache(T + new_tokens + self.untimed + 1)
        for start in range(0, T, self.chunk):
            logits_BY = self._step(ids_BT[:, start : start + self.chunk], self.model.forward)
        return logits_BY

    @torch.no_grad()
    def fill(self, tokens: int, new_tokens: int) -> Tensor:
        """As `Runner.fill`."""
        text = self.model.config.text_config
        shape = (self.batch, text.num_key_value_heads, tokens, text.head_dim)
        self.cache = self._new_cache(tokens + new_tokens + self.untimed + 1)
        for index in range(text.num_hidden_layers):
            made = (torch.randn(shape, device=self.device, dtype=self.model.dtype) for _ in "kv")
            keys, values = made
            self.cache.update(keys, values, index)
        self.length = tokens
        return torch.randn(self.batch, text.vocab_size, device=self.device)

    def _new_cache(self, tokens: int) -> Any:
        text = self.model.config.text_config
        if self.kind != "static":
            return DynamicCache(config=text)
        tokens = max(tokens, self.room)
        if self.device.type == "cuda":
            self._forward = _compiled(self.model, self.batch, tokens)
        return StaticCache(config=text, max_cache_len=tokens)

    def _step(self, ids_BT: Tensor, forward: Callable[..., Any]) -> Tensor:
        """Next-token logits [B, Y] after these tokens."""
        T = ids_BT.shape[1]
        positions_T = torch.arange(self.length, self.length + T, device=self.device)
        out = forward(
            input_ids=ids_BT,
            position_ids=positions_T.expand(3, self.batch, -1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.length += T
        found: Tensor = out.logits[:, -1]
        return found

    @torch.no_grad()
    def decode(self, logits_BY: Tensor, steps: int, clock: Clock) -> list[list[int]]:
        """As `Runner.decode`; on a GPU some steps come first, which compile and are not timed."""
        said = [logits_BY.argmax(-1, keepdim=True)]
        for _ in range(self.untimed):
            said.append(self._chosen(said[-1]))
        clock.stamp()
        for _ in range(steps):
            said.append(self._chosen(said[-1]))
            clock.stamp()
        self.said_BT = torch.cat(said, dim=1)
        return [list(row) for row in self.said_BT[:, self.untimed :].tolist()]

    def _chosen(self, said_B1: Tensor) -> Tensor:
        """The token [B, 1] after this one."""
        logits_BY = self._step(said_B1, self._forward)
        if self.keeps_logits:
            # A replay of the compiled step overwrites them.
            self.logits.append(logits_BY.float().clone())
        return logits_BY.argmax(-1, keepdim=True)

    def cache_bytes(self) -> int:
        """As `Runner.cache_bytes`."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    def step_bytes(self) -> int:
        """As `Runner.step_bytes`: the text model without the embedding rows, and the head."""
        text = self.model.model.language_model
        skipped = {id(text.embed_tokens.weight)} - {id(self.model.lm_head.weight)}
        parameters = [*text.parameters(), self.model.lm_head.weight]
        unique = {id(p): p.nbytes for p in parameters if id(p) not in skipped}
        return sum(unique.values())


_compiled_for: tuple[Any, ...] = ()
"""Model, batch and cache size that torch.compile has seen last."""


def _compiled(model: Any, batch: int, tokens: int) -> Callable[..., Any]:
    """A step compiled for a cache of this size.

    Torch takes a second size for a sign that sizes vary, and compiles for any: so it forgets the
    first one, and what is timed does not depend on which lengths came before.
    """
    global _compiled_for
    wanted = (id(model), batch, tokens)
    if wanted != _compiled_for:
        torch.compiler.reset()
    _compiled_for = wanted
    step: Callable[..., Any] = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
    return step


class MissingPackageError(WorkloadError):
    """A baseline whose package is not installed here."""


def make_runner(
    subject: Subject, kind: str, *, batch: int, chunk: int, cache: str = "native"
) -> Runner:
    """The runner of a point that can be run (`workload.why_not`).

    Raises:
        MissingPackageError: the baseline's package is not installed.
    """
    if kind == "engine":
        return EngineRunner(subject, batch, chunk, fp8=cache == "fp8")
    implementation = "flash_attention_2" if kind == "flash" else "sdpa"
    try:
        subject.model.set_attn_implementation(implementation)
    except (ImportError, ValueError) as error:
        raise MissingPackageError(
            f"{kind}: {str(error).splitlines()[0]} Install flash-attn, or leave this baseline out."
        ) from error
    return TransformersRunner(subject, batch, chunk, kind)


def random_ids(subject: Subject, batch: int, tokens: int) -> Tensor:
    """Reproducible text token ids [B, T], none of them special."""
    drawn = torch.Generator().manual_seed(tokens)
    text = subject.model.config.text_config
    ids_BT = torch.randint(64, text.vocab_size - 64, (batch, tokens), generator=drawn)
    return ids_BT.to(subject.model.device)
