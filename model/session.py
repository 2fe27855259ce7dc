"""One growing multimodal context on one cache.

A `Session` works on transformers' GQA Qwen3-VL and on the M²LA model. It renders and tokenises like
the processor, prefills only what is new (in chunks, also across a video), keeps explicit positions
and never reads the model's `rope_deltas`, and forks without copying.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from internvideo3.model import decoding
from internvideo3.model.cache import LatentCache
from internvideo3.model.decoding import Limits as Limits
from internvideo3.model.decoding import StopReason as StopReason
from internvideo3.model.decoding import wait_for
from internvideo3.model.forward import Tokens, logits, new_cache, run
from internvideo3.model.prompt import (
    Frames,
    Medium,
    Message,
    Piece,
    Prompter,
    PromptError,
    check_places,
)
from internvideo3.model.vision import Encoded, FeatureCache

CHUNK = {"cpu": 2048, "cuda": 65536}
"""Most tokens prefilled at once, by device: the paper's 64K, and what a CPU's caches like."""


@dataclass(frozen=True)
class Reply:
    """What the model answered."""

    text: str
    """Without special tokens."""
    token_ids: tuple[int, ...]
    """With the stop token, if there was one."""
    stop_reason: StopReason
    prompt_tokens: int
    """Tokens of the context before the reply."""
    new_tokens: int
    logps: tuple[float, ...] | None = None
    """Of each token, where the reply was drawn: at its temperature, barred ids aside."""


class Session:
    """A context that grows by messages, text or ids, and can be forked and continued.

    Text without media is deferred: it is prefilled together with what follows, or with the
    prompts of other sessions (`generate_batch`), when its outcome is asked for. What fails in its
    middle (bad input, no memory left, Ctrl-C) leaves the session as it was, and can be repeated.

    Args:
        model: a Qwen3-VL for conditional generation, GQA or M²LA. Its values stay; the storage of
            some weights is laid side by side when it first replies (`model.engine_layers`).
        processor: its `Qwen3VLProcessor`.
        device: where inputs go; the model's device by default.
        chunk: most tokens prefilled at once; by default what suits the device (`CHUNK`).
        features: keeps encoded media; give one to several sessions to share it.
        media_options: further arguments of the processor call for frames and images, e.g.
            `{"do_resize": False}`.

    Raises:
        ValueError: the chunk is not at least one token, or the model's weights are elsewhere.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        device: torch.device | str | None = None,
        chunk: int | None = None,
        features: FeatureCache | None = None,
        media_options: Mapping[str, Any] | None = None,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}; prefill takes at least 1 token at a time.")
        self.model = model
        self.processor = processor
        self.device = torch.device(device or model.device)
        if self.device.type == "meta":
            raise ValueError(
                "the model's weights are on no device (kept elsewhere by accelerate, or not "
                "loaded). A session needs them on one device; or call the model's own generate()."
            )
        self.chunk = chunk or CHUNK.get(self.device.type, CHUNK["cpu"])
        self.features = FeatureCache() if features is None else features
        self.encode_s = 0.0
        """Seconds that this session, not its parents, spent in the vision tower."""
        self.prefill_s = 0.0
        """Seconds spent on prompts, without the vision tower; of a batch, this session's share."""
        self.decode_s = 0.0
        """Seconds spent on replies; of a batch, this session's share."""
        self.cache = new_cache(model)
        self._prompter = Prompter(processor, media_options)
        self._ids: tuple[tuple[int, ...], ...] = ()
        self._pending: list[int] = []
        self._position = 0
        self._tail = ""
        self._reply_open = False
        self._said = -1
        self._logits_Y: Tensor | None = None

    @property
    def ids(self) -> list[int]:
        """All token ids so far, deferred ones included."""
        return [token for run_ in self._ids for token in run_] + self._pending

    def __len__(self) -> int:
        """Number of tokens so far, deferred ones included."""
        return sum(len(run_) for run_ in self._ids) + len(self._pending)

    @property
    def logits_last(self) -> Tensor:
        """Next-token logits after everything so far, [vocabulary].

        Raises:
            PromptError: the session is empty.
        """
        self.prefill()
        if self._logits_Y is None:
            raise PromptError("an empty session predicts nothing; append something first.")
        return self._logits_Y

    def bytes(self) -> int:
        """Bytes of cache storage this session keeps alive: shared prefix and spare room included.

        Deferred text is prefilled first.
        """
        self.prefill()
        return self.cache.allocated_bytes()

    def append(self, messages: Sequence[Message], frames: Sequence[Frames] = ()) -> int:
        """Appends whole turns, and the opening of a reply if the last one is a user's or a tool's.

        Args:
            messages: turns in transformers' chat form; `{"type": "video"}` contents stand for the
                frames in order, `{"type": "image", "image": ...}` contents carry their image.
            frames: the videos.

        Returns:
            Number of tokens appended.

        Raises:
            PromptError: placeholders and media do not match.
        """
        images = [
            part["image"]
            for message in messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part.get("type") == "image"
        ]
        return self.append_text(
            self._close_reply() + self._prompter.render(messages), frames, images
        )

    def append_text(
        self, text: str, frames: Sequence[Frames] = (), images: Sequence[Any] = ()
    ) -> int:
        """Appends rendered text as it stands, special tokens and media placeholders included.

        The ids of all text appended are those of the whole text at once.

        Returns:
            Number of tokens appended.

        Raises:
            PromptError: placeholders and media do not match, or the text would merge with a token
                that is cached already.
        """
        before = len(self)
        joined = self._tail + text
        piece = self._prompter.piece(joined, frames, images)
        with self._unchanged_on_failure():
            self._cache_said_vision()
            self._pending += piece.ids[self._unmerge(piece.ids) :]
            if piece.media:
                self._prefill(piece.media)
            self._tail = self._prompter.tail(joined)
            self._reply_open = False
        return len(self) - before

    def append_ids(self, ids: Sequence[int]) -> int:
        """Appends token ids and prefills them at once; vision tokens are not allowed.

        Returns:
            Number of tokens appended.

        Raises:
            PromptError: an id stands for an image or a video.
        """
        media = {self.model.config.image_token_id, self.model.config.video_token_id}
        if media.intersection(ids):
            raise PromptError("these ids hold vision tokens; append their frames with append_text.")
        self._append_raw(ids, [])
        return len(ids)

    def append_piece(self, piece: Piece) -> int:
        """Appends token ids together with their media and prefills them at once.

        Returns:
            Number of tokens appended.

        Raises:
            PromptError: the vision tokens are not as many as the media have.
        """
        check_places(piece, self.model.config)
        self._append_raw(piece.ids, piece.media)
        return len(piece.ids)

    def _append_raw(self, ids: Sequence[int], media: list[Medium]) -> None:
        with self._unchanged_on_failure():
            self._cache_said_vision()
            self._pending += ids
            self._tail = ""
            self._reply_open = False
            self._prefill(media)

    def _cache_said_vision(self) -> None:
        """Caches the last token of a reply if it is of an image or video.

        No medium belongs to it, so that it must not be among tokens that media are placed at.
        """
        if {self.model.config.image_token_id, self.model.config.video_token_id} & {*self._pending}:
            self._prefill([])

    @contextmanager
    def _unchanged_on_failure(self) -> Iterator[None]:
        """If the block fails, the session is what it was before."""
        # First, and not at the end: Ctrl-C would then leave what was appended, and say it was not.
        self.cache.settle()
        kept, pending = dict(self.__dict__), list(self._pending)
        try:
            with self.cache.unchanged_on_failure():
                yield
        except BaseException:
            self.__dict__.update(kept)
            self._pending = pending
            raise

    def log_likelihood(self, ids: Sequence[int]) -> float:
        """Natural logarithm of the probability that `ids` follow, in one pass on a fork.

        Raises:
            PromptError: the session is empty, there are no ids, or one is a vision token.
        """
        if not ids or {self.model.config.image_token_id, self.model.config.video_token_id} & {*ids}:
            raise PromptError("give at least one id, and none of an image or a video.")
        scores_TY = self.logits_last[None].float()
        if len(ids) > 1:
            fork = self.fork()
            with torch.no_grad():
                tokens, _ = fork._place(Piece(list(ids[:-1]), []))
                fork.cache.expect(len(ids) - 1)
                hidden_1TX = run(self.model, fork.cache, tokens)
                following_TY = logits(self.model, hidden_1TX[0]).float()
            scores_TY = torch.cat([scores_TY, following_TY])
        logs_TY = torch.log_softmax(scores_TY, -1)
        return float(logs_TY[torch.arange(len(ids)), list(ids)].sum())

    def prefill(self) -> None:
        """Caches deferred text now."""
        with self._unchanged_on_failure():
            self._prefill([])

    def compress(self) -> None:
        """Keeps what is cached so far with latents in fp8, in about half the bytes; M²LA only.

        What follows is cached in full. So is, from then on, what a session does not share with the
        others of a batch (`generate_batch`): compress it again if it is long. Outcomes change by
        fp8's rounding (kernels/latent_decode).

        Raises:
            ValueError: the model caches keys and values, or rows before rotation.
        """
        self.prefill()
        if not isinstance(self.cache, LatentCache):
            raise ValueError("only a latent cache has an fp8 form; this model is GQA.")
        self.cache.compress(self.model.config.text_config)

    def fork(self) -> Session:
        """A session with the same past; neither sees what the other appends. Copies nothing.

        Deferred text is prefilled first, so that it is shared as well.
        """
        self.prefill()
        child = object.__new__(type(self))
        child.__dict__.update(self.__dict__)
        child.cache = self.cache.fork()
        child._pending = []
        child.encode_s = child.prefill_s = child.decode_s = 0.0
        return child

    def generate(self, limits: Limits) -> Reply:
        """Answers, greedily or by sampling; the reply becomes part of the context."""
        return self.generate_batch([self], limits)[0]

    @staticmethod
    def generate_batch(
        sessions: Sequence[Session], limits: Limits | Sequence[Limits]
    ) -> list[Reply]:
        """Answers in several sessions of one model together.

        Forks of one session share its cache: the shared prefix is neither copied nor read more than
        once per step. The replies are those that each session would give alone.

        Raises:
            PromptError: the models differ, a session is empty, or one is given twice.
            ValueError: an id to be barred is not in the vocabulary, or all of it is barred.
        """
        if not sessions:
            return []
        first = sessions[0]
        each = [limits] * len(sessions) if isinstance(limits, Limits) else list(limits)
        distinct = len({id(s) for s in sessions}) == len(sessions)
        if not distinct or any(s.model is not first.model for s in sessions):
            raise PromptError("a batch takes different sessions of one model.")
        if not all(len(s) for s in sessions):
            raise PromptError("an empty session cannot answer; append something first.")
        rows = [s._row(limit) for s, limit in zip(sessions, each, strict=True)]
        with ExitStack() as held:
            for session in sessions:
                held.enter_context(session._unchanged_on_failure())
            continued = decoding.generate(first.model, rows, first._stop_ids(), first.chunk)
            return [s._accept(c) for s, c in zip(sessions, continued, strict=True)]

    def _row(self, limits: Limits) -> decoding.Row:
        return decoding.Row(self.cache, self._pending, self._position, self._logits_Y, limits)

    def _accept(self, continued: decoding.Continued) -> Reply:
        prompt_tokens = len(self)
        reply_ids = continued.token_ids
        self._ids = (*self._ids, tuple(self._pending), tuple(reply_ids[:-1]))
        self._pending = reply_ids[-1:]
        self.cache = continued.cache
        self._move_to(continued.position)
        self._logits_Y = None
        self.prefill_s += continued.prefill_s
        self.decode_s += continued.decode_s
        text: str = self.processor.tokenizer.decode(
            reply_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self._tail, self._reply_open, self._said = "", True, reply_ids[-1]
        return Reply(
            text, tuple(reply_ids), continued.stop_reason, prompt_tokens, len(reply_ids),
            continued.logps,
        )  # fmt: skip

    def _stop_ids(self) -> list[int]:
        """End-of-turn ids of the generation configuration and of the tokenizer."""
        named = self.model.generation_config.eos_token_id
        ids = [named] if isinstance(named, int) else list(named or ())
        return sorted({*ids, self.processor.tokenizer.eos_token_id} - {None})

    def _close_reply(self) -> str:
        """What is missing to end the model's own turn before another one begins."""
        if not self._reply_open:
            return ""
        closing = self._prompter.closing
        end = self._prompter.tokenize(closing)[0]
        return (
            closing[len(self.processor.tokenizer.decode([end])) :] if self._said == end else closing
        )

    def _unmerge(self, joined_ids: list[int]) -> int:
        """Takes deferred tokens back that would be others together with the text that follows.

        Args:
            joined_ids: ids of the text since the last special token, with what follows.

        Returns:
            How many of `joined_ids` are part of the context already.
        """
        tail_ids = self._prompter.tokenize(self._tail) if self._tail else []
        same = 0
        for old, new in zip(tail_ids, joined_ids, strict=False):
            if old != new:
                break
            same += 1
        back = len(tail_ids) - same
        if back > len(self._pending):
            raise PromptError(
                f"the text would merge with {self._tail[-20:]!r}, which is cached already. "
                "Split the prompt at a special token."
            )
        if back:
            del self._pending[-back:]
        return same

    def _prefill(self, media: list[Medium]) -> None:
        """Caches the pending tokens, among them those of the given media."""
        if not self._pending:
            return
        piece, self._pending = Piece(self._pending, media), []
        started, encoded_before_s = time.perf_counter(), self.encode_s
        with torch.no_grad():
            tokens, following = self._place(piece)
            text, count = self.model.config.text_config, len(piece.ids)
            with self.cache.prefilling(text, count, vision=bool(media)) as appended:
                for chunk in tokens.chunks(self.chunk):
                    hidden_1TX = run(self.model, self.cache, chunk)
                    appended(chunk.visual_BT)
            self._logits_Y = logits(self.model, hidden_1TX[0, -1])
        self._move_to(following)
        self._ids = (*self._ids, tuple(piece.ids))
        wait_for(self.device)
        self.prefill_s += time.perf_counter() - started - (self.encode_s - encoded_before_s)

    def _move_to(self, following: int) -> None:
        """Goes on from this position; says once that it is beyond what the model was made for."""
        most = self.model.config.text_config.max_position_embeddings
        if self._position <= most < following:
            warnings.warn(
                f"the context reaches position {following}, and this model was made for {most} "
                "(max_position_embeddings); what lies beyond may be understood poorly.",
                stacklevel=_callers_level(),
            )
        self._position = following

    def _place(self, piece: Piece) -> tuple[Tokens, int]:
        """Tokens of a piece with their positions, and the position that follows."""
        ids_1T = torch.tensor([piece.ids], device=self.device)
        if not piece.media:
            following = self._position + len(piece.ids)
            positions_T = torch.arange(self._position, following, device=self.device)
            return Tokens(ids_1T, positions_T.expand(3, 1, -1)), following
        config = self.model.config
        image_1T, video_1T = ids_1T == config.image_token_id, ids_1T == config.video_token_id
        grids = {
            f"{kind}_grid_thw": torch.stack([m.grid_thw for m in piece.media if m.kind == kind])
            for kind in {m.kind for m in piece.media}
        }
        positions_3T, _ = self.model.model.get_rope_index(
            ids_1T, mm_token_type_ids=image_1T.int() + 2 * video_1T.int(), **grids
        )
        positions_3T = positions_3T + self._position
        tokens = Tokens(ids_1T, positions_3T, image_1T | video_1T, self._encode(piece))
        return tokens, int(positions_3T.max()) + 1

    def _encode(self, piece: Piece) -> Encoded:
        started = time.perf_counter()
        encoded = Encoded.joined(
            [
                self.features.encode(self.model, m.kind, m.pixels, m.grid_thw, m.key)
                for m in piece.media
            ]
        )
        wait_for(self.device)
        self.encode_s += time.perf_counter() - started
        return encoded


def _callers_level() -> int:
    """How far up the stack, for `warnings.warn` one call further down, the first other file is."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_code.co_filename == __file__:
        frame, level = frame.f_back, level + 1
    return level
