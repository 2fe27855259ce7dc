"""A teacher behind a server: log-probabilities of the ids that the student sampled.

The request is OpenAI's legacy completion with `echo`: `prompt` (ids), `max_tokens` 0, `logprobs`
0, and beside it `videos`, the very frames that the student saw, so that the teacher is not blind.
The reply has `choices[0].logprobs.tokens` and `.token_logprobs`, one of each for each id. The
tokens (as the vocabulary spells them, as text, or as `token_id:ID`) are compared with ours: a
teacher with other token ids would judge other words. Its probabilities are over the whole
vocabulary, the student's over what it may sample.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from internvideo3.tasks.video import Frames
from internvideo3.training.documents import Prompt
from internvideo3.training.endpoint import Endpoint, EndpointError
from internvideo3.training.recipe import RecipeError
from internvideo3.training.rollouts import Response


@dataclass(frozen=True)
class RemoteTeacher:
    """Scores responses through an endpoint."""

    endpoint: Endpoint
    tokenizer: Any

    def logps(self, prompt: Prompt, prompt_ids: list[int], response: Response) -> Tensor:
        """The teacher's log-probability of each id of a response, `[T]`.

        Raises:
            EndpointError: The server does not answer, or in another form.
            RecipeError: Its tokens are not the student's.
        """
        ids = [*prompt_ids, *response.ids]
        body = {
            "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0,
            # vLLM's: text cannot tell the ids of half characters apart.
            "return_tokens_as_token_ids": True, "videos": [encoded(prompt.frames)],
        }  # fmt: skip
        reply = self.endpoint.post("completions", body)
        try:
            told = reply["choices"][0]["logprobs"]
            tokens, values = list(told["tokens"]), list(told["token_logprobs"])
        except (LookupError, TypeError) as error:
            raise EndpointError(
                f"{self.endpoint.url} gives no log-probabilities of a prompt (echo): {reply!r:.300}"
            ) from error
        self._check_tokens(tokens, ids)
        return torch.tensor(values[-len(response.ids) :], dtype=torch.float32)

    def _check_tokens(self, tokens: list[str], ids: list[int]) -> None:
        ours = self.tokenizer.convert_ids_to_tokens(ids)
        spelt = zip(ids, ours, tokens, strict=False)
        if len(tokens) == len(ids) and all(self._is(*one) for one in spelt):
            return
        pairs = list(zip(ours, tokens, strict=False))
        differing = [f"{i}: {a!r} here, {b!r} there" for i, (a, b) in zip(ids, pairs, strict=False)
                     if not self._is(i, a, b)]  # fmt: skip
        raise RecipeError(
            f"the teacher at {self.endpoint.url} has other token ids ({len(ours)} tokens here, "
            f"{len(tokens)} there; {'; '.join(differing[:3])}). Distillation by ids needs a "
            "teacher with the student's tokenizer."
        )

    def _is(self, token_id: int, ours: str, theirs: str) -> bool:
        """Whether a server's token is the one of an id."""
        return theirs in (ours, f"token_id:{token_id}", self.tokenizer.decode([token_id]))


def encoded(frames: Frames) -> dict[str, Any]:
    """Frames as JSON can hold them: lossless pictures and their places in the source."""
    return {
        "frames": [_png(picture) for picture in frames.pixels_THWC],
        "indices": list(frames.indices),
        "source_fps": frames.source_fps,
        "total_frames": frames.total_frames,
    }


def _png(picture_HWC: np.ndarray[Any, Any]) -> str:
    file = io.BytesIO()
    Image.fromarray(picture_HWC).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
