"""The options of one evaluation command, and the settings that follow from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.preflight import Benchmark, PreflightError, shows_videos
from internvideo3.harness.settings import SYSTEM_PROMPT, THINKING_TOKENS, Settings, pixel_range
from internvideo3.model.checkpoint import resolve_checkpoint
from internvideo3.tasks.benchmarks.protocol import PresetName

Control = Literal["blind", "text", "shuffled"]
FPS, MAX_FRAMES, MAX_NEW_TOKENS = 2.0, 768, 32
"""Where neither the command nor a benchmark's protocol says: Qwen3-VL's sampling, short answers."""


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """One evaluation command."""

    model: str
    """Checkpoint folder, or a name such as `scale:m2la`; empty for none, which suffices to check
    what is there."""
    suites: tuple[str, ...]
    """Suites, in order."""
    out: Path
    """Run directory."""
    root: Path | None = None
    """The scale world's root; None for the usual place."""
    data: Path | None = None
    """Where benchmarks are; None for the usual place."""
    preset: PresetName = "paper"
    """Which settings benchmarks are run under."""
    split: str = "test"
    """Which split of the scale world's suites."""
    limit: int | None = None
    """Answer only the first so many samples of a suite."""
    sample_ids: tuple[str, ...] = ()
    """Answer only these samples."""
    control: Control | None = None
    """`blind`: every question is asked about another video; `text`: without any; `shuffled`: the
    frames are in another order."""
    thinking: bool = False
    """Whether replies begin with an open thinking block."""
    fps: float | None = None
    """Frames from a second of video; None for the protocol's."""
    max_frames: int | None = None
    """Most frames of a video; None for the protocol's."""
    min_pixels: int | None = None
    """Fewest pixels of a frame; None for the protocol's or the checkpoint's default."""
    max_pixels: int | None = None
    """Most pixels of a frame; None for the protocol's or the checkpoint's default."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; None for the protocol's."""
    system_prompt: str = SYSTEM_PROMPT
    """Text of the system turn."""
    batch: int = 16
    """Most questions of one video decoded together."""
    device: str | None = None
    """torch device; None for CUDA if there is one."""
    dtype: str = "auto"
    """float32, bfloat16, or auto."""
    threads: int = 1
    """CPU threads of torch. One thread is fastest for models of a few million parameters."""
    seed: int = 0
    """Seed of sampling."""
    retry_errors: bool = False
    """Answer samples again whose record is an error."""
    max_errors: int | None = None
    """Stop as soon as more samples than this have failed; None to go on whatever fails."""
    shard: str | None = None
    """`2/8`: answer the second of eight parts only."""
    processes: int | None = None
    """How many processes the launcher must have started; None for any number."""
    decode_limit_s: float | None = None
    """Longest that one video is decoded; None for what its length allows. No part of a run's
    settings: what it makes fail is answered at a higher one."""
    frame_cache: Path | None = None
    """Folder that keeps decoded frames; None for none."""
    agent: AgentSettings | None = None
    """The agent that answers; None for direct answers."""
    frame_cache_bytes: int = 50 << 30
    """Most bytes that the folder takes."""
    command: tuple[str, ...] = ()
    """The command line, for the record."""

    @property
    def left_out(self) -> dict[str, str]:
        """Suites that the command's control has no form for, and why."""
        if self.control != "blind":
            return {}
        why = "the blind control shows another video, and this suite shows images only"
        return {suite: why for suite in self.suites if not shows_videos(suite)}

    @property
    def answered_suites(self) -> tuple[str, ...]:
        """The suites without those left out.

        Raises:
            PreflightError: none is left.
        """
        if self.suites and len(self.left_out) == len(self.suites):
            raise PreflightError(
                f"{', '.join(self.suites)}: images only; the blind control shows another video. "
                "Take --control text."
            )
        return tuple(suite for suite in self.suites if suite not in self.left_out)

    def departures(self) -> list[str]:
        """What of the command leaves the benchmarks' protocol, in words."""
        given = {
            "the settings are the benchmarks' own, not the paper's": self.preset != "paper",
            f"it is the {self.control} control": self.control is not None,
            "replies think first": self.thinking,
            "frames a second were given": self.fps is not None,
            "the number of frames was given": self.max_frames is not None,
            "the size of frames was given": (self.min_pixels or self.max_pixels) is not None,
            "the length of answers was given": self.max_new_tokens is not None,
            "the system prompt was given": self.system_prompt != SYSTEM_PROMPT,
            "the answers are an agent's": self.agent is not None,
            "it is open-web: the agent may search": self.agent is not None
            and "web_search" in self.agent.tools,
            "another model captions the videos": self.agent is not None
            and self.agent.captions not in ("", "model"),
        }
        return [reason for reason, holds in given.items() if holds]

    def settings(self, benchmark: Benchmark | None = None) -> Settings:
        """The part that decides the numbers, for one benchmark or the scale world.

        Raises:
            CheckpointError: the checkpoint is unknown.
        """
        path = resolve_checkpoint(self.model) if self.model else None
        preset = benchmark.preset if benchmark else None
        asked = self.min_pixels, self.max_pixels
        protocol = (preset.min_pixels, preset.max_pixels) if preset else (None, None)
        low, high = pixel_range(
            path, *(mine or theirs for mine, theirs in zip(asked, protocol, strict=True))
        )
        new_tokens = self.max_new_tokens or (preset.max_new_tokens if preset else MAX_NEW_TOKENS)
        if self.thinking and self.max_new_tokens is None:
            new_tokens = max(new_tokens, THINKING_TOKENS)
        return Settings(
            min_pixels=low,
            max_pixels=high,
            fps=self.fps or (preset.fps if preset else FPS),
            max_frames=self.max_frames or (preset.max_frames if preset else MAX_FRAMES),
            system_prompt=self.system_prompt,
            max_new_tokens=new_tokens,
            batch=self.batch,
            seed=self.seed,
            video_pixels=preset.video_pixels if preset and asked == (None, None) else None,
            thinking=self.thinking,
        )
