"""Caches that grow in blocks and share their past: for latent rows, and for GQA keys and values.

A layer holds a tuple of frozen segments (immutable, possibly shared with other caches) and a tail
of its own. Forking freezes the tail for the child and gives it an empty one: no tensor is read or
written, so a fork costs O(layers) whatever the context length. Attention runs over each segment
separately and merges by log-sum-exp (`segments.attend`), so a prefix shared by a batch of forks is
stored once and read once per step.

Vision tokens of a smaller latent rank are frozen in segments of their own (`narrow`), whose rows
lack the columns that are zero for them. What is frozen is seen whole by all that follows, and a
cached row knows its position, so the order in which rows lie does not matter.

Axes: B batch, b batch of a segment (B, or 1 when all rows of the batch share it), K stored heads
(1 for latent rows), T new tokens, N cached tokens, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from internvideo3.kernels.latent_decode.rows import FP8, quantize
from internvideo3.model.config import InternVideo3TextConfig
from internvideo3.model.device import is_of_memory

BLOCK_TOKENS = 64
"""Storage is allocated in multiples of this many tokens."""

GROWTH = 1.25
"""Factor by which a full tail grows, so that appending N tokens copies O(N) rows in all."""

COPIED_TOKENS = 8192
"""A full tail longer than this is frozen where it is, and a new one is begun: growing it would
hold it twice for a moment, which a cache that fills the device has no room for."""


MANY_RUNS = 8
"""Frozen runs from which on a new tail begins with room for several turns like the one that opens
it, in a quarter of all that is cached: a decode step reads run by run, and a session of many turns
would else have a run for each."""

MOST_SPARE = 16384
"""Tokens of spare room at most: what fills a device leaves no quarter of it."""

COMPRESSED_TOKENS = 65536
"""Rows that are compressed at once: their float32 copies exist for a moment."""


@dataclass(frozen=True)
class Nested:
    """Rows of a smaller rank, whose latents are the first coordinates of the others'."""

    kept: int
    """Latent columns that are stored."""
    missing: int
    """Latent columns that follow them, which are zero and not stored."""


@dataclass(frozen=True)
class Segment:
    """An immutable run of cached tokens; only the first `length` tokens of the storage count."""

    tensors: tuple[Tensor, ...]
    """Storage, each [b, K, capacity, W]. Compressed: latents in fp8, rotary keys, scales."""
    length: int
    nested: Nested | None = None
    """Which columns the rows lack; None: none."""
    roomy: bool = False
    """Whether `SegmentedLayer.trim` may give back its spare room."""

    @property
    def compressed(self) -> bool:
        """Whether the latents are in fp8."""
        return self.tensors[0].dtype == FP8

    @property
    def stored(self) -> tuple[Tensor, ...]:
        """The cached tokens as they are stored, each [b, K, length, W], without the spare room."""
        return tuple(t[:, :, : self.length] for t in self.tensors)

    def views(self) -> tuple[Tensor, ...]:
        """The cached tokens, each [b, K, length, W]; a compressed run is decoded for the moment.

        Columns that the rows lack stay out.
        """
        return (_widened(*self.stored),) if self.compressed else self.stored

    def whole(self) -> tuple[Tensor, ...]:
        """As `views`, with zeros where the rows lack columns."""
        views = self.views()
        if self.nested is None:
            return views
        rows_bKNW, *others = views
        kept = rows_bKNW.split([self.nested.kept, rows_bKNW.shape[3] - self.nested.kept], dim=3)
        zeros = rows_bKNW.new_zeros(*rows_bKNW.shape[:3], self.nested.missing)
        return (torch.cat([kept[0], zeros, kept[1]], dim=3), *others)

    def like(self) -> tuple[Tensor, ...]:
        """Tensors of the kind that new tokens after this run need, [b, K, any, W]."""
        if not self.compressed and self.nested is None:
            return self.tensors
        width = sum(t.shape[3] for t in self.tensors[: 2 if self.compressed else 1])
        width += self.nested.missing if self.nested else 0
        kind = self.tensors[1] if self.compressed else self.tensors[0]
        others = () if self.compressed else self.tensors[1:]
        return (kind.new_empty(*kind.shape[:2], 1, width), *others)

    def compress(self, rank: int) -> Segment:
        """The same run of latent rows with the latents in fp8, which takes a moment's copy."""
        if self.compressed:
            return self
        (rows_b1NW,) = self.views()
        kept = rank - (self.nested.missing if self.nested else 0)
        # Filled stretch by stretch: at its fullest moment the run is there twice, not three times.
        made: tuple[Tensor, ...] = ()
        for start in range(0, self.length, COMPRESSED_TOKENS):
            stretch = _quantized(rows_b1NW[:, 0, start : start + COMPRESSED_TOKENS], kept)
            if not made:
                made = tuple(t.new_empty(*t.shape[:2], self.length, t.shape[3]) for t in stretch)
            for whole, part in zip(made, stretch, strict=True):
                whole[:, :, start : start + COMPRESSED_TOKENS] = part
        return Segment(made, self.length, self.nested)


def _in_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def _joined(runs: Sequence[Segment]) -> Segment:
    """Runs of one kind, all compressed or none, as one; a copy if there are several."""
    if len(runs) == 1:
        return runs[0]
    pieces = zip(*(run.stored for run in runs), strict=True)
    return Segment(
        tuple(torch.cat(list(piece), dim=2) for piece in pieces),
        sum(run.length for run in runs),
        runs[0].nested,
    )


def _merge(layers: Sequence[SegmentedLayer]) -> None:
    """Joins short compressed runs that no fork holds, alike in all layers.

    A session that compresses at every turn would else have a run for each.
    """
    groups = layers[0].groups(max(layer.shared_runs for layer in layers))
    if all(len(group) == 1 for group in groups):
        return
    try:
        merged = [
            tuple(_joined([layer.frozen[index] for index in group]) for group in groups)
            for layer in layers
        ]
    except (MemoryError, RuntimeError) as error:
        # Fewer runs are worth having, not failing for.
        if is_of_memory(error):
            return
        raise
    before = [layer.frozen for layer in layers]
    try:
        for layer, runs in zip(layers, merged, strict=True):
            layer.frozen = runs
    except BaseException:  # Ctrl-C
        for layer, runs in zip(layers, before, strict=True):
            layer.frozen = runs
        raise


def _trimmed(run: Segment) -> Segment:
    """The same run without its spare room, if it is short and memory for a copy is there."""
    kept = _in_blocks(run.length)
    if not COPIED_TOKENS < run.length <= 2 * MOST_SPARE or kept >= run.tensors[0].shape[2]:
        return replace(run, roomy=False)
    try:
        whole = torch.contiguous_format
        copies = tuple(t[:, :, :kept].clone(memory_format=whole) for t in run.tensors)
    except (MemoryError, RuntimeError) as error:
        if is_of_memory(error):
            return replace(run, roomy=False)
        raise
    return Segment(copies, run.length, run.nested)


def _zeros(like: tuple[Tensor, ...], tokens: int) -> tuple[Tensor, ...]:
    """Storage for so many tokens, which code in and outside of inference mode can write."""
    # Zeros: a masked token still enters as 0 times its value, which must not be 0 times NaN.
    with torch.inference_mode(False):
        return tuple(t.new_zeros(*t.shape[:2], tokens, t.shape[3]) for t in like)


def _widened(latent: Tensor, rope: Tensor, scale: Tensor) -> Tensor:
    """Rows [b, 1, N, W] of a compressed run."""
    return torch.cat([(latent.float() * scale).to(rope.dtype), rope], dim=-1)


def _quantized(rows_bNW: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents in fp8 [b, 1, N, R], rotary keys [b, 1, N, 2 S] and scales [b, 1, N, 1]."""
    made = quantize(rows_bNW, rows_bNW.new_empty(0), rank)
    assert made.rope_bTS is not None and made.scale_bT is not None
    return made.rows_bTW[:, None], made.rope_bTS[:, None], made.scale_bT[:, None, :, None]


@dataclass(frozen=True)
class Part:
    """What one attention call reads from one segment."""

    tensors: tuple[Tensor, ...]
    """Views, each [b, K, N, W]: keys and values, or rows that are both."""
    mask_BxTN: Tensor | None = None
    """Boolean (True: attend) or additive mask [B or 1, 1, T, N]; None: see `causal`."""
    causal: bool = False
    """The last T tokens are the queries' own: query t sees tokens up to N - T + t."""
    latent: int | None = None
    """Where rows are keys and values at once: their latent columns, if fewer than the query's."""
    compressed: bool = False
    """Whether the tensors are those of rows in fp8, which `pair` decodes for the moment."""

    @property
    def cached(self) -> int:
        """Number of tokens N."""
        return self.tensors[0].shape[2]

    @property
    def copies(self) -> int:
        """How many sequences the storage holds: b."""
        return self.tensors[0].shape[0]

    @property
    def width(self) -> int:
        """Columns of a row, or of a key."""
        return sum(t.shape[3] for t in self.tensors[: 2 if self.compressed else 1])

    def cut(self, start: int, stop: int) -> Part:
        """Some of the tokens, seen by the same queries; as views."""
        tensors = tuple(t[:, :, start:stop] for t in self.tensors)
        mask = None if self.mask_BxTN is None else self.mask_BxTN[..., start:stop]
        return replace(self, tensors=tensors, mask_BxTN=mask, causal=False)

    def rows(self) -> Tensor:
        """Rows [b, N, W] of a latent cache."""
        return (_widened(*self.tensors) if self.compressed else self.tensors[0])[:, 0]

    def pair(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each [b, K, N, any]; rows are both."""
        if len(self.tensors) == 2:
            return self.tensors[0], self.tensors[1]
        rows_b1NW = self.rows()[:, None]
        return rows_b1NW, rows_b1NW


@dataclass(frozen=True)
class Placement:
    """Where a step writes when rows of a batch have tails of different lengths."""

    rows_B1: Tensor
    """Index of each row of the batch."""
    positions_BT: Tensor
    """Tail index of each new token."""
    stop: int
    """One past the last tail index written."""
    visible_BxTN: Tensor
    """Boolean mask [B, 1, T, stop] over the tail."""

    @classmethod
    def of(cls, lengths: Sequence[int], new_tokens: int, device: torch.device) -> Placement:
        """Places `new_tokens` tokens after the own tail of each row."""
        offsets_B1 = torch.tensor(lengths, device=device)[:, None]
        positions_BT = offsets_B1 + torch.arange(new_tokens, device=device)
        rows_B1 = torch.arange(len(lengths), device=device)[:, None]
        stop = max(lengths) + new_tokens
        visible_BTN = torch.arange(stop, device=device) <= positions_BT[..., None]
        return cls(rows_B1, positions_BT, stop, visible_BTN[:, None])


@dataclass(frozen=True)
class LayerState:
    """What a layer held at a moment; see the attributes of `SegmentedLayer`."""

    frozen: tuple[Segment, ...]
    tail: tuple[Tensor, ...]
    length: int
    expected: int
    shared_length: int
    shared_runs: int
    room: int
    is_initialized: bool


class SegmentedLayer(CacheLayerMixin):
    """One layer of a cache: frozen segments and an own tail (see the head of this file)."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, frozen: tuple[Segment, ...] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.frozen = frozen
        self.tail: tuple[Tensor, ...] = ()
        self.length = 0
        self.expected = 0
        """Tokens that are announced: the next allocation has room for all of them."""
        self.is_initialized = bool(frozen)
        # Tokens that the tail has room for; its storage is smaller where memory was short.
        self._room = 0
        # Tail tokens below this index belong to a fork as well and must not be overwritten.
        self._shared_length = 0
        # So may so many runs, which a batch reads once while all of its rows hold the same.
        self._shared_runs = len(frozen)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: storage is allocated by the first `write`."""
        self.is_initialized = True

    @property
    def capacity(self) -> int:
        """Tokens that the tail's storage holds."""
        return self.tail[0].shape[2] if self.tail else 0

    @property
    def shared_runs(self) -> int:
        """Frozen runs that forks may hold as well."""
        return self._shared_runs

    def limit_room(self, tokens: int) -> None:
        """Lets a tail that is frozen when it is full be so from so many tokens on.

        A shorter one is copied to grow, and each layer for itself.
        """
        if self.length > COPIED_TOKENS:
            self._room = min(self._room, tokens)

    def segments(self) -> tuple[Segment, ...]:
        """Everything cached, the own tail as the last segment."""
        if not self.length:
            return self.frozen
        return (*self.frozen, Segment(self.tail, self.length))

    def fork(self) -> Self:
        """A layer that shares everything cached so far; no tensor is touched."""
        self._shared_length, self._shared_runs = self.length, len(self.frozen)
        return type(self)(self.segments())

    def row(self, index: int, length: int) -> Self:
        """One sequence of the batch, with the first `length` tokens of its tail, as views."""
        own = tuple(t[index : index + 1] for t in self.tail)
        return type(self)((*self.frozen, Segment(own, length)) if length else self.frozen)

    def reserve(self, like: tuple[Tensor, ...], tokens: int, wish: int = 0) -> None:
        """Makes room for `tokens` tail tokens in storage shaped like `like` ([B, K, any, W]).

        Where the tail grows, for `wish` tokens if memory allows.
        """
        room = self._room
        if tokens > room:
            room = _in_blocks(max(tokens, wish, int(room * GROWTH)))
        elif tokens <= self.capacity:
            return
        try:
            grown = _zeros(like, room)
        except (MemoryError, RuntimeError) as error:
            if _in_blocks(tokens) == room or not is_of_memory(error):
                raise
            # Spare room is worth having, not failing for. `_room` stays what it would have been:
            # when a tail is frozen must not depend on the memory that its layer found, but on
            # what all layers found (`SegmentedCache.settle`).
            grown = _zeros(like, _in_blocks(tokens))
        for new, old in zip(grown, self.tail, strict=bool(self.tail)):
            new[:, :, : self.length] = old[:, :, : self.length]
        if room > self._room:
            # The forks keep the storage they were given; this one is ours alone. (Where only the
            # storage makes up for a shortage, it counts as shared still, as in other layers.)
            self._shared_length = 0
        self.tail, self._room = grown, room
        self.is_initialized = True

    def make_room(self, tokens: int, like: tuple[Tensor, ...] = (), *, may_freeze: bool) -> None:
        """Makes sure that the tail can take `tokens` more tokens.

        Args:
            tokens: how many.
            like: tensors shaped like the storage, [B, K, any, W]; by default what is cached.
            may_freeze: whether a long tail may become a segment (its rows have one length).
        """
        like = like or self.tail or self.frozen[-1].like()
        full = self.length + tokens > self._room
        if full and may_freeze and self.length > COPIED_TOKENS:
            self.freeze(roomy=not self._shared_length)
            self._begin(like, tokens)
        self.reserve(like, self.length + tokens)

    def _begin(self, like: tuple[Tensor, ...], tokens: int) -> None:
        """Begins a tail with room for as many turns of so many tokens as the spare room takes."""
        spare = min(MOST_SPARE, int((GROWTH - 1) * self.get_seq_length()))
        many = len(self.frozen) >= MANY_RUNS
        self.reserve(like, tokens, wish=spare // tokens * tokens if many else 0)

    def trim(self) -> None:
        """Gives back the spare room of short tails that were frozen for being full.

        Each token is copied once at most; for a moment such a run is there twice. What finds no
        memory for that keeps its spare room, and so does what a fork holds.
        """
        if any(run.roomy for run in self.frozen):
            shared, own = self.frozen[: self.shared_runs], self.frozen[self.shared_runs :]
            self.frozen = (*shared, *(_trimmed(run) if run.roomy else run for run in own))

    def freeze(self, *, roomy: bool = False) -> None:
        """Makes the tail a segment; nothing is copied. Whether it is `roomy`: see `Segment`."""
        if self.length:
            self.frozen += (Segment(self.tail, self.length, roomy=roomy),)
        if self._shared_length:
            self._shared_runs = len(self.frozen)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.tail, self.length, self._shared_length, self._room = (), 0, 0, 0

    def compress(self, rank: int) -> None:
        """Turns everything cached so far into runs with fp8 latents, as many as there were."""
        self.freeze()
        # A compressed copy is ours alone.
        shared = sum(segment.compressed for segment in self.frozen[: self.shared_runs])
        self.frozen = tuple(segment.compress(rank) for segment in self.frozen)
        self._shared_runs = shared

    def groups(self, shared: int) -> list[list[int]]:
        """Which runs could be one: short ones of a kind, each with the next of its kind.

        Args:
            shared: so many runs at the beginning stay by themselves.
        """
        made = [[index] for index in range(shared)]
        for index, run in enumerate(self.frozen[shared:], start=shared):
            same = [group for group in made[shared:] if self.frozen[group[0]].nested == run.nested]
            held = sum(self.frozen[one].length for one in same[-1]) if same else 0
            if same and max(held, run.length) <= COPIED_TOKENS:
                same[-1].append(index)
            else:
                made.append([index])
        return made

    def narrow(self, vision_T: Tensor, nested: Nested) -> None:
        """Freezes the tail in two runs: its newest tokens that are of a video, and all others.

        Args:
            vision_T: True for the newest tokens that are.
            nested: the columns that their rows need to keep; the others are zero.
        """
        of_video_N = torch.zeros(self.length, dtype=torch.bool, device=vision_T.device)
        of_video_N[self.length - len(vision_T) :] = vision_T
        for chosen_N, lacks in ((of_video_N, nested), (~of_video_N, None)):
            index_M = chosen_N.nonzero()[:, 0]
            if not len(index_M):
                continue
            rows, *others = (t.index_select(2, index_M) for t in self.tail)
            if lacks is not None:
                start, stop = lacks.kept, lacks.kept + lacks.missing
                rows = torch.cat([rows[..., :start], rows[..., stop:]], dim=3)
            self.frozen += (Segment((rows, *others), len(index_M), lacks),)
        self._begin_anew()

    def gather(self, since: int) -> None:
        """Joins the runs frozen since there were `since` to one of each kind."""
        kept, new = self.frozen[:since], self.frozen[since:]
        kinds = dict.fromkeys(segment.nested for segment in new)
        self.frozen = kept
        for kind in kinds:
            same = [segment for segment in new if segment.nested == kind]
            self.frozen += (_joined(same),)

    def write(self, new: tuple[Tensor, ...], placement: Placement | None = None) -> None:
        """Appends tokens, each tensor [B, K, T, W], to the tail.

        Raises:
            ValueError: the tensors carry gradients (a cache holds constants).
        """
        if any(t.requires_grad for t in new):
            raise ValueError(
                "a cache holds constants, but the new rows need gradients. "
                "Run under torch.no_grad(), or pass use_cache=False to train."
            )
        if placement is None:
            self.make_room(max(new[0].shape[2], self.expected), new, may_freeze=True)
            stop = self.length + new[0].shape[2]
            self.expected = max(0, self.expected - new[0].shape[2])
        else:
            stop = placement.stop
            self.reserve(new, stop)
        for storage, value in zip(self.tail, new, strict=True):
            if placement is None:
                storage[:, :, self.length : stop] = value
            else:
                storage[placement.rows_B1, :, placement.positions_BT] = value.transpose(1, 2)
        self.length = stop

    def parts(
        self, new_tokens: int, mask_BxTN: Tensor | None, placement: Placement | None = None
    ) -> list[Part]:
        """What the `new_tokens` tokens written last may read, oldest segment first.

        A given mask spans all cached tokens and rules alone; without one the frozen segments are
        visible and the tail is causal.

        Raises:
            ValueError: a mask hides a frozen token where those do not lie in order any more.
        """
        apart = mask_BxTN is not None and any(segment.nested for segment in self.frozen)
        if apart:
            self._check_visible(mask_BxTN)
        parts: list[Part] = []
        start = 0
        for segment in self.frozen:
            part_mask = None if apart else _columns(mask_BxTN, start, segment.length)
            parts.append(Part(segment.stored, part_mask, compressed=segment.compressed))
            start += segment.length
        tail = tuple(t[:, :, : self.length] for t in self.tail)
        if placement is not None:
            parts.append(Part(tail, placement.visible_BxTN))
        else:
            tail_mask = _columns(mask_BxTN, start, self.length)
            parts.append(Part(tail, tail_mask, causal=tail_mask is None and new_tokens > 1))
        return parts

    def _check_visible(self, mask_BxTN: Tensor | None) -> None:
        frozen = _columns(mask_BxTN, 0, sum(segment.length for segment in self.frozen))
        hidden = frozen is not None and not bool(
            (frozen if frozen.dtype == torch.bool else frozen == 0).all()
        )
        if hidden:
            raise ValueError(
                "a mask hides cached tokens, but the cached vision tokens lie apart from the "
                "others, so it cannot be told which; leave the mask out, or hide new tokens only."
            )

    def joined(self) -> tuple[Tensor, ...]:
        """All cached tokens in one tensor each, [B, K, N, W]; a copy if there are segments."""
        own = tuple(t[:, :, : self.length] for t in self.tail)
        if not self.frozen:
            return own
        batch = max([s.tensors[0].shape[0] for s in self.frozen] + [t.shape[0] for t in own])
        pieces = [s.whole() for s in self.frozen] + ([own] if own else [])
        return tuple(
            torch.cat([t.expand(batch, -1, -1, -1) for t in same], dim=2)
            for same in zip(*pieces, strict=True)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Transformers' entry: appends keys and values, returns all of them."""
        self.write((key_states, value_states))
        keys, values = self.joined()
        return keys, values

    def get_seq_length(self) -> int:
        """Number of cached tokens."""
        return sum(s.length for s in self.frozen) + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `query_length` new queries will meet."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forgets everything; storage shared with forks is left alone."""
        self.frozen, self._shared_runs = (), 0
        self._begin_anew()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens (a negative number, as in transformers) of the own tail.

        Raises:
            ValueError: a positive number, or more tokens than the own tail holds.
        """
        kept = self.length + tokens_to_remove
        if tokens_to_remove > 0 or kept < 0:
            raise ValueError(
                f"cannot crop by {tokens_to_remove}: give the number of tokens to remove as a "
                f"negative number, at most {self.length} (the tokens cached since the last fork)."
            )
        if kept < self._shared_length:
            self.frozen += (Segment(self.tail, kept),) if kept else ()
            self._shared_runs = len(self.frozen)
            self._begin_anew()
        else:
            self.length = kept

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Selects rows of the batch (beam search); segments shared by all rows stay as they are."""
        self._map_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch; segments shared by all rows stay as they are."""
        self._map_batch(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows of the batch."""
        self._map_batch(lambda t: t[indices])

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        batch = self.tail[0].shape[0] if self.tail else 1
        self.tail = tuple(change(t) for t in self.tail)
        self.frozen = tuple(
            s
            if s.tensors[0].shape[0] == 1 and batch > 1
            else Segment(tuple(change(t) for t in s.tensors), s.length, s.nested)
            for s in self.frozen
        )
        self._shared_length = 0

    def state(self) -> LayerState:
        """What `restore` needs; refers to the storage and copies nothing."""
        return LayerState(
            self.frozen, self.tail, self.length, self.expected, self._shared_length,
            self._shared_runs, self._room, self.is_initialized,
        )  # fmt: skip

    def restore(self, state: LayerState) -> None:
        """Goes back to an earlier state: what is cached is added to, never overwritten."""
        self.frozen, self.tail, self.length = state.frozen, state.tail, state.length
        self.expected, self._shared_length = state.expected, state.shared_length
        self._shared_runs, self._room = state.shared_runs, state.room
        self.is_initialized = state.is_initialized

    def storages(self) -> Iterator[torch.UntypedStorage]:
        """Every storage that this layer keeps alive, shared ones included."""
        for segment in self.frozen:
            yield from (t.untyped_storage() for t in segment.tensors)
        yield from (t.untyped_storage() for t in self.tail)


class SegmentedCache(Cache):
    """A transformers cache of `SegmentedLayer`s."""

    def __init__(self, layers: Iterable[SegmentedLayer]) -> None:
        super().__init__(layers=list(layers))
        self.placement: Placement | None = None
        self.over_segments = False
        self._held = 0
        """How many blocks may still take back what is appended."""

    def segmented(self, layer_idx: int) -> SegmentedLayer:
        """One layer."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, SegmentedLayer)
        return layer

    def extend(
        self, layer_idx: int, new: tuple[Tensor, ...], mask_BxTN: Tensor | None = None
    ) -> list[Part]:
        """Appends the new tokens of one layer and says what they may attend to."""
        self._settle_before(layer_idx)
        layer = self.segmented(layer_idx)
        layer.write(new, self.placement)
        return layer.parts(new[0].shape[2], mask_BxTN, self.placement)

    @contextmanager
    def step(self, placement: Placement | None = None) -> Iterator[None]:
        """Marks a forward pass whose attention reads segments, not one joined tensor."""
        self.placement, self.over_segments = placement, True
        try:
            yield
        finally:
            self.placement, self.over_segments = None, False

    @contextmanager
    def unchanged_on_failure(self) -> Iterator[None]:
        """If the block fails, layers hold again what they held before it.

        A failure in the middle of a forward pass has cached its tokens in some layers only. While
        the block runs, tails that it outgrew are kept: `COPIED_TOKENS` tokens a layer at most, or
        what a prompt's vision rows of a smaller rank were picked from; `settle` comes before it.
        """
        layers = [self.segmented(index) for index in range(len(self.layers))]
        states = [layer.state() for layer in layers]
        self._held += 1
        try:
            yield
        except BaseException:
            for layer, state in zip(layers, states, strict=True):
                layer.restore(state)
            raise
        finally:
            self._held -= 1

    def _settle_before(self, layer_idx: int) -> None:
        """Where nobody else does: before a forward pass of transformers' own."""
        if layer_idx == 0 and not self._held:
            self.settle()

    def settle(self) -> None:
        """Gives spare room back, a layer at a time, between two calls that append in all layers.

        Wherever it ends, the cache holds what it held.
        """
        layers = [self.segmented(index) for index in range(len(self.layers))]
        # Where one layer was refused spare room, none counts on it: all freeze at the same token.
        room = min(layer.capacity for layer in layers)
        for layer in layers:
            layer.limit_room(room)
        for layer in layers:
            layer.trim()

    def expect(self, tokens: int) -> None:
        """Announces how many tokens follow, so that they are allocated at once and never copied."""
        for index in range(len(self.layers)):
            layer = self.segmented(index)
            layer.expected = max(layer.expected, tokens)

    @contextmanager
    def prefilling(
        self, config: Any, tokens: int, *, vision: bool
    ) -> Iterator[Callable[[Tensor | None], None]]:
        """While the tokens of a prompt of one sequence are appended, run by run.

        Args:
            config: the text model's.
            tokens: of the whole prompt.
            vision: whether there are vision tokens among them.

        Yields:
            What is to be called after each run, with its vision mask [1, T] (None: all text).
        """
        self.expect(tokens)
        yield lambda _: None

    def fork(self) -> Self:
        """A cache with the same past. O(layers): no tensor is copied."""
        return self.of_layers([self.segmented(i).fork() for i in range(len(self.layers))])

    def row(self, index: int, length: int) -> Self:
        """One sequence of a batch whose tails differ in length, as views of its storage."""
        rows = [self.segmented(i).row(index, length) for i in range(len(self.layers))]
        return self.of_layers(rows)

    def of_layers(self, layers: Iterable[SegmentedLayer]) -> Self:
        """A cache of the same kind made of these layers."""
        made = type(self).__new__(type(self))
        SegmentedCache.__init__(made, layers)
        return made

    def allocated_bytes(self) -> int:
        """Bytes of all storage this cache keeps alive, shared segments and spare room included."""
        return allocated_bytes([self])


class LatentCache(SegmentedCache):
    """Cache of an M²LA model: per token and layer one contiguous row `[c (r) | k_rope (2 S)]`."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(SegmentedLayer() for _ in range(num_layers))

    def compress(self, config: InternVideo3TextConfig) -> None:
        """Turns everything cached so far into fp8 latents with a scale a row: about half the bytes.

        New tokens are cached in full. Forks keep what they share uncompressed.

        Raises:
            ValueError: the rows are not `[c | k_rope]`.
        """
        if config.row_form == "prerope":
            raise ValueError("rows before rotation have no fp8 form; they are never absorbed.")
        layers = [self.segmented(index) for index in range(len(self.layers))]
        # All tails first: should one layer find no memory, they still hold the same tokens in the
        # same segments, some of them compressed, which is a cache like any other.
        with self.unchanged_on_failure():
            for layer in layers:
                layer.freeze()
        for index, layer in enumerate(layers):
            layer.compress(config.rank(index))
        _merge(layers)

    @contextmanager
    def prefilling(
        self, config: Any, tokens: int, *, vision: bool
    ) -> Iterator[Callable[[Tensor | None], None]]:
        """As `SegmentedCache.prefilling`; vision rows of a smaller rank lose their zeros."""
        assert isinstance(config, InternVideo3TextConfig)
        layers = [self.segmented(index) for index in range(len(self.layers))]
        ranks = [(config.rank_of_vision(i), config.rank(i)) for i in range(len(layers))]
        if not vision or all(kept == rank for kept, rank in ranks):
            with super().prefilling(config, tokens, vision=vision) as appended:
                yield appended
            return
        # Layers differ in ranks, but all keep the same tokens in the same segments.
        nested = [Nested(kept, rank - kept) for kept, rank in ranks]
        since = [len(layer.frozen) for layer in layers]

        def narrow(vision_1T: Tensor | None) -> None:
            if vision_1T is not None:
                for layer, lacks in zip(layers, nested, strict=True):
                    layer.narrow(vision_1T[0], lacks)

        yield narrow
        for layer, count in zip(layers, since, strict=True):
            layer.gather(count)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Appends rows [B, 1, T, W], given as keys and as values; returns all rows twice."""
        assert key_states is value_states, "a latent cache stores one row per token"
        self._settle_before(layer_idx)
        layer = self.segmented(layer_idx)
        layer.write((key_states,))
        (rows,) = layer.joined()
        return rows, rows


class SharedKVCache(SegmentedCache):
    """Cache of a GQA model (keys and values [B, K, T, D]) whose forks share their past."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(SegmentedLayer() for _ in range(num_layers))

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> Any:
        """Appends keys and values.

        Returns:
            All keys and all values. Within a `step`, the parts to attend to instead, twice:
            transformers hands them on to the attention function unread.
        """
        if not self.over_segments:
            self._settle_before(layer_idx)
            return super().update(key_states, value_states, layer_idx)
        parts = self.extend(layer_idx, (key_states, value_states))
        return parts, parts


def allocated_bytes(caches: Iterable[SegmentedCache]) -> int:
    """Bytes of all storage that these caches keep alive together, each storage counted once."""
    sizes: dict[int, int] = {}
    for cache in caches:
        for index in range(len(cache.layers)):
            for storage in cache.segmented(index).storages():
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _columns(mask_BxTN: Tensor | None, start: int, length: int) -> Tensor | None:
    return None if mask_BxTN is None else mask_BxTN[..., start : start + length]
