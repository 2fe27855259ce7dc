"""Direct answers: one prefill for a video and its prompt prefix, one fork for a question.

Questions that share a prompt prefix (system turn, video) form a group. A group's video is decoded
while groups before it are answered, encoded and prefilled once, and forked for each question; the
forks of a group are decoded together. Answers are those of one-by-one decoding.

A sample that fails (unreadable video, out of memory) is an outcome with an error, never an
exception: one bad file does not end a run.
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from internvideo3.harness.frame_cache import FrameCache
from internvideo3.harness.settings import NEW_TOKENS, Settings
from internvideo3.model.fitting import fit_image, fitter
from internvideo3.model.session import Limits, Reply, Session
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import Frames

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video, or the part of it between two times."""

    path: str
    """Path of the file."""
    start_s: float | None = None
    """Where the part starts; None for the beginning."""
    end_s: float | None = None
    """Where the part ends; None for the end."""
    fps: float | None = None
    """Frames from a second of it; None for what the settings say."""
    shuffled: bool = False
    """Whether its frames are shown in another order, at the times of the true one."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing to answer: a chat whose last turn awaits a reply."""

    id: str
    """Identifier, unique in the run."""
    messages: tuple[Message, ...]
    """Chat messages in the Hugging Face form; videos are `{"type": "video"}` placeholders."""
    clips: tuple[Clip, ...] = ()
    """The videos of the placeholders, in order."""
    images: tuple[Any, ...] = ()
    """The images of the placeholders, in order, as Pillow has them."""
    max_new_tokens: int | None = None
    """Most tokens of the reply as the task has it; the settings' value goes first."""
    temperature: float = 0.0
    """0 for greedy decoding."""


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Where one sample's time went; what questions share is divided among them."""

    decode_s: float = 0.0
    """Reading and fitting frames, in the thread ahead."""
    encode_s: float = 0.0
    """The vision tower."""
    prefill_s: float = 0.0
    """The text model over the prompt, and the processor's work on it."""
    generate_s: float = 0.0
    """The reply."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a question: a reply, or the error that prevented it."""

    question: Question
    reply: Reply | None
    error: dict[str, str] | None
    seconds: Seconds
    agent: dict[str, Any] | None = None
    """How a rollout came to it and what it cost; None for a direct answer."""
    trace: dict[str, Any] | None = None
    """The whole rollout."""
    notes: tuple[str, ...] = ()
    """What is to be known of its videos, though they were read."""


@dataclass(frozen=True)
class _Rendered:
    """A question's chat as text, cut behind its last video."""

    question: Question
    prefix: str
    tail: str


@dataclass(frozen=True)
class Decoded:
    """The frames of a group's clips."""

    frames: tuple[Frames, ...]
    seconds: float
    """How long it took."""


Batch = list[_Rendered]
THINK = "<think>\n"
"""What a reply with thinking begins with."""


class Answerer:
    """Answers questions with one model; holds no state between calls."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        settings: Settings,
        cache: FrameCache | None = None,
        reader: IsolatedReader | None = None,
        ahead: int | None = None,
    ):
        """Make an answerer.

        Args:
            model: the model.
            processor: its processor.
            settings: what answers depend on.
            cache: keeps decoded frames; None for none.
            reader: decodes videos; None for one of its own.
            ahead: most videos that are decoded before they are needed, each by a process of its
                own; None for what the CPU cores allow.
        """
        self.ahead = ahead or decoders()
        self.model = model
        self.processor = processor
        self.settings = settings
        self.cache = cache
        self.reader = reader or IsolatedReader(self.ahead)
        self._video_end = processor.tokenizer.decode([model.config.vision_end_token_id])

    def close(self) -> None:
        """End the decoding process."""
        self.reader.close()

    def at(self, settings: Settings) -> "Answerer":
        """The same model at other settings."""
        return Answerer(self.model, self.processor, settings, self.cache, self.reader, self.ahead)

    def answer(
        self,
        questions: Sequence[Question],
        known: Callable[[str], bool] = lambda _: False,
    ) -> Iterator[list[Outcome]]:
        """Answer questions, a batch at a time, in the order in which their videos first appear.

        Args:
            questions: what to answer.
            known: whether the question of an id needs no answer. Known questions are left out
                after the batches are formed, so that a resumed run decodes the same batches.

        Yields:
            The outcomes of one batch: questions on the same video, together complete.
        """
        groups = self._groups(questions, known)
        for batches, decoded in _decoded_ahead(groups, self.decode, self.ahead):
            yield from self._answer_group(batches, decoded)

    def _groups(
        self, questions: Sequence[Question], known: Callable[[str], bool]
    ) -> Iterator[list[Batch]]:
        """Batches that share a prefix, without what is known."""
        groups: dict[tuple[str, tuple[Clip, ...], tuple[str, ...]], Batch] = {}
        for question in questions:
            rendered = self._render(question)
            images = tuple(_image_key(image) for image in question.images)
            groups.setdefault((rendered.prefix, question.clips, images), []).append(rendered)
        size = self.settings.batch
        for group in groups.values():
            whole = [group[at : at + size] for at in range(0, len(group), size)]
            left = [[one for one in batch if not known(one.question.id)] for batch in whole]
            if any(left):
                yield [batch for batch in left if batch]

    def _render(self, question: Question) -> _Rendered:
        text = self.processor.apply_chat_template(
            list(question.messages),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=self.settings.thinking,
        )
        if self.settings.thinking and not text.endswith(THINK):
            # Templates without a thinking mode ignore the argument; the reply is begun for them.
            text += THINK
        cut = text.rfind(self._video_end)
        cut = cut + len(self._video_end) if cut >= 0 else 0
        return _Rendered(question, text[:cut], text[cut:])

    def decode(self, clips: tuple[Clip, ...]) -> Decoded:
        """Read a group's videos and fit their frames to the settings.

        Raises:
            VideoError: a video cannot be read.
        """
        started = time.perf_counter()
        frames = tuple(self._frames(clip) for clip in clips)
        return Decoded(frames, time.perf_counter() - started)

    def _frames(self, clip: Clip) -> Frames:
        """A clip's frames, fitted; from the cache where there is one and it has them."""
        factor, settings = _pixel_factor(self.model.config), self.settings
        fps = clip.fps or settings.fps

        def make() -> Frames:
            return self.reader.read(
                clip.path,
                fps=fps,
                max_frames=settings.max_frames,
                start_s=clip.start_s,
                end_s=clip.end_s,
                fit=fitter(factor, settings.bounds),
            )

        if self.cache is None:
            frames = make()
        else:
            bounds = settings.video_pixels or (settings.min_pixels, settings.max_pixels)
            whole = settings.video_pixels is not None
            recipe = (fps, settings.max_frames, clip.start_s, clip.end_s, bounds, whole)
            frames = self.cache.get(clip.path, (*recipe, factor), make)
        return shuffle_frames(frames) if clip.shuffled else frames

    def _images(self, question: Question) -> list[Any]:
        factor, settings = _pixel_factor(self.model.config), self.settings
        return [
            fit_image(image, factor, settings.min_pixels, settings.max_pixels)
            for image in question.images
        ]

    def _answer_group(
        self, batches: list[Batch], decoded: "Future[Decoded]"
    ) -> Iterator[list[Outcome]]:
        everything = [one for batch in batches for one in batch]
        try:
            video = decoded.result()
            started = time.perf_counter()
            # Frames come fitted to the patch grid; resizing them again would blur them.
            options = {"do_resize": False}
            prefix = Session(self.model, self.processor, media_options=options)
            if everything[0].prefix:
                images = self._images(everything[0].question)
                prefix.append_text(everything[0].prefix, video.frames, images)
                prefix.prefill()
            appended_s = time.perf_counter() - started
        except Exception as error:  # an outcome of these samples, recorded with its reason
            yield [failed(one.question, error) for one in everything]
            return
        shared = Seconds(
            decode_s=video.seconds / len(everything),
            encode_s=prefix.encode_s / len(everything),
            prefill_s=(appended_s - prefix.encode_s) / len(everything),
        )
        notes = _notes(video.frames)
        for batch in batches:
            outcomes = self._answer_batch(prefix, batch, shared)
            yield [replace(outcome, notes=notes) for outcome in outcomes]

    def _answer_batch(self, prefix: Session, batch: Batch, shared: Seconds) -> list[Outcome]:
        """Decode a batch together; if that fails, one by one, so that one cannot fail others."""
        try:
            return self._generate(prefix, batch, shared)
        except Exception as error:  # as above
            if len(batch) == 1:
                return [failed(batch[0].question, error)]
        return [self._answer_batch(prefix, [one], shared)[0] for one in batch]

    def _generate(self, prefix: Session, batch: Batch, shared: Seconds) -> list[Outcome]:
        started = time.perf_counter()
        forks = [prefix.fork() for _ in batch]
        for fork, one in zip(forks, batch, strict=True):
            fork.append_text(one.tail)
        replies = Session.generate_batch(forks, [self._limits(one.question) for one in batch])
        if self.settings.thinking:
            # The block was opened for the model: a reply that never closes it has no answer.
            replies = [replace(reply, text=THINK + reply.text) for reply in replies]
        each_s = (time.perf_counter() - started) / len(batch)
        return [
            Outcome(
                question=one.question,
                reply=reply,
                error=None,
                seconds=replace(
                    shared,
                    prefill_s=shared.prefill_s + fork.prefill_s,
                    generate_s=each_s - fork.prefill_s,
                ),
            )
            for one, fork, reply in zip(batch, forks, replies, strict=True)
        ]

    def _limits(self, question: Question) -> Limits:
        return Limits(
            max_new_tokens=self.settings.max_new_tokens or question.max_new_tokens or NEW_TOKENS,
            temperature=question.temperature,
            seed=self.settings.seed,
        )


def shuffle_frames(frames: Frames) -> Frames:
    """The same pictures in an order drawn from their content, at the times of the true order.

    It is never the true order, unless there is one picture.
    """
    order = _another_order(frames.digest, len(frames.indices))
    pixels_THWC = np.ascontiguousarray(frames.pixels_THWC[order])
    return replace(frames, pixels_THWC=pixels_THWC, digest=f"{frames.digest} shuffled")


def shuffle_images(images: Sequence[Any]) -> tuple[Any, ...]:
    """The same images in an order drawn from their content, which is never their own order."""
    digest = hashlib.sha256("".join(map(_image_key, images)).encode()).hexdigest()
    return tuple(images[at] for at in _another_order(digest, len(images)))


def _another_order(digest: str, count: int) -> NDArray[np.int64]:
    """An order of so many things drawn from a digest, and not the one that they are in."""
    order = np.random.default_rng(int(digest[:16], 16)).permutation(count)
    return np.roll(order, 1) if (order == np.arange(count)).all() else order


UNEVEN_S = 0.5
"""A frame may be so far from the time that the model is told before it is noted."""


def _notes(videos: Sequence[Frames]) -> tuple[str, ...]:
    return tuple(
        f"uneven frame times: a frame is up to {frames.off_s:.1f} s from the time that is told of "
        "it, which is its number by the average rate"
        for frames in videos
        if frames.off_s > UNEVEN_S
    )


def _image_key(image: Any) -> str:
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()


def _pixel_factor(config: Any) -> int:
    return int(config.vision_config.patch_size * config.vision_config.spatial_merge_size)


_CORES_OF_A_DECODER = 4
_MOST_DECODERS = 4
"""Each keeps the frames of one video in memory, up to some GiB."""


def decoders(processes: int = 1) -> int:
    """How many videos are decoded at once: one for every four cores that this process may use.

    Args:
        processes: how many processes share these cores.
    """
    cores = len(os.sched_getaffinity(0)) // processes
    return max(1, min(_MOST_DECODERS, cores // _CORES_OF_A_DECODER))


def _decoded_ahead(
    groups: Iterable[list[Batch]], decode: Callable[[tuple[Clip, ...]], Decoded], ahead: int
) -> Iterator[tuple[list[Batch], "Future[Decoded]"]]:
    """Each group with its frames, which threads decode while groups before it are answered.

    No more than `ahead` groups wait, so that no more frames are in memory.
    """
    # OpenMP keeps the number of threads per thread: without the initializer resizing in the new
    # thread would wake one thread a core.
    pool = ThreadPoolExecutor(
        max_workers=ahead,
        thread_name_prefix="decode",
        initializer=torch.set_num_threads,
        initargs=(torch.get_num_threads(),),
    )
    waiting: deque[tuple[list[Batch], Future[Decoded]]] = deque()
    try:
        for group in groups:
            waiting.append((group, pool.submit(decode, group[0][0].question.clips)))
            if len(waiting) > ahead:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def failed(question: Question, error: BaseException) -> Outcome:
    """The outcome of a question that an error kept from being answered."""
    reason = {"type": type(error).__name__, "message": str(error)}
    return Outcome(question=question, reply=None, error=reason, seconds=Seconds())
