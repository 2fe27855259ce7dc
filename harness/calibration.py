"""What `internvideo3 convert` calibrates on: text, and videos where the source sees.

The shipped set is English prose (`texts/`) and drawn videos of the scale world with a question and
its answer. Own files are `.txt` (a form feed separates documents) and videos.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from internvideo3.tasks.video import read_frames
from internvideo3.tasks.world.difficulty import FILE_FPS
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.questions import draw_question
from internvideo3.tasks.world.scenes import draw_video

Batch = dict[str, Any]

TEXTS = Path(__file__).parent / "texts"
DEFAULT_TEXT = TEXTS / "english.txt"
HELD_OUT_TEXT = TEXTS / "held_out.txt"

VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
DRAWN_VIDEOS = 16
DRAWN_FROM = 95 * 10**7
"""First seed of drawn videos; no suite and no training batch of the scale world uses it."""
HELD_OUT_VIDEOS = 24
HELD_OUT_FROM = DRAWN_FROM + 10**6
"""First seed of the drawn videos that a conversion is judged on."""
DRAWN_SECONDS = (4, 8, 16)
DRAWN_SIDE_PX = 64
QUESTION_FAMILIES = ("motion", "colour", "order", "depth", "shape", "count")
VIDEO_FPS, VIDEO_FRAMES = 1.0, 64
REPLY_HEAD, END_OF_TURN = "<|im_start|>assistant\n", "<|im_end|>"
"""ChatML, which every Qwen speaks."""
UNLABELLED = -100
"""In `labels`: a token that is not judged."""
VIDEO_REQUEST = "Describe in detail what happens in this video, in the order in which it happens."


class CalibrationError(ValueError):
    """A calibration set that cannot be used; says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Turns files into model inputs."""

    tokenizer: Any
    processor: Any | None
    """Of a source that sees; None for a text model."""
    tokens: int
    """Longest text in tokens. Each begins at the start of a document, as the model expects."""
    loss: Callable[[Batch], float] | None = None
    """The source's loss on a batch's labels. Drawn videos' answers are then spelt as the source
    would: the scale model writes a space first, Qwen3-VL does not, and neither knows the other."""

    def read(self, files: Sequence[Path]) -> list[Batch]:
        """Model inputs of text files and videos.

        Raises:
            CalibrationError: a file is missing, empty or of another kind, or a video that a text
                model cannot see.
        """
        batches: list[Batch] = []
        for file in files:
            if not file.is_file():
                raise CalibrationError(f"no calibration file {file}; give .txt files or videos.")
            if file.suffix == ".txt":
                batches += self.texts(file)
            elif file.suffix.lower() in VIDEO_ENDINGS:
                batches.append(self._video_file(file))
            else:
                raise CalibrationError(
                    f"{file} is neither text (.txt) nor a video ({', '.join(VIDEO_ENDINGS)})."
                )
        return batches

    def default(self) -> list[Batch]:
        """The shipped set."""
        drawn = [] if self.processor is None else list(self._drawn(DRAWN_FROM, DRAWN_VIDEOS))
        return [*drawn, *self.texts(DEFAULT_TEXT)]

    def held_out_videos(self) -> list[Batch]:
        """Drawn videos that are not in the default set, judged by their answers alone.

        None for a text model.
        """
        if self.processor is None:
            return []
        drawn = self._drawn(HELD_OUT_FROM, HELD_OUT_VIDEOS)
        return [answer_labelled(batch, self.tokenizer) for batch in drawn]

    def texts(self, file: Path) -> list[Batch]:
        """The documents of a text file, each cut to `tokens`.

        Raises:
            CalibrationError: the file is not UTF-8, or has no document of at least 16 tokens.
        """
        try:
            documents = file.read_text(encoding="utf-8").split("\f")
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{file} is not UTF-8 text ({error}).") from error
        found = [self._text(document.strip()) for document in documents]
        long_enough = [batch for batch in found if batch["input_ids"].shape[1] >= 16]
        if not long_enough:
            raise CalibrationError(f"{file} has no document of at least 16 tokens.")
        return long_enough

    def _text(self, document: str) -> Batch:
        ids = self.tokenizer(document, return_tensors="pt")["input_ids"][:, : self.tokens]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.processor is not None:
            batch["mm_token_type_ids"] = torch.zeros_like(ids)
        return batch

    def _video_file(self, file: Path) -> Batch:
        if self.processor is None:
            raise CalibrationError(f"{file} is a video, but the source reads text only.")
        frames = read_frames(file, fps=VIDEO_FPS, max_frames=VIDEO_FRAMES)
        metadata = VideoMetadata(
            total_num_frames=frames.total_frames,
            fps=frames.source_fps,
            frames_indices=list(frames.indices),
        )
        return self._video(frames.pixels_THWC, metadata, VIDEO_REQUEST)

    def _drawn(self, first: int, count: int) -> Iterator[Batch]:
        """Videos of the scale world, each with a question and its answer."""
        for index in range(count):
            rng = random.Random(f"convert/{first + index}")
            seconds = DRAWN_SECONDS[index % len(DRAWN_SECONDS)]
            spec = draw_video(first + index, seconds, "main")
            times = np.arange(2 * seconds) / 2
            metadata = VideoMetadata(
                total_num_frames=seconds * FILE_FPS,
                fps=FILE_FPS,
                frames_indices=(times * FILE_FPS).astype(int).tolist(),
            )
            turn = index % len(QUESTION_FAMILIES)
            families = QUESTION_FAMILIES[turn:] + QUESTION_FAMILIES[:turn]
            asked = next(filter(None, (draw_question(spec, rng, one) for one in families)), None)
            request = asked.prompt if asked else VIDEO_REQUEST
            batch = self._video(paint(spec, times, DRAWN_SIDE_PX), metadata, request)
            yield self._replied(batch, asked.answer) if asked else batch

    def _replied(self, batch: Batch, answer: str) -> Batch:
        spelt = [answered(batch, self.tokenizer, space + answer) for space in ("", " ")]
        if self.loss is None:
            return spelt[0]
        losses = [self.loss(answer_labelled(one, self.tokenizer)) for one in spelt]
        return spelt[losses.index(min(losses))]

    def _video(self, pixels_THWC: Any, metadata: VideoMetadata, request: str) -> Batch:
        assert self.processor is not None
        content = [{"type": "video"}, {"type": "text", "text": request}]
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = self.processor(
            text=[prompt],
            videos=[torch.from_numpy(pixels_THWC).permute(0, 3, 1, 2)],
            video_metadata=[metadata],
            do_sample_frames=False,
            cap_pixels_per_frame=False,  # as `model.prompt` has it
            return_tensors="pt",
        )
        return dict(inputs)


def first_tokens(batch: Batch, tokens: int) -> Batch:
    """The beginning of a text."""
    return {name: value[:, :tokens] for name, value in batch.items()}


def answered(inputs: Batch, tokenizer: Any, reply: str) -> Batch:
    """The inputs with a reply's own tokens and the end of the turn after the prompt.

    Rendered as one text, the prompt's last line break could join the reply's first token.
    """
    said = tokenizer(reply + END_OF_TURN, add_special_tokens=False, return_tensors="pt")
    longer = dict(inputs)
    for name, fill in (("input_ids", None), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        ids = said["input_ids"]
        new = ids if fill is None else ids.new_full(ids.shape, fill)
        longer[name] = torch.cat([inputs[name], new.to(inputs[name].dtype)], dim=1)
    return longer


def answer_labelled(batch: Batch, tokenizer: Any) -> Batch:
    """The batch with labels on its last turn's reply alone.

    Raises:
        CalibrationError: no turn of an assistant begins in it.
    """
    head = tokenizer(REPLY_HEAD, add_special_tokens=False)["input_ids"]
    ids = batch["input_ids"][0].tolist()
    starts = [at for at in range(len(ids)) if ids[at : at + len(head)] == head]
    if not starts:
        raise CalibrationError(f"no reply begins in the batch: {REPLY_HEAD!r} is not in it.")
    labels = batch["input_ids"].clone()
    labels[:, : starts[-1] + len(head)] = UNLABELLED
    return batch | {"labels": labels}
