"""A policy or teacher behind HTTP, for trainers: ids and frames in, ids and log-probabilities out.

The form is OpenAI's legacy completion by ids, with `videos` (see `training/remote.py`), and
SGLang's `update_weights_from_disk`. A field that is not served is refused by name.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from internvideo3.harness.serving.admission import HANDLERS, admit, json_body, told_if_cut
from internvideo3.harness.serving.turns import Turns
from internvideo3.harness.serving.wire import ApiError, in_words
from internvideo3.model.checkpoint import CheckpointError
from internvideo3.training import rollouts
from internvideo3.training.remote import decoded
from internvideo3.training.served import ServedPolicy

Form = TypeVar("Form", bound=BaseModel)


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


MOST_SAMPLED = 1 << 24
"""Tokens that the responses to one request may have: they are sampled together, and have their
places in memory from the start."""


class Video(_Form):
    """Frames as `remote.encoded` writes them."""

    frames: Annotated[list[str], Field(min_length=1)]
    indices: list[int]
    source_fps: Annotated[float, Field(gt=0)]
    total_frames: Annotated[int, Field(ge=1)]


class Completion(_Form):
    """The body of `POST /v1/completions`."""

    model: str
    prompt: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    videos: list[Video] = []
    n: Annotated[int, Field(ge=1, le=1024)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    max_tokens: Annotated[int, Field(ge=0)] = 16
    temperature: Literal[1] = 1
    logprobs: Literal[0] = 0
    echo: bool = False
    logit_bias: dict[int, Literal[-100]] = {}
    return_token_ids: bool = True
    return_tokens_as_token_ids: bool = False


class Weights(_Form):
    """The body of `POST /update_weights_from_disk`."""

    model: str = ""
    model_path: str


@dataclass(frozen=True, kw_only=True)
class PolicyServing:
    """What is served, and to whom."""

    policy: ServedPolicy
    name: str
    """Of the model; clients name it, and any name is taken."""
    weights: Path | None = None
    """Folder below which new weights may be read; None: the weights stay."""
    token: str | None = None
    """What a client must bring; None for clients of this machine only."""
    upload_bytes: int = 1 << 30
    """Most bytes of a body."""
    turns: Turns = field(default_factory=Turns)
    """One request computes at a time."""

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/health", self.health, methods=["GET"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/update_weights_from_disk", self.update, methods=["POST"]),
            ],
            exception_handlers=HANDLERS,
        )

    def close(self) -> None:
        """What computes goes on; those who wait and those who come are refused."""
        self.turns.close()

    def join(self, seconds: float) -> bool:
        """Whether nothing computes; it is not waited for, as nobody would be told of it."""
        return self.turns.join(min(seconds, 1.0))

    async def health(self, request: Request) -> Response:
        """Whether the server is up."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """What can be asked."""
        admit(request, self.token)
        listed = {"id": self.name, "object": "model", "owned_by": "internvideo3"}
        return JSONResponse({"object": "list", "data": [listed]})

    @told_if_cut
    async def complete(self, request: Request) -> Response:
        """Samples, or with `echo` scores, ids."""
        admit(request, self.token)
        body = await json_body(request, self.upload_bytes)
        asked = _read(Completion, body)
        # Equal requests have equal answers: the seed decides what is drawn.
        key = hashlib.sha256(body).digest()
        return JSONResponse(await self.turns.take(key, lambda: self._completed(asked), request))

    @told_if_cut
    async def update(self, request: Request) -> Response:
        """Takes the weights of a folder."""
        admit(request, self.token)
        asked = _read(Weights, await json_body(request, 1 << 20))
        # No two are equal: the folder may have been written again.
        key, folder = object(), Path(asked.model_path)
        digest = await self.turns.take(key, lambda: self._take(folder), request)
        return JSONResponse({"success": True, "message": "the weights are read.", "digest": digest})

    def _completed(self, asked: Completion) -> dict[str, Any]:
        try:
            choices = self._scored(asked) if asked.echo else self._sampled(asked)
        except ValueError as error:
            raise ApiError(400, str(error), param="prompt") from error
        return {
            "id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion",
            "created": int(time.time()), "model": self.name,
            "system_fingerprint": self.policy.digest,
            "choices": choices,
            "usage": _usage(asked, choices),
        }  # fmt: skip

    def _sampled(self, asked: Completion) -> list[dict[str, Any]]:
        if asked.max_tokens < 1:
            raise ApiError(400, "max_tokens is 0; ask for at least 1.", param="max_tokens")
        if asked.n * asked.max_tokens > MOST_SAMPLED:
            raise ApiError(
                400,
                f"n x max_tokens is {asked.n * asked.max_tokens:,}, at most {MOST_SAMPLED:,} are "
                "sampled at once; ask in several requests.",
                param="max_tokens",
            )
        videos = [decoded(one.model_dump()) for one in asked.videos]
        made = self.policy.sample(
            self._known(asked.prompt), videos, count=asked.n, seed=asked.seed,
            barred=tuple(self._known([*asked.logit_bias])), max_new_tokens=asked.max_tokens,
        )  # fmt: skip
        return [self._said(number, one, asked) for number, one in enumerate(made)]

    def _said(self, number: int, one: rollouts.Response, asked: Completion) -> dict[str, Any]:
        stop = one.ids[-1] == self.policy.processor.tokenizer.eos_token_id
        logprobs = {"tokens": self._tokens(one.ids, asked), "token_logprobs": list(one.logps)}
        return {
            "index": number, "text": one.text, "token_ids": list(one.ids), "logprobs": logprobs,
            "finish_reason": "stop" if stop else "length",
        }  # fmt: skip

    def _scored(self, asked: Completion) -> list[dict[str, Any]]:
        if asked.max_tokens or asked.n > 1:
            raise ApiError(400, "echo is served with max_tokens 0 and n 1 only.", param="echo")
        videos = [decoded(one.model_dump()) for one in asked.videos]
        values = self.policy.logps(self._known(asked.prompt), videos)
        logprobs = {"tokens": self._tokens(asked.prompt, asked), "token_logprobs": values}
        text = self.policy.processor.tokenizer.decode(asked.prompt)
        return [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": "length"}]

    def _known(self, ids: list[int]) -> list[int]:
        size = self.policy.model.config.get_text_config().vocab_size
        wrong = [one for one in ids if not 0 <= one < size]
        if wrong:
            raise ApiError(400, f"there is no token {wrong[0]}; the model has {size}.")
        return ids

    def _tokens(self, ids: Any, asked: Completion) -> list[str]:
        if asked.return_tokens_as_token_ids:
            return [f"token_id:{one}" for one in ids]
        spelt: list[str] = self.policy.processor.tokenizer.convert_ids_to_tokens(list(ids))
        return spelt

    def _take(self, folder: Path) -> str:
        if self.weights is None:
            raise ApiError(403, "this server keeps its weights; start it with --weights FOLDER.")
        real = folder.resolve()
        if not real.is_relative_to(self.weights.resolve()):
            said = f"weights are read below {self.weights} only, and not from {folder}."
            raise ApiError(403, said, kind="permission_error", param="model_path")
        try:
            self.policy.take(real)
        except (CheckpointError, ValueError, OSError) as error:
            raise ApiError(400, str(error), param="model_path") from error
        return self.policy.digest


def _usage(asked: Completion, choices: list[dict[str, Any]]) -> dict[str, int]:
    new = sum(len(one.get("token_ids", ())) for one in choices)
    prompt = len(asked.prompt)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def _read(form: type[Form], body: bytes) -> Form:
    try:
        return form.model_validate_json(body)
    except ValidationError as error:
        raise in_words(error) from None
