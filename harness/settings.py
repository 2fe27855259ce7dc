"""The settings of an evaluation that decide its numbers; they are recorded in run.json.

Defaults are those of lmms-eval 0.7.3's `qwen3_vl` class where it has one (system prompt), the
published settings of Qwen3-VL's video sampling (2 fps, at most 768 frames), and the frame size
that the checkpoint's own image processor names, capped.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM_PROMPT = "You are a helpful assistant."
# 256 visual tokens a frame of 32 x 32 pixels each: what most of the paper's scripts give Video-MME.
MOST_PIXELS = 256 * 32 * 32
# Most tokens of an answer with thinking, where the command does not say.
THINKING_TOKENS = 4096
# Most tokens of an answer where neither the command nor the task says.
NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a direct answer depends on, beside the model and the question."""

    min_pixels: int
    """Fewest pixels of a frame; smaller frames are enlarged."""
    max_pixels: int
    """Most pixels of a frame; larger frames are reduced."""
    fps: float = 2.0
    """Frames sampled from a second of video."""
    max_frames: int = 768
    """Most frames sampled from one video."""
    system_prompt: str = SYSTEM_PROMPT
    """Text of the system turn; empty for none."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; None for what the task says."""
    batch: int = 16
    """Most questions of one video decoded together."""
    seed: int = 0
    """Seed of sampling, used at a temperature above 0 only."""
    video_pixels: tuple[int, int] | None = None
    """Fewest and most pixels of all frames of a video together; None for bounds a frame."""
    thinking: bool = False
    """Whether the reply begins with an open thinking block."""

    def bounds(self, frames: int) -> tuple[int, int]:
        """Fewest and most pixels of each of so many frames."""
        if self.video_pixels is None:
            return self.min_pixels, self.max_pixels
        low, high = self.video_pixels
        return low // frames, high // frames


def pixel_range(
    checkpoint: Path | None, min_pixels: int | None = None, max_pixels: int | None = None
) -> tuple[int, int]:
    """Fewest and most pixels of a frame: as asked, else what the checkpoint's processor names.

    Args:
        checkpoint: the checkpoint's folder; None for one that names no sizes.
        min_pixels: what was asked for, or None.
        max_pixels: what was asked for, or None.

    Raises:
        ValueError: the range is empty.
    """
    size = _image_size(checkpoint) if checkpoint else {}
    high = max_pixels or min(int(size.get("longest_edge", MOST_PIXELS)), MOST_PIXELS)
    low = min_pixels or min(int(size.get("shortest_edge", high)), high)
    if low > high:
        raise ValueError(
            f"Frames of at least {low} and at most {high} pixels do not exist. "
            "Give --min-pixels no larger than --max-pixels."
        )
    return low, high


def _image_size(checkpoint: Path) -> Mapping[str, Any]:
    """The image processor's `size`, from either of transformers' two files."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = checkpoint / name
        if path.is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            return dict(config.get("image_processor", config).get("size") or {})
    return {}
