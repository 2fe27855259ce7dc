"""Text, frames and images to token ids, exactly as the processor makes them of a whole chat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.video_utils import VideoMetadata

Message = dict[str, Any]


class Frames(Protocol):
    """Decoded frames with their true place in the source (`internvideo3.tasks.video.Frames`)."""

    @property
    def pixels_THWC(self) -> np.ndarray[Any, Any]:  # noqa: N802
        """Frames, uint8."""

    @property
    def indices(self) -> Sequence[int]:
        """Index of each frame in the source."""

    @property
    def source_fps(self) -> float:
        """Frames per second of the source."""

    @property
    def total_frames(self) -> int:
        """Number of frames of the source."""


class PromptError(ValueError):
    """A prompt that cannot be appended as asked."""


@dataclass
class Medium:
    """One image or video of a piece, ready for the vision tower."""

    kind: str
    """"image" or "video"."""
    pixels: Tensor
    grid_thw: Tensor
    key: str
    """Names the content, or ""."""


@dataclass
class Piece:
    """Token ids and the media among them."""

    ids: list[int]
    media: list[Medium] = field(default_factory=list)
    """In the order of their tokens."""


class Prompter:
    """Renders and tokenises for one processor.

    Args:
        processor: a `Qwen3VLProcessor`.
        media_options: further arguments of the processor call, e.g. `{"do_resize": False}` for
            frames that were fitted to the patch grid before.
    """

    def __init__(self, processor: Any, media_options: Mapping[str, Any] | None = None) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        # Set in words, since transformers announces another default for a later version.
        self.media_options = {"cap_pixels_per_frame": False} | dict(media_options or {})
        added = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(token) for token in added))
        marker = "content"
        turn = [{"role": "user", "content": [{"type": "text", "text": marker}]}]
        self.closing = self._render(turn, reply=False).rpartition(marker)[2]
        """What ends a turn."""
        self.opening = self._render(turn, reply=True).rpartition(marker)[2][len(self.closing) :]
        """What begins a reply."""

    def render(self, messages: Sequence[Message]) -> str:
        """The chat template's text of these turns, and the opening of a reply if it is due."""
        if not messages:
            return ""
        return self._render(messages, reply=messages[-1]["role"] in ("user", "tool"))

    def _render(self, messages: Sequence[Message], *, reply: bool) -> str:
        text: str = self.processor.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=reply
        )
        return text

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it count as such."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def tail(self, text: str) -> str:
        """The text after the last special token: what a following text could merge with."""
        end = 0
        for found in self._special.finditer(text):
            end = found.end()
        return text[end:]

    def piece(self, text: str, frames: Sequence[Frames] = (), images: Sequence[Any] = ()) -> Piece:
        """Tokenises a text whose placeholders stand for the given videos and images.

        Raises:
            PromptError: the numbers of placeholders and media differ.
        """
        for kind, token, given in (
            ("video", self.processor.video_token, frames),
            ("image", self.processor.image_token, images),
        ):
            if text.count(token) != len(given):
                raise PromptError(
                    f"the text has {text.count(token)} {kind} placeholders ({token}) "
                    f"for {len(given)} {kind}s; give one for each."
                )
        if not frames and not images:
            return Piece(self.tokenize(text))
        return self._with_media(text, frames, images)

    def _with_media(self, text: str, frames: Sequence[Frames], images: Sequence[Any]) -> Piece:
        media: dict[str, Any] = {}
        if frames:
            media["videos"] = [_channels_first(f.pixels_THWC) for f in frames]
            media["video_metadata"] = [
                VideoMetadata(
                    total_num_frames=f.total_frames,
                    fps=f.source_fps,
                    frames_indices=list(f.indices),
                )
                for f in frames
            ]
            media |= {"do_sample_frames": False}
        if images:
            media["images"] = list(images)
        options = self.media_options if frames else _without_cap(self.media_options)
        batch = self.processor(text=[text], return_tensors="pt", **media, **options)
        videos = _split("video", batch, "pixel_values_videos", "video_grid_thw")
        for medium, source in zip(videos, frames, strict=True):
            medium.key = str(getattr(source, "digest", ""))
        pictures = _split("image", batch, "pixel_values", "image_grid_thw")
        ids: list[int] = batch["input_ids"][0].tolist()
        return Piece(ids, self._in_order(text, videos, pictures))

    def _in_order(self, text: str, videos: list[Medium], images: list[Medium]) -> list[Medium]:
        tokens = (re.escape(t) for t in (self.processor.video_token, self.processor.image_token))
        found = re.findall("|".join(tokens), text)
        left = {self.processor.video_token: iter(videos), self.processor.image_token: iter(images)}
        return [next(left[token]) for token in found]


def _without_cap(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != "cap_pixels_per_frame"}


def _channels_first(pixels_THWC: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels_THWC)).permute(0, 3, 1, 2)


def _split(kind: str, batch: Mapping[str, Any], pixels: str, grid: str) -> list[Medium]:
    if grid not in batch:
        return []
    grids = batch[grid]
    rows = torch.split(batch[pixels], grids.prod(-1).tolist())
    return [Medium(kind, p, g, "") for p, g in zip(rows, grids, strict=True)]


def check_places(piece: Piece, config: Any) -> None:
    """Whether ids have as many vision tokens as their media.

    Args:
        piece: ids and media.
        config: the model's.

    Raises:
        PromptError: they have not.
    """
    merged = config.vision_config.spatial_merge_size**2
    for kind, token in (("image", config.image_token_id), ("video", config.video_token_id)):
        places = piece.ids.count(token)
        seen = sum(int(m.grid_thw.prod()) // merged for m in piece.media if m.kind == kind)
        if places != seen:
            raise PromptError(
                f"the ids have {places} {kind} tokens, and their media make {seen}; tokenise "
                "the prompt with the processor of this model, at the same frame size."
            )
