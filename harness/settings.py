"""The settings of an evaluation that decide its numbers; they are recorded in run.json.

Defaults are those of lmms-eval 0.7.3's `qwen3_vl` class where it has one (system prompt), the
published settings of Qwen3-VL's video sampling (2 fps, at most 768 frames), and, for the scale
model, one frame size: 64 x 64 pixels.
"""

from dataclasses import dataclass

SYSTEM_PROMPT = "You are a helpful assistant."
SCALE_PIXELS = 64 * 64
# 256 visual tokens a frame of 32 x 32 pixels each: what most of the paper's scripts give Video-MME.
DEFAULT_PIXELS = 256 * 32 * 32
# Most tokens of an answer where neither the command nor the task says.
NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a direct answer depends on, beside the model and the question."""

    fps: float = 2.0
    """Frames sampled from a second of video."""
    max_frames: int = 768
    """Most frames sampled from one video."""
    min_pixels: int = SCALE_PIXELS
    """Fewest pixels of a frame; smaller frames are enlarged."""
    max_pixels: int = SCALE_PIXELS
    """Most pixels of a frame; larger frames are reduced."""
    system_prompt: str = SYSTEM_PROMPT
    """Text of the system turn; empty for none."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; None for what the task says."""
    batch: int = 16
    """Most questions of one video decoded together."""
    seed: int = 0
    """Seed of sampling, used at a temperature above 0 only."""


def pixels_for(model: str) -> int:
    """Pixels of a frame by default for a checkpoint name."""
    return SCALE_PIXELS if model.startswith("scale:") else DEFAULT_PIXELS
