"""A server of OpenAI's form: asked with patience, refused when it stays silent.

Captions, summaries and questions of the data curation come from one, and so may a teacher's
log-probabilities. A server that restarts, is busy or drops a connection is asked again after a
wait that doubles; one that says the request is wrong is not.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

log = logging.getLogger("internvideo3.endpoint")
AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP answers after which the same request may succeed."""


class EndpointError(ValueError):
    """A server that cannot be used; what was finished before stays."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One model behind a server."""

    url: str
    """Its base, such as `http://localhost:8000/v1`."""
    model: str
    """The model's name there."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the key; unset or empty for none."""
    timeout_s: float = 120.0
    """Longest wait for one answer."""
    attempts: int = 6
    """How often a request is made before giving up."""
    first_wait_s: float = 1.0
    """Wait before the second attempt; it doubles from attempt to attempt."""
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False, compare=False)
    known: set[str] = field(default_factory=set, repr=False, compare=False)
    """What was found out about the server, so that it is asked once a run."""

    def beside_version(self) -> Endpoint:
        """The same server's paths beside `/v1`."""
        return replace(self, url=self.url.rstrip("/").removesuffix("/v1"))

    def write(
        self,
        prompt: str,
        pictures: Sequence[NDArray[np.uint8]] = (),
        *,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int = 0,
    ) -> str:
        """The model's reply to a text with pictures `[H,W,3]`.

        Raises:
            EndpointError: No answer after all attempts, a refusal, or one of another form.
        """
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures
        ]
        content.append({"type": "text", "text": prompt})
        body = {
            "messages": [{"role": "user", "content": content}],
            "temperature": temperature, "max_tokens": max_tokens, "seed": seed,
        }  # fmt: skip
        reply = self.post("chat/completions", body)
        try:
            text = str(reply["choices"][0]["message"]["content"]).strip()
            # Of a reply that is cut within a character JSON may hold a half, and no file can.
            return text.encode("utf-8", "replace").decode()
        except (LookupError, TypeError) as error:
            raise EndpointError(f"{self.url} answers in another form: {reply!r:.300}") from error

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that the server answers with.

        Raises:
            EndpointError: No answer after all attempts, or a refusal.
        """
        if not self.url.startswith(("http://", "https://")):
            raise EndpointError(f"{self.url!r} is no http address")
        wait_s = self.first_wait_s
        for attempt in range(1, self.attempts + 1):
            try:
                return self._once(path, body)
            except _TryAgainError as error:
                if attempt == self.attempts:
                    raise EndpointError(
                        f"{self.url} did not answer in {self.attempts} attempts; the last time: "
                        f"{error}. Start it again, then repeat the command: finished work is kept."
                    ) from error
                log.warning("%s: %s; again in %g s", self.url, error, wait_s)
                self.sleep(wait_s)
                wait_s *= 2
        raise AssertionError("unreachable")

    def _once(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        data = json.dumps({"model": self.model} | body).encode()
        request = urllib.request.Request(f"{self.url.rstrip('/')}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                said = reply.read()
        except urllib.error.HTTPError as error:
            said = f"{error.code}: {_explained(error)}"
            if error.code in AGAIN:
                raise _TryAgainError(said) from error
            raise EndpointError(f"{self.url} refused the request, {said}") from error
        except http.client.InvalidURL as error:
            raise EndpointError(f"{self.url!r} is no http address: {error}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _TryAgainError(_reason(error)) from error
        try:
            return json.loads(said)
        except ValueError as error:
            begun = said[:80].decode(errors="replace")
            if begun.lstrip().startswith("<"):
                raise EndpointError(
                    f"{self.url} answers with a page ({begun!r}), which no API does; give the base "
                    "of one, such as http://localhost:8000/v1"
                ) from error
            # It may be cut off in the middle: the server went away while it spoke.
            raise _TryAgainError(f"the answer is no JSON: {begun!r}") from error


def _explained(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says of its refusal; it may go away while it says it."""
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, http.client.HTTPException) as broken:
        return f"{error.reason} (and then {_reason(broken)})"


def _reason(error: Exception) -> str:
    """What went wrong on the way, in the system's words where it has some."""
    inner = getattr(error, "reason", error)
    return getattr(inner, "strerror", None) or str(inner) or repr(error)


class _TryAgainError(Exception):
    """A failure that may pass."""


def _data_url(picture_HW3: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(picture_HW3).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
