"""Sessions after many random steps answer like new ones that were given the same tokens.

Run: .venv/bin/python -m pytest tests/model/test_session_walks.py -q
"""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch

from internvideo3.model import cache, segments
from internvideo3.model.checkpoint import load_model
from internvideo3.model.session import Limits, Session

STEPS = 24
LIMITS = Limits(max_new_tokens=5, stop_ids=())


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tails are frozen, given back, begun with spare room and joined within a few steps."""
    for name, tokens in (("BLOCK_TOKENS", 1), ("COPIED_TOKENS", 24), ("MOST_SPARE", 48)):
        monkeypatch.setattr(cache, name, tokens)
    monkeypatch.setattr(cache, "MANY_RUNS", 2)
    monkeypatch.setattr(segments, "BLOCK", 16)


class Walk:
    """Sessions of one model that grow, fork, answer alone and together, and run out of memory."""

    def __init__(self, model: Any, processor: Any, seed: int, *, compresses: bool) -> None:
        self.drawn = random.Random(seed)
        self.sessions = [Session(model, processor, chunk=64)]
        self.sessions[0].append_ids(self.some_ids())
        self.steps = [self.append, self.append, self.append, self.generate]
        self.steps += [self.fork, self.generate_together, self.fail, self.run_short]
        self.steps += [self.compress, self.fail_to_compress] * 2 if compresses else []

    def some_ids(self) -> list[int]:
        return [self.drawn.randrange(100, 300) for _ in range(self.drawn.randint(1, 40))]

    def one(self) -> Session:
        return self.drawn.choice(self.sessions)

    def append(self) -> None:
        self.one().append_ids(self.some_ids())

    def fork(self) -> None:
        if len(self.sessions) == 4:
            self.sessions.remove(self.one())
        self.sessions.append(self.one().fork())

    def generate(self) -> None:
        self.one().generate(LIMITS)

    def generate_together(self) -> None:
        Session.generate_batch(self.drawn.sample(self.sessions, min(2, len(self.sessions))), LIMITS)

    def compress(self) -> None:
        self.one().compress()

    def fail_to_compress(self) -> None:
        """Some layer's copy finds no room: those before it stay compressed."""
        left, stock = self.drawn.randrange(6), cache.Segment.compress

        def without_room(run: Any, rank: int) -> Any:
            nonlocal left
            left -= not run.compressed
            if left < 0:
                raise torch.OutOfMemoryError("no room")
            return stock(run, rank)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache.Segment, "compress", without_room)
            # Or it is small enough to be compressed whole.
            with suppress(torch.OutOfMemoryError):
                self.one().compress()

    def fail(self) -> None:
        """The write of some layer finds no room; the session must be as it was."""
        session, left = self.one(), self.drawn.randrange(6)
        before, write = list(session.ids), cache.SegmentedLayer.write

        def without_room(layer: Any, *given: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("no room")
            write(layer, *given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache.SegmentedLayer, "write", without_room)
            with pytest.raises(torch.OutOfMemoryError):
                session.append_ids([*self.some_ids(), *range(100, 170)])
                session.prefill()
        assert session.ids == before

    def run_short(self) -> None:
        """Some layers find no memory for spare room, some not even for the tokens themselves."""
        session, stock = self.one(), torch.Tensor.new_zeros
        before = list(session.ids)

        def scarce(like: torch.Tensor, *shape: int) -> torch.Tensor:
            if self.drawn.random() < 0.3:
                raise torch.OutOfMemoryError("no room")
            return stock(like, *shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "new_zeros", scarce)
            try:
                session.append_ids(self.some_ids())
                session.prefill()
            except torch.OutOfMemoryError:
                assert session.ids == before

    def take(self, steps: int) -> None:
        for _ in range(steps):
            self.drawn.choice(self.steps)()
            for session in self.sessions:
                layers = [session.cache.segmented(i) for i in range(len(session.cache.layers))]
                runs = {tuple(run.length for run in layer.segments()) for layer in layers}
                assert len(runs) == 1, "layers hold the same tokens in the same runs"


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("name", ["scale:base", "scale:m2la"])
def test_walked_sessions_answer_like_new_ones(name: str, seed: int) -> None:
    model, processor = load_model(name, "cpu", "float32")
    walk = Walk(model, processor, seed, compresses=False)
    walk.take(STEPS)
    assert max(len(session.cache.segmented(0).frozen) for session in walk.sessions) > 1
    for session in walk.sessions:
        new = Session(model, processor, chunk=4096)
        new.append_ids(session.ids)
        assert torch.allclose(session.logits_last, new.logits_last, atol=1e-4)
        alone = new.generate(LIMITS).token_ids
        assert session.fork().generate(LIMITS).token_ids == alone


@pytest.mark.parametrize("seed", [0, 1, 2, 8])
def test_walked_compressed_sessions_answer_alike_alone_and_together(seed: int) -> None:
    """What fp8 rounds depends on the walk; what is read afterwards must not on who reads along."""
    model, processor = load_model("scale:m2la", "cpu", "float32")
    walk = Walk(model, processor, seed, compresses=True)
    walk.take(36)
    assert any(run.compressed for s in walk.sessions for run in s.cache.segmented(0).frozen)
    drawn = replace(LIMITS, max_new_tokens=30, temperature=4.0, seed=3)
    alone = [session.fork().generate(drawn).logps for session in walk.sessions]
    together = Session.generate_batch([session.fork() for session in walk.sessions], drawn)
    for reply, want in zip(together, alone, strict=True):
        assert reply.logps == pytest.approx(want, abs=1e-4)
