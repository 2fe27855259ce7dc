"""Who may ask, how much, and how an error is told: what every server here has in common."""

from __future__ import annotations

import asyncio
import functools
import hmac
import json
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from internvideo3.harness.serving.hosts import of_this_machine
from internvideo3.harness.serving.wire import ApiError

S = TypeVar("S")
Endpoint = Callable[[S, Request], Awaitable[Response]]

BODY_SECONDS = 120.0
"""Time in which a body must arrive."""
LOOK_EVERY_S = 0.25
"""Time between two looks at whether the client is still there."""


def admit(request: Request, token: str | None) -> None:
    """Refuses who may not ask.

    Args:
        request: the request.
        token: what a client must bring; None for clients of this machine only.

    Raises:
        ApiError: the token is missing or wrong; or, without one, the request is for a name
            that is not this machine's, as when a page has rebound its own name to it.
    """
    if token is None:
        if not of_this_machine(re.sub(r":\d+$", "", request.headers.get("host", ""))):
            said = "this server answers to localhost only."
            raise ApiError(403, said, kind="permission_error")
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers are bytes, which the framework reads as latin-1.
    same = hmac.compare_digest(given.strip().encode("latin-1"), token.encode())
    if scheme.lower() != "bearer" or not same:
        raise ApiError(
            401,
            "the token is missing or wrong; send it as Authorization: Bearer ….",
            kind="authentication_error",
            code="invalid_api_key",
        )


async def json_body(request: Request, most: int) -> bytes:
    """The body of a request, if it says that it is JSON and is no longer than allowed.

    Raises:
        ApiError: it is of another kind, longer, or does not arrive.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        # Anything else could come from a page of another site in the user's browser.
        raise ApiError(415, "send the request as content-type application/json.")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most:
        raise _too_large(most)
    try:
        return await asyncio.wait_for(_pieces(request, most), BODY_SECONDS)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s.") from None


async def _pieces(request: Request, most: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise _too_large(most)
    return bytes(body)


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"the request is larger than {most / 2**20:g} MiB. Send a shorter or smaller video, or put "
        "it into the server's folder.",
        code="request_too_large",
    )


def told_if_cut(endpoint: Endpoint[S]) -> Endpoint[S]:
    """An endpoint whose end by the server's or the client's is an error like any other."""

    @functools.wraps(endpoint)
    async def told(serving: S, request: Request) -> Response:
        try:
            return await endpoint(serving, request)
        except asyncio.CancelledError:  # only the server's end cancels a request
            raise stopping() from None
        except ClientDisconnect:
            raise left() from None

    return told


def left() -> ApiError:
    """Nobody reads it; it ends the request."""
    return ApiError(499, "the client has left.")


def stopping() -> ApiError:
    """What is told to those who are not answered any more."""
    return ApiError(503, "the server is stopping.", kind="server_error")


# Coroutines: anything else runs in a thread, for which nobody waits when the server ends.
async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}}
    # A body that was not read to its end cannot be followed by another request.
    closing = {"Connection": "close"} if error.status in (408, 413, 429) else {}
    return JSONResponse(
        error.body(), status_code=error.status, headers=headers.get(error.status, {}) | closing
    )


async def _told_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = json.dumps(request.url.path)[:120]
    said = {404: f"there is nothing at {path}.", 405: f"{path} takes no {request.method}."}
    message = said.get(error.status_code, error.detail)
    return await _told(request, ApiError(error.status_code, message))


async def _told_any(request: Request, error: Exception) -> Response:
    message = "the request failed; the server's log says where."
    return await _told(request, ApiError(500, message, kind="server_error"))


HANDLERS = {ApiError: _told, HTTPException: _told_http, Exception: _told_any}
"""How a starlette application tells its errors."""
