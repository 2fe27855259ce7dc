"""What decides a rollout beside the model, the question and how frames are sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from internvideo3.harness.agent.budget import Budget

LEAST_HELD = 512
"""Tokens below which a context is not begun anew."""
SCHEMES = ("http://", "https://")
CAPTIONERS = (
    "give `model`, or NAME@URL with the name of a model and the address of its server, such as "
    "qwen@http://localhost:8000/v1"
)
PolicyName = Literal["controller", "model", "trained"]
Looks = Literal["new", "spread", "random", "none"]
TOOLS_OF_EVAL = ("video_segmentation", "asr", "ocr", "temporal_grounding")
"""What may be called unless the command says otherwise: nothing that leaves the machine."""


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """The agent of one command; equal settings and seeds give equal rollouts."""

    policy: PolicyName = "controller"
    """Who acts: rules; the model by its own calls; or the model, `trained` on rollouts, which is
    not told what it may call."""
    budget: Budget = field(default_factory=Budget)
    """What one question may cost."""
    looks: Looks = "new"
    """Where the controller looks again: `new` where small pictures of the whole video, kept in
    memory, show what no look has shown; `spread` over the video, without that memory; `random`;
    `none` to answer from the first look and tools."""
    verifies: bool = True
    """Whether an answer must pass verification."""
    zoom_frames: int = 16
    """Most frames of a further look."""
    tools: tuple[str, ...] = TOOLS_OF_EVAL
    """What may be called beside looking again and memory."""
    route: str | None = None
    """Kind of the questions, where the command says it instead of the embedding's estimate."""
    seed: int = 0
    """Of random looks and sampled words."""
    compress_at: int | None = None
    """Tokens from which the context is begun anew with what matters; None: it only grows."""
    captions: str = ""
    """Who captions clips and tells the whole video before the first question: "model", the agent's
    own; "NAME@URL", a server's; empty for nobody."""

    def __post_init__(self) -> None:
        """Checks the threshold and the captioner.

        Raises:
            ValueError: the threshold is too small to hold anything, or the captioner has no form.
        """
        there, _, url = self.captions.partition("@")
        if self.captions not in ("", "model") and not (there and url.startswith(SCHEMES)):
            raise ValueError(f"--captions {self.captions!r} is no captioner; {CAPTIONERS}.")
        if self.compress_at is not None and self.compress_at < LEAST_HELD:
            raise ValueError(
                f"a context of {self.compress_at} tokens holds nothing; compress at no fewer than "
                f"{LEAST_HELD}."
            )
