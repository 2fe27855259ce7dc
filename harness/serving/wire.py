"""What goes over the wire: the chat form of OpenAI, as far as it is served, and its errors.

The fields are those of https://platform.openai.com/docs/api-reference/chat. `video_url` and
`reasoning_content` are not in it; both are what vLLM's server calls them. A field that is not
served is refused by name: nothing that a client asks for is ignored.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

AGENTIC = "-agentic"
"""Ends the name of the model that answers by the agent."""
SEEDS = 2**63
"""How many seeds there are, from 0."""


class ApiError(Exception):
    """An error of OpenAI's form.

    Args:
        status: the HTTP status.
        message: what was wrong, what was given, what to do.
        kind: the form's `type`.
        param: the field that it is about.
        code: the form's `code`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": told}


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Form):
    """Words."""

    type: Literal["text"]
    text: str


class Url(_Form):
    """Where a video is."""

    url: str


class VideoPart(_Form):
    """A video."""

    type: Literal["video_url"]
    video_url: Url


Part = Annotated[TextPart | VideoPart, Field(discriminator="type")]


class Message(_Form):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[tuple[Part, ...], Field(min_length=1)]
    reasoning_content: str | None = None
    """Of the assistant: what an answer had beside its content, sent back with it. It is not shown
    to the model, as no turn of the agent is in the next answer's context."""

    @model_validator(mode="after")
    def _check(self) -> Message:
        if self.reasoning_content is not None and self.role != "assistant":
            raise ValueError(f"reasoning_content is the assistant's, not the {self.role}'s")
        return self

    def parts(self) -> tuple[TextPart | VideoPart, ...]:
        """The content in its long form."""
        if isinstance(self.content, str):
            return (TextPart(type="text", text=self.content),)
        return self.content


class StreamOptions(_Form):
    """What a stream has beside the reply."""

    include_usage: bool = False


class ChatRequest(_Form):
    """The body of `POST /v1/chat/completions`."""

    model: str
    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    user: str | None = None
    # What clients send with the value that changes nothing.
    n: Literal[1] | None = None
    top_p: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of the reply, None where the client does not say."""
        given = (self.max_completion_tokens, self.max_tokens)
        return next((one for one in given if one is not None), None)


def read_request(body: bytes) -> ChatRequest:
    """Reads a request.

    Raises:
        ApiError: it is not JSON, or not of the form; the message names the first problems.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise in_words(error) from None


def in_words(error: ValidationError) -> ApiError:
    """What is wrong with a body; the message names the first problems."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {found[0]['msg']}.")
    told = "; ".join(f"{_place(one['loc'])}: {_problem(one)}" for one in found[:3])
    return ApiError(400, f"{told}.", param=_place(found[0]["loc"]))


def _place(location: Sequence[int | str]) -> str:
    return ".".join(map(str, location))


def _problem(one: Any) -> str:
    if one["type"] == "extra_forbidden":
        return "this field is not served here; leave it out"
    if one["type"] == "union_tag_invalid":
        return "a part of a message is of type 'text' or 'video_url'"
    return str(one["msg"])


@dataclass(frozen=True)
class Usage:
    """Tokens of a reply."""

    prompt: int
    completion: int

    def body(self) -> dict[str, int]:
        """The form's `usage`."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass
class Writer:
    """Writes one completion, whole or in chunks."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, thoughts: str, finish: str, usage: Usage) -> dict[str, Any]:
        """A `chat.completion`."""
        message = {"role": "assistant", "content": text}
        if thoughts:
            message["reasoning_content"] = thoughts
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return self._body("chat.completion", [choice]) | {"usage": usage.body()}

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> bytes:
        """An event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event(self._body("chat.completion.chunk", [choice]))

    def usage(self, usage: Usage) -> bytes:
        """The event that tells the tokens."""
        return event(self._body("chat.completion.chunk", []) | {"usage": usage.body()})

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def event(data: dict[str, Any]) -> bytes:
    """JSON as a server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
"""Ends a stream that went well."""
ALIVE = b": working\n\n"
"""A comment, which clients skip; it keeps the connection open."""
