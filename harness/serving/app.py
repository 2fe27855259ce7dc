"""The HTTP side: who may ask, how much, and how an answer is sent. See `wire.py` for the form."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from internvideo3.harness.serving.admission import (
    HANDLERS,
    LOOK_EVERY_S,
    admit,
    json_body,
    left,
    stopping,
    told_if_cut,
)
from internvideo3.harness.serving.jobs import Event, Job, Line, Words
from internvideo3.harness.serving.studio import Say, Told, Turn
from internvideo3.harness.serving.videos import Shelf
from internvideo3.harness.serving.wire import (
    AGENTIC,
    ALIVE,
    DONE,
    SEEDS,
    ApiError,
    ChatRequest,
    Message,
    TextPart,
    Usage,
    VideoPart,
    Writer,
    event,
    read_request,
)
from internvideo3.model.decoding import LEAST_TEMPERATURE
from internvideo3.model.session import Limits

ALIVE_EVERY_S = 15.0
"""Time between two signs of life in a stream."""


class Answering(Protocol):
    """Who answers."""

    def answer(self, turns: Sequence[Turn], limits: Limits, say: Say, *, agentic: bool) -> Told:
        """See `Studio.answer`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What is served, and to whom."""

    studio: Answering
    line: Line
    name: str
    """Of the model."""
    folder: Path | None = None
    """Whose videos may be asked about."""
    token: str | None = None
    """What a client must bring; None for clients of this machine only."""
    upload_bytes: int = 64 << 20
    """Most bytes of a body."""
    new_tokens: int = 256
    """Most tokens of a reply where the client does not say."""
    reasoning: bool = True
    """Whether the agent's turns are sent."""

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/health", self.health, methods=["GET"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/models/{name:path}", self.model, methods=["GET"]),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
            ],
            exception_handlers=HANDLERS,
        )

    def close(self) -> None:
        """Ends the answer in progress and those that wait."""
        self.line.close()

    def join(self, seconds: float) -> bool:
        """Waits until nothing is answered any more; whether that is so."""
        return self.line.join(seconds)

    async def health(self, request: Request) -> Response:
        """Whether the server is up."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """What can be asked."""
        admit(request, self.token)
        data = [self._listed(name) for name in self._names()]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """One of them."""
        admit(request, self.token)
        return JSONResponse(self._listed(self._known(request.path_params["name"])))

    @told_if_cut
    async def complete(self, request: Request) -> Response:
        """Answers a conversation."""
        admit(request, self.token)
        with ExitStack() as stack:
            stack.enter_context(self.line.place())
            asked = read_request(await json_body(request, self.upload_bytes))
            agentic = self._known(asked.model).endswith(AGENTIC)
            uploads = stack.enter_context(tempfile.TemporaryDirectory(prefix="iv3-upload-"))
            shelf = Shelf(self.folder, Path(uploads))
            turns = await asyncio.to_thread(_turns, asked, shelf)
            limits = self._limits(asked)
            job = stack.enter_context(
                self.line.job(lambda say: self.studio.answer(turns, limits, say, agentic=agentic))
            )
            events = _events(job, request, self.line)
            if not asked.stream:
                return await self._whole(asked, events)
            # Errors before the first words are errors of the request, not of the stream.
            first = await _first(events)
            return _Stream(self._stream(asked, first, events), stack.pop_all())

    async def _whole(self, asked: ChatRequest, events: AsyncIterator[Event | None]) -> Response:
        said: dict[str, list[str]] = {"content": [], "reasoning_content": []}
        async for one in events:
            if isinstance(one, Words):
                said[one.field].append(one.text)
            elif isinstance(one, ApiError):
                raise one
            elif one is not None:
                thoughts = "".join(said["reasoning_content"]) if self.reasoning else ""
                text = "".join(said["content"])
                return JSONResponse(
                    Writer(asked.model).whole(text, thoughts, one.finish, one.usage)
                )
        raise left()

    async def _stream(
        self, asked: ChatRequest, first: Event, events: AsyncIterator[Event | None]
    ) -> AsyncIterator[bytes]:
        writer = Writer(asked.model)
        yield writer.chunk({"role": "assistant", "content": ""})
        for piece in self._pieces(asked, writer, first):
            yield piece
        last_s = time.monotonic()
        async for one in events:
            if one is not None:
                for piece in self._pieces(asked, writer, one):
                    yield piece
            elif time.monotonic() - last_s > ALIVE_EVERY_S:
                yield ALIVE
            else:
                continue
            last_s = time.monotonic()

    def _pieces(self, asked: ChatRequest, writer: Writer, one: Event) -> list[bytes]:
        """A job's event as events of a stream."""
        if isinstance(one, ApiError):
            return [event(one.body())]
        if isinstance(one, Told):
            return self._end(asked, writer, one.finish, one.usage)
        shown = self.reasoning or one.field == "content"
        return [writer.chunk({one.field: one.text})] if shown else []

    def _end(self, asked: ChatRequest, writer: Writer, finish: str, usage: Usage) -> list[bytes]:
        told = asked.stream_options is not None and asked.stream_options.include_usage
        return [writer.chunk({}, finish), *([writer.usage(usage)] if told else []), DONE]

    def _names(self) -> tuple[str, str]:
        return self.name, self.name + AGENTIC

    def _known(self, name: str) -> str:
        if name in self._names():
            return name
        raise ApiError(
            404,
            f"there is no model {name[:120]!r}; there are {' and '.join(self._names())}.",
            param="model",
            code="model_not_found",
        )

    def _listed(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": _STARTED, "owned_by": "internvideo3"}

    def _limits(self, asked: ChatRequest) -> Limits:
        # Below the least temperature a draw is the likeliest token all the same.
        drawn = (asked.temperature or 0.0) >= LEAST_TEMPERATURE
        # Who asks for draws without a seed wants others the next time.
        seed = secrets.randbelow(SEEDS) if drawn and asked.seed is None else asked.seed or 0
        return Limits(
            max_new_tokens=asked.most_tokens or self.new_tokens,
            temperature=asked.temperature if drawn and asked.temperature else 0.0,
            seed=seed,
        )


_STARTED = int(time.time())


class _Stream(StreamingResponse):
    """A stream that gives its place up however it ends, even before it has begun."""

    def __init__(self, content: AsyncIterator[bytes], held: ExitStack) -> None:
        super().__init__(
            content, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


def _turns(asked: ChatRequest, shelf: Shelf) -> list[Turn]:
    return [
        Turn(_role(one), tuple(_part(part, shelf) for part in one.parts()))
        for one in asked.messages
    ]


def _role(message: Message) -> str:
    return "system" if message.role == "developer" else message.role


def _part(part: TextPart | VideoPart, shelf: Shelf) -> str | Path:
    return part.text if isinstance(part, TextPart) else shelf.find(part.video_url.url)


async def _events(job: Job, request: Request, line: Line) -> AsyncIterator[Event | None]:
    """What comes of a job, None now and then while nothing does; ends when the client leaves.

    Where the server stops in a long step, its word for that comes before uvicorn cuts connections.
    """
    looked_s = time.monotonic()
    while True:
        one = None
        with suppress(TimeoutError):
            one = await asyncio.wait_for(job.events.get(), LOOK_EVERY_S)
        if time.monotonic() - looked_s >= LOOK_EVERY_S:
            looked_s = time.monotonic()
            if await request.is_disconnected():
                return
            one = one or (stopping() if line.is_stuck() else None)
        yield one
        if isinstance(one, Told | ApiError):
            return


async def _first(events: AsyncIterator[Event | None]) -> Event:
    async for one in events:
        if isinstance(one, ApiError):
            raise one
        if one is not None:
            return one
    raise left()
