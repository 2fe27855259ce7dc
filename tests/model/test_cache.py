"""The segmented cache: growth, forks, rollback; and attention over its parts.

Run: .venv/bin/python -m pytest tests/model/test_cache.py -q
"""

from __future__ import annotations

import itertools
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from internvideo3.model import cache, segments
from internvideo3.model.cache import (
    BLOCK_TOKENS,
    LatentCache,
    Part,
    Placement,
    Segment,
    SegmentedLayer,
    SharedKVCache,
    allocated_bytes,
)
from internvideo3.model.segments import attend


def rows(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 1, tokens, 6, generator=generator)


def filled(tokens: int, batch: int = 1, seed: int = 0) -> tuple[LatentCache, Tensor]:
    cache, new = LatentCache(2), rows(tokens, batch, seed)
    for layer in range(2):
        cache.update(new, new, layer)
    return cache, new


def content(cache: LatentCache, layer: int = 0) -> Tensor:
    return cache.segmented(layer).joined()[0]


def test_rows_are_contiguous_and_allocated_in_blocks() -> None:
    cache, new = filled(3)
    storage = cache.segmented(0).tail[0]
    assert storage.shape == (1, 1, BLOCK_TOKENS, 6)
    assert storage[0, 0].is_contiguous()
    grown, one = [], new[:, :, :1]
    for step in range(400):
        cache.update(one, one, 0)
        if cache.segmented(0).tail[0] is not storage:
            storage = cache.segmented(0).tail[0]
            grown.append(step)
            assert storage.shape[2] % BLOCK_TOKENS == 0
    assert len(grown) < 400 / BLOCK_TOKENS + 1
    assert torch.equal(content(cache)[:, :, 3:], one.expand(-1, -1, 400, -1))
    assert cache.get_seq_length(0) == 403 and cache.get_mask_sizes(2, 0) == (405, 0)


def test_allocated_bytes_are_those_of_storage() -> None:
    cache, new = filled(3)
    one_layer = BLOCK_TOKENS * 6 * 4
    assert cache.allocated_bytes() == 2 * one_layer
    child = cache.fork()
    assert allocated_bytes([cache, child]) == 2 * one_layer
    child.update(new, new, 0)
    assert allocated_bytes([cache, child]) == 3 * one_layer


def test_parent_and_child_grow_apart() -> None:
    cache, new = filled(5)
    child = cache.fork()
    grandchild = child.fork()
    for which, one in enumerate((cache, child, grandchild), start=1):
        more = rows(100, seed=which)
        one.update(more, more, 0)
        assert torch.equal(content(one), torch.cat([new, more], dim=2))
    assert torch.equal(content(child, 1), new)


@pytest.mark.parametrize("removed", [1, 4, 7])
def test_rollback_never_overwrites_what_a_fork_holds(removed: int) -> None:
    cache, new = filled(5)
    child = cache.fork()
    more = rows(3, seed=1)
    cache.update(more, more, 0)
    both = torch.cat([new, more], dim=2)
    cache.segmented(0).crop(-removed)
    cache.update(more, more, 0)
    assert torch.equal(content(child), new)
    assert torch.equal(content(cache), torch.cat([both[:, :, : 8 - removed], more], dim=2))
    with pytest.raises(ValueError, match="negative"):
        cache.segmented(0).crop(1)
    with pytest.raises(ValueError, match="at most"):
        cache.segmented(0).crop(-100)


def test_batch_changes_leave_shared_segments_alone() -> None:
    cache, new = filled(5)
    batch = cache.fork()
    more = rows(2, batch=3, seed=1)
    batch.update(more, more, 0)
    batch.segmented(0).reorder_cache(torch.tensor([2, 0, 0]))
    assert batch.segmented(0).frozen[0].tensors[0] is cache.segmented(0).tail[0]
    want = torch.cat([new.expand(3, -1, -1, -1), more[[2, 0, 0]]], dim=2)
    assert torch.equal(content(batch), want)
    batch.segmented(0).batch_select_indices(torch.tensor([1]))
    batch.segmented(0).batch_repeat_interleave(2)
    assert torch.equal(content(batch), want[[1, 1]])


def test_rows_of_different_lengths_stay_contiguous() -> None:
    cache = LatentCache(1)
    lengths = [0, 3, 1]
    written: list[list[Tensor]] = [[], [], []]
    first = rows(3, batch=3)
    cache.extend(0, (first,))
    for row, length in enumerate(lengths):
        written[row] = [first[row, :, :length]]
    for step, counts in enumerate([(2, 1, 4), (1, 1, 1)]):
        new = rows(max(counts), batch=3, seed=step + 1)
        with cache.step(Placement.of(lengths, max(counts), new.device)):
            (part,) = cache.extend(0, (new,))
        assert part.mask_BxTN is not None
        for row, count in enumerate(counts):
            written[row].append(new[row, :, :count])
            last = part.mask_BxTN[row, 0, count - 1]
            lengths[row] += count
            assert last.nonzero().flatten().tolist() == list(range(lengths[row]))
    for row, length in enumerate(lengths):
        (got,) = cache.row(row, length).segmented(0).segments()[-1].views()
        assert torch.equal(got[0], torch.cat(written[row], dim=1))
        assert got.untyped_storage().data_ptr() == cache.segmented(0).tail[0].data_ptr()


def test_gqa_cache_serves_transformers_and_sessions() -> None:
    cache = SharedKVCache(1)
    keys, values = rows(3), rows(3, seed=1)
    assert all(map(torch.equal, cache.update(keys, values, 0), (keys, values)))
    with cache.step():
        parts, same = cache.update(keys, values, 0)
    assert parts is same and len(parts) == 1 and parts[0].causal
    assert torch.equal(parts[0].tensors[1], torch.cat([values, values], dim=2))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, K, G, T, W] on [B, K, N, W], by the definition."""
    scores = scale * q @ k[:, :, None].mT
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return scores.softmax(-1).nan_to_num() @ v[:, :, None]


SHAPES = list(itertools.product((1, 3), (1, 2), (1, 3), (1, 5)))


@pytest.mark.parametrize(("batch", "heads", "groups", "queries"), SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_over_segments_is_attention_over_their_union(
    batch: int, heads: int, groups: int, queries: int, masked: bool, monkeypatch: Any
) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lengths, widths = (4, 9, 7), (6, 5)
    segments = [
        tuple(draw(1 if i == 0 else batch, heads, n, w) for w in widths)
        for i, n in enumerate(lengths)
    ]
    k, v = (torch.cat([s[i].expand(batch, -1, -1, -1) for s in segments], dim=2) for i in range(2))
    q = draw(batch, heads, groups, queries, widths[0])
    mask = torch.ones(batch, 1, queries, 20, dtype=torch.bool)
    mask[..., 20 - queries :].tril_()
    if masked:
        mask &= draw(batch, 1, queries, 20) > 0
        mask[0, 0, 0] = False  # a padding query
    given = mask.split(lengths, dim=-1)
    parts = [Part(s, m) for s, m in zip(segments, given, strict=True)]
    if not masked:
        parts = [Part(s) for s in segments[:-1]] + [Part(segments[-1], causal=queries > 1)]
    want = plain_attention(q, k, v, mask, 0.3)
    for limit in (1 << 20, 40):
        monkeypatch.setattr("internvideo3.model.segments.MAX_SCORES", limit)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert float((attend(q, parts, 0.3) - want).abs().max()) <= 1e-12


@pytest.mark.parametrize("queries", [1, 4, 9])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("widest", [4, 256])
def test_attention_over_one_segment(
    queries: int, heads: int, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvideo3.model.segments.FUSED_WIDTH", widest)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, 3, queries, 6, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, heads, 9, w, generator=generator, dtype=torch.float64) for w in (6, 5))
    mask = torch.ones(1, 1, queries, 9, dtype=torch.bool)
    mask[..., 9 - queries :].tril_()
    want = plain_attention(q, k, v, mask, 0.3)
    for part in (Part((k, v), causal=queries > 1), Part((k, v), mask)):
        assert float((attend(q, [part], 0.3) - want).abs().max()) <= 1e-12


def test_many_blocks_are_merged_without_rounding_each_time() -> None:
    """48 blocks in bfloat16, as of 768K tokens: weights, blocks' outputs and the sum round once."""
    drawn = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 2, 40, 32, generator=drawn).bfloat16()
    k, v = (torch.randn(1, 1, 48 * 16, 32, generator=drawn).bfloat16() for _ in "kv")
    scores = (q.double() @ k[:, :, None].double().mT) * 32**-0.5
    want = scores.softmax(-1) @ v[:, :, None].double()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(segments, "BLOCK", 16)
        got = segments.attend_blocks(q, [Part((k, v))], 32**-0.5)
    assert got.dtype == torch.bfloat16
    # A rounding costs 1.66e-3; with the sum rounded after each block it was 9.0e-3.
    assert float((got.double() - want).norm() / want.norm()) <= 1.66e-3 * 3**0.5


@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize("wants_grad", [False, True])
def test_large_scores_are_not_rounded_before_the_softmax(shared: int, wants_grad: bool) -> None:
    """Trained models have scores of 20 and more, where bfloat16 has steps of 1/8."""
    drawn = torch.Generator().manual_seed(0)
    q = torch.randn(3, 1, 8, 2, 64, generator=drawn).bfloat16()
    k, v = (torch.randn(3 // shared, 1, 2048, 64, generator=drawn).bfloat16() for _ in "kv")
    mask = torch.ones(3, 1, 2, 2048, dtype=torch.bool)
    mask[0, :, :, 1500:], mask[1:, :, 0, -1] = False, False
    scores = (q.double() @ k[:, :, None].double().mT) * 0.5
    assert 3.5 < float(scores.std()) < 4.5
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    want = scores.softmax(-1) @ v[:, :, None].double()
    half = Part((k[:, :, :1024], v[:, :, :1024]), mask[..., :1024])
    rest = Part((k[:, :, 1024:], v[:, :, 1024:]), mask[..., 1024:])
    with torch.set_grad_enabled(wants_grad):
        got = segments.attend(q, [half, rest], 0.5)
    assert got.dtype == torch.bfloat16
    # Four roundings of 1.66e-3: weights, sums, quotient, merge. With those of scores, 1.2e-2.
    assert float((got.double() - want).norm() / want.norm()) <= 1.66e-3 * 4**0.5


def test_scores_on_a_gpu_are_float32() -> None:
    """Sums of a GPU are; on meta tensors only shapes and types are looked at."""
    with torch.no_grad():
        q, k = (torch.empty(2, 3, n, 64, dtype=torch.bfloat16, device="meta") for n in (5, 7))
        scores = segments._scores(q, k, 0.3)
    assert scores.shape == (2, 3, 5, 7) and scores.dtype == torch.float32


def test_a_session_of_many_turns_has_few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step reads run by run, and long tails are not copied to make room."""
    monkeypatch.setattr(cache, "COPIED_TOKENS", 8)
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 1)
    layer, rows_B1TW = SegmentedLayer(), torch.randn(1, 1, 10, 4)
    counts = []
    for turn in range(200):
        layer.write((rows_B1TW + turn,))
        counts.append(len(layer.segments()))
    assert counts[: cache.MANY_RUNS] == list(range(1, cache.MANY_RUNS + 1))
    assert counts[-1] < cache.MANY_RUNS + 20
    spare = sum(one.tensors[0].shape[2] for one in layer.segments()) - layer.get_seq_length()
    assert spare <= (cache.GROWTH - 1) * layer.get_seq_length()
    (found,) = layer.joined()
    want = torch.cat([rows_B1TW + turn for turn in range(200)], dim=2)
    assert torch.equal(found, want)


def stored_tokens(layer: SegmentedLayer) -> int:
    return sum(one.tensors[0].shape[2] for one in layer.segments())


def take_turn(held: LatentCache, new_B1TW: torch.Tensor) -> None:
    """Appends to all layers, as a call of a session does."""
    with held.unchanged_on_failure():
        for index in range(len(held.layers)):
            held.segmented(index).write((new_B1TW,))
    held.settle()


@pytest.mark.parametrize("turn", [9, 11, 13, 17, 40])
def test_turns_of_any_length_leave_no_room_behind(
    turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a frozen run stores is what it holds, whatever its turns' lengths make of the room."""
    monkeypatch.setattr(cache, "COPIED_TOKENS", 8)
    monkeypatch.setattr(cache, "MOST_SPARE", 16)
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 1)
    held, drawn, written = LatentCache(1), torch.Generator().manual_seed(0), []
    layer = held.segmented(0)
    for _ in range(100):
        odd = int(torch.randint(1, turn, (), generator=drawn))
        for tokens in (turn, odd):
            written.append(torch.randn(1, 2, tokens, 4))
            take_turn(held, written[-1])
            in_tail = layer.tail[0].shape[2] if layer.tail else 0
            assert in_tail <= max(layer.length, 16) * cache.GROWTH
            frozen = sum(one.length for one in layer.frozen)
            assert stored_tokens(layer) - in_tail == frozen
    assert torch.equal(layer.joined()[0], torch.cat(written, dim=2))


def test_spare_room_is_not_worth_failing_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "COPIED_TOKENS", 8)
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 1)
    layer = SegmentedLayer()
    for _ in range(cache.MANY_RUNS):
        layer.write((torch.randn(1, 1, 10, 4),))
    stock, asked = torch.Tensor.new_zeros, []

    def nearly_full(like: Tensor, *shape: int) -> Tensor:
        asked.append(shape[2])
        if shape[2] > 2:
            raise torch.OutOfMemoryError("no room")
        return stock(like, *shape)

    monkeypatch.setattr(torch.Tensor, "new_zeros", nearly_full)
    layer.write((torch.ones(1, 1, 2, 4),))
    assert asked == [20, 2]
    assert layer.get_seq_length() == 82 and layer.tail[0].shape[2] == 2


NO_MEMORY = (
    torch.OutOfMemoryError("no room"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
)


@pytest.mark.parametrize("error", NO_MEMORY, ids=["gpu", "cpu"])
def test_layers_freeze_at_the_same_token_whatever_memory_they_find(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step writes at one place in all layers: it is the same only if their tails are."""
    monkeypatch.setattr(cache, "COPIED_TOKENS", 8)
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 1)
    held, drawn = LatentCache(2), torch.Generator().manual_seed(0)
    rich, poor = held.segmented(0), held.segmented(1)
    stock, stock_write = torch.Tensor.new_zeros, SegmentedLayer.write
    refused = 0

    def nearly_full(like: Tensor, *shape: int) -> Tensor:
        nonlocal refused
        if shape[2] > poor.length + new.shape[2]:
            refused += 1
            raise error
        return stock(like, *shape)

    def write(layer: SegmentedLayer, given: tuple[Tensor, ...], *more: Any) -> None:
        with monkeypatch.context() as patch:
            # Memory is short at most of the turns, for the second layer.
            if layer is poor and short:
                patch.setattr(torch.Tensor, "new_zeros", nearly_full)
            stock_write(layer, given, *more)

    monkeypatch.setattr(SegmentedLayer, "write", write)
    for turn in range(120):
        new = torch.full((1, 1, (10, 3)[turn > 10], 4), float(turn))
        short = bool(torch.rand((), generator=drawn) < 0.8)
        take_turn(held, new)
        assert (poor.length, len(poor.frozen)) == (rich.length, len(rich.frozen))
    assert torch.equal(poor.joined()[0], rich.joined()[0]) and refused > 5


def test_a_tail_that_was_refused_spare_room_is_not_copied_to_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is frozen when full: a turn after the shortage needs memory for itself alone."""
    monkeypatch.setattr(cache, "COPIED_TOKENS", 8)
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 1)
    held, new = LatentCache(2), torch.ones(1, 1, 10, 4)
    stock = torch.Tensor.new_zeros

    def scarce(like: Tensor, *shape: int) -> Tensor:
        if shape[2] > 10:
            raise torch.OutOfMemoryError("no room")
        return stock(like, *shape)

    for _ in range(cache.MANY_RUNS):
        take_turn(held, new)
    monkeypatch.setattr(torch.Tensor, "new_zeros", scarce)
    for turn in range(1, 4):
        take_turn(held, new)
        runs = [len(held.segmented(index).segments()) for index in range(2)]
        assert runs == [cache.MANY_RUNS + turn] * 2


def test_giving_room_back_takes_no_memory_that_a_turn_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a turn may still be taken back, all layers' tails would be there twice."""
    monkeypatch.setattr(cache, "COPIED_TOKENS", 1024)
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 1)
    held, order = LatentCache(4), []
    for tokens in (900, 50, 100):
        take_turn(held, torch.ones(1, 1, tokens, 8))
    stored = [stored_tokens(held.segmented(index)) for index in range(4)]
    assert stored == [1125] * 4
    zeros, clone = torch.Tensor.new_zeros, torch.Tensor.clone

    def allocating(kind: str, stock: Any) -> Any:
        def allocate(*given: Any, **named: Any) -> Any:
            order.append(kind)
            return stock(*given, **named)

        return allocate

    monkeypatch.setattr(torch.Tensor, "new_zeros", allocating("turn", zeros))
    monkeypatch.setattr(torch.Tensor, "clone", allocating("copy", clone))
    take_turn(held, torch.ones(1, 1, 400, 8))
    assert order == ["turn"] * 4 + ["copy"] * 4
    assert [stored_tokens(held.segmented(index)) for index in range(4)] == [1050 + 400] * 4


def test_other_errors_than_of_memory_are_not_spare_rooms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "COPIED_TOKENS", 8)
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 1)
    held, fault = LatentCache(1), RuntimeError("CUDA error: an illegal memory access")

    def faulty(*_: Any, **__: Any) -> Tensor:
        raise fault

    take_turn(held, torch.randn(1, 1, 8, 4))
    take_turn(held, torch.randn(1, 1, 1, 4))  # in a tail of ten
    for name, left in (("new_zeros", 9), ("clone", 29)):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, name, faulty)
            with pytest.raises(RuntimeError, match="illegal"):
                take_turn(held, torch.randn(1, 1, 20, 4))
        assert held.get_seq_length() == left


def test_a_run_that_a_fork_holds_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "COPIED_TOKENS", 8)
    held = LatentCache(1)
    layer = held.segmented(0)
    take_turn(held, torch.randn(1, 1, 10, 4))
    child, storage = layer.fork(), layer.tail[0]
    take_turn(held, torch.randn(1, 1, 60, 4))
    assert layer.frozen[0].tensors[0] is storage is child.frozen[0].tensors[0]


COMPRESSING: Any = SimpleNamespace(row_form="latent", rank=lambda index: 16)
"""What `LatentCache.compress` reads of a configuration."""


def test_a_session_that_compresses_each_turn_has_few_runs() -> None:
    held, copied = LatentCache(1), cache.COPIED_TOKENS
    layer, tokens, turns = held.segmented(0), copied // 8, 40
    drawn = torch.randn(turns, 1, 1, tokens, 32)
    for turn in drawn:
        take_turn(held, turn)
        held.compress(COMPRESSING)
    assert all(run.compressed for run in layer.frozen)
    assert len(layer.frozen) <= turns * tokens / copied
    (found,) = layer.joined()
    want = torch.cat(list(drawn), dim=2)
    assert torch.equal(found[..., 16:], want[..., 16:])
    # e4m3 has 3 bits after the point: half a step of the largest binade is 1/16 of the number.
    assert float((found - want).abs().max() / want.abs().max()) <= 1 / 16


def test_compressed_runs_that_forks_share_stay_shared() -> None:
    """A batch of forks reads them once: joined with what each has of its own, it could not."""
    held = LatentCache(1)
    take_turn(held, torch.randn(1, 1, 10, 32))
    held.compress(COMPRESSING)
    children = [held.fork() for _ in "ab"]
    for child in children:
        for _ in range(3):
            take_turn(child, torch.randn(1, 1, 5, 32))
            child.compress(COMPRESSING)
    layers = [child.segmented(0) for child in children]
    assert [len(layer.frozen) for layer in layers] == [2, 2]
    shared = held.segmented(0).frozen[0].tensors[0]
    assert all(layer.frozen[0].tensors[0] is shared for layer in layers)
    assert [child.get_seq_length() for child in children] == [25, 25]


@pytest.mark.parametrize("where", ["compress", "cat"])
def test_runs_are_joined_in_all_layers_or_in_none(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails, and where; also after a fork, and what is compressed in a second try."""
    stock = {"compress": Segment.compress, "cat": torch.cat}
    for failing in range(6):
        held = LatentCache(3)
        for _ in range(2):
            take_turn(held, torch.randn(1, 1, 10, 32))
            held.compress(COMPRESSING)
        take_turn(held, torch.randn(1, 1, 10, 32))
        calls = itertools.count()

        def fails(*given: Any, calls: Any = calls, failing: int = failing, **named: Any) -> Any:
            if next(calls) == failing:
                raise torch.OutOfMemoryError("no room")
            return stock[where](*given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(Segment if where == "compress" else torch, where, fails)
            # Joining is worth having, not failing for; not compressing is told.
            told = pytest.raises(torch.OutOfMemoryError) if where == "compress" else nullcontext()
            with told:
                held.compress(COMPRESSING)
        child = held.fork()
        for one in (held, child):
            for _ in range(2):
                layers = [one.segmented(index) for index in range(3)]
                assert len({tuple(run.length for run in layer.frozen) for layer in layers}) == 1
                assert {layer.get_seq_length() for layer in layers} == {30}
                one.compress(COMPRESSING)


@pytest.mark.parametrize("change", ["reorder", "compress", "reset", "none"])
def test_transformers_own_passes_leave_no_room_behind(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a cache keep a run alive that it has replaced, as beam search does."""
    monkeypatch.setattr(cache, "COPIED_TOKENS", 8)
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 1)
    held = LatentCache(2)
    seen: list[weakref.ref[Tensor]] = []
    for _ in range(60):
        for layer in range(2):
            new = torch.randn(1, 1, 1, 32)
            held.update(new, new, layer)
            seen += [weakref.ref(t) for run in held.segmented(layer).frozen for t in run.tensors]
    if change == "reorder":
        held.reorder_cache(torch.tensor([0]))
    elif change == "compress":
        held.compress(COMPRESSING)
    elif change == "reset":
        held.reset()
    layers = [held.segmented(index) for index in range(2)]
    named = {id(t) for layer in layers for run in layer.segments() for t in run.tensors}
    assert {id(one) for ref in seen if (one := ref()) is not None} <= named
    for layer in layers:
        assert all(run.tensors[0].shape[2] == run.length for run in layer.frozen[:-1])


@pytest.mark.parametrize("where", ["freeze", "merge"])
def test_ctrl_c_in_a_compression_leaves_layers_alike(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = LatentCache(3)
    for turn in range(2):
        take_turn(held, torch.randn(1, 1, 10, 32))
        if turn == 0:
            held.compress(COMPRESSING)
    calls, stock = itertools.count(), SegmentedLayer.freeze

    def interrupted(layer: SegmentedLayer, **named: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        stock(layer, **named)

    class Fragile(SegmentedLayer):
        def __setattr__(self, name: str, value: Any) -> None:
            fewer = name == "frozen" and len(value) < len(self.__dict__.get("frozen", ()))
            if fewer and not next(calls):
                raise KeyboardInterrupt
            super().__setattr__(name, value)

    if where == "freeze":
        monkeypatch.setattr(SegmentedLayer, "freeze", interrupted)
    else:
        held.segmented(1).__class__ = Fragile
    with pytest.raises(KeyboardInterrupt):
        held.compress(COMPRESSING)
    layers = [held.segmented(index) for index in range(3)]
    assert len({tuple(run.length for run in layer.segments()) for layer in layers}) == 1
    assert len({layer.length for layer in layers}) == 1


def test_what_is_left_of_a_run_after_a_fork_may_be_nothing() -> None:
    held, new = filled(3)
    child = held.fork()
    held.crop(-3)
    assert held.segmented(0).segments() == () and held.get_seq_length() == 0
    held.update(new, new, 0)
    assert torch.equal(content(held), new) and torch.equal(content(child), new)
