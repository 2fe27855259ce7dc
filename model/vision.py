"""Encoding of images and videos, each at most once.

Axes: P patches before merging, V vision tokens after merging, X text model width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PATCHES_PER_CALL = 16384
"""Videos with more patches are encoded in runs of whole temporal patches. The vision tower attends
within one temporal patch only, so this changes nothing but memory."""


@dataclass(frozen=True)
class Encoded:
    """What the vision tower makes of images or videos, in token order."""

    tokens_VX: Tensor
    """Input embeddings of the vision tokens."""
    deepstack: tuple[Tensor, ...]
    """Per DeepStack level, what is added to the hidden states of the vision tokens, [V, X]."""

    def slice(self, start: int, stop: int) -> Encoded:
        """Vision tokens `start` to `stop`."""
        return Encoded(self.tokens_VX[start:stop], tuple(d[start:stop] for d in self.deepstack))

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.tokens_VX, *self.deepstack))

    @classmethod
    def joined(cls, pieces: Sequence[Encoded]) -> Encoded:
        """Several pieces as one."""
        levels = zip(*(piece.deepstack for piece in pieces), strict=True)
        tokens_VX = torch.cat([piece.tokens_VX for piece in pieces])
        return cls(tokens_VX, tuple(torch.cat(level) for level in levels))


class FeatureCache:
    """Least-recently-used store of encoded media, so that no frames are encoded twice.

    Args:
        max_bytes: of all that is kept; what is larger alone is not kept, and the others stay. A
            vision token of an 8B model has 32 KB in bfloat16, the default 32K tokens of that.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self.hits = 0
        self.misses = 0
        self._items: OrderedDict[str, Encoded] = OrderedDict()

    def encode(self, model: Any, kind: str, pixels: Tensor, grid_thw: Tensor, key: str) -> Encoded:
        """Encodes one image or video, or returns what was kept of it.

        Args:
            model: a Qwen3-VL for conditional generation, GQA or M²LA.
            kind: "image" or "video".
            pixels: patches as the processor returns them, [P, patch values].
            grid_thw: patches in time, height and width, [3].
            key: names the content; "" to take a digest of the pixels.
        """
        key = f"{kind} {key or _digest(pixels)} {grid_thw.tolist()}"
        if key in self._items:
            self.hits += 1
            self._items.move_to_end(key)
            return self._items[key]
        self.misses += 1
        encoded = encode(model, kind, pixels, grid_thw)
        if encoded.nbytes() > self.max_bytes:
            return encoded  # it would push out everything, itself at last
        self._items[key] = encoded
        while sum(e.nbytes() for e in self._items.values()) > self.max_bytes:
            self._items.popitem(last=False)
        return encoded

    def __len__(self) -> int:
        return len(self._items)


def encode(model: Any, kind: str, pixels: Tensor, grid_thw: Tensor) -> Encoded:
    """Runs the vision tower on one image or video."""
    frames, height, width = (int(n) for n in grid_thw)
    step = max(1, PATCHES_PER_CALL // (height * width))
    features = model.model.get_video_features if kind == "video" else model.model.get_image_features
    pieces: list[Encoded] = []
    for first in range(0, frames, step):
        count = min(step, frames - first)
        rows = pixels[first * height * width : (first + count) * height * width]
        grid = torch.tensor([[count, height, width]], device=model.device)
        out = features(rows.to(model.device), grid, return_dict=True)
        levels = tuple(_whole(level) for level in out.deepstack_features)
        pieces.append(Encoded(_whole(out.pooler_output), levels))
    return Encoded.joined(pieces) if len(pieces) > 1 else pieces[0]


def _whole(value: Tensor | Sequence[Tensor]) -> Tensor:
    # A tuple with one entry per medium, or one tensor: transformers 5.17 and 5.23 differ.
    return value if isinstance(value, Tensor) else torch.cat(list(value))


def _digest(pixels: Tensor) -> str:
    return hashlib.blake2b(pixels.contiguous().cpu().numpy().tobytes(), digest_size=16).hexdigest()
