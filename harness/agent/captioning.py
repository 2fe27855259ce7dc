"""Who puts a video into words: the model itself, or a model behind a server of OpenAI's form."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from internvideo3.harness.agent.context import Context, Control, Kind, Part, Quoted, Span
from internvideo3.harness.settings import SYSTEM_PROMPT
from internvideo3.model.session import Limits, Session
from internvideo3.tasks.video import Frames
from internvideo3.training.curation.narrative import CAPTION, Pictures
from internvideo3.training.endpoint import Endpoint, EndpointError

MOST_TOKENS = 256
"""Tokens of a caption or a narrative; a narrative has about 96 words."""
SERVER_PIXELS = 512 * 512
"""Most pixels of a frame that is sent to a server."""


class CaptionError(ValueError):
    """A captioner that cannot be used; what it said before is kept."""


class Captioner(Protocol):
    """Looks and tells."""

    @property
    def name(self) -> str:
        """Who it is; what it said is kept under this name."""

    @property
    def max_pixels(self) -> int | None:
        """Most pixels of a frame that it is shown; None for those of the agent's own looks."""

    def caption(self, frames: Frames, span: Span) -> str:
        """What a clip shows.

        Args:
            frames: the clip's.
            span: where in the video it lies, in seconds.
        """
        ...

    def write(self, prompt: str) -> str:
        """A text from texts."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelCaptioner:
    """The model of the agent, in sessions of their own."""

    model: Any
    processor: Any
    name: str
    max_pixels: int | None = None

    @classmethod
    def of(cls, model: Any, processor: Any, called: str) -> ModelCaptioner:
        """A captioner whose name tells weights apart, so that no other model's words are used."""
        seen = hashlib.sha256()
        for weight in model.state_dict().values():
            seen.update(weight.flatten()[:256].float().cpu().numpy().tobytes())
        return cls(model=model, processor=processor, name=f"{called} {seen.hexdigest()[:16]}")

    def caption(self, frames: Frames, span: Span) -> str:
        """What a clip shows."""
        return self._said([frames, Quoted(CAPTION.format(start=span[0], end=span[1]))])

    def write(self, prompt: str) -> str:
        """A text from texts, which are the model's own and are quoted all the same."""
        return self._said([Quoted(prompt, whole=True)])

    def _said(self, parts: Sequence[Part]) -> str:
        context = Context(Session(self.model, self.processor, media_options={"do_resize": False}))
        context.add(Kind.INSTRUCTION, "system", [Control(SYSTEM_PROMPT)], role="system")
        context.tell("user", parts)
        return context.speak(Limits(max_new_tokens=MOST_TOKENS)).text.strip()


@dataclass(frozen=True)
class RemoteCaptioner:
    """A model behind a server; the frames leave this machine."""

    endpoint: Endpoint
    max_pixels: int | None = SERVER_PIXELS

    @property
    def name(self) -> str:
        """The model's name there."""
        return self.endpoint.model

    def caption(self, frames: Frames, span: Span) -> str:
        """What a clip shows."""
        return self._said(CAPTION.format(start=span[0], end=span[1]), list(frames.pixels_THWC))

    def write(self, prompt: str) -> str:
        """A text from texts."""
        return self._said(prompt, ())

    def _said(self, prompt: str, pictures: Pictures) -> str:
        try:
            return self.endpoint.write(prompt, pictures, max_tokens=MOST_TOKENS)
        except EndpointError as error:
            raise CaptionError(f"captions are wanting: {error}") from error


def captioner(chosen: str, model: Any, processor: Any, name: str) -> Captioner | None:
    """The captioner that a command asks for; None for none.

    Args:
        chosen: see `AgentSettings.captions`.
        model: the agent's.
        processor: its.
        name: what the agent's model is called.

    """
    if not chosen:
        return None
    if chosen == "model":
        return ModelCaptioner.of(model, processor, name)
    there, _, url = chosen.partition("@")
    return RemoteCaptioner(Endpoint(url=url, model=there))
