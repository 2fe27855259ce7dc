"""A teacher, or the policy itself, behind a server (`internvideo3 serve-policy` is one).

**Teacher**: log-probabilities of the ids that the student sampled. The request is OpenAI's legacy
completion with `echo`: `prompt` (ids), `max_tokens` 0, `logprobs` 0, and beside it `videos`, the
very frames that the student saw, so that the teacher is not blind. The reply has
`choices[0].logprobs.tokens` and `.token_logprobs`, one of each for each id. The tokens (as the
vocabulary spells them, as text, or as `token_id:ID`) are compared with ours: a teacher with other
token ids would judge other words. Its probabilities are over the whole vocabulary, the student's
over what it may sample.

**Rollouts**: the same request without `echo`, with `n`, `seed`, `temperature` 1, and `logit_bias`
-100 for the ids that are never sampled. The reply's choices have `token_ids` and `token_logprobs`;
its `system_fingerprint` is the digest of the weights that sampled. Before each step the trainer
writes its weights as a checkpoint and names the folder to `update_weights_from_disk` (a path that
SGLang has too); a server that came back with older weights is given them again.

**Sight**: `videos` is a field of ours, and a server that ignores what it does not know would answer
all the same, from words alone. So the first answers of a run are compared with those to blank
frames in the video's place: numbers that stay the same (to 1e-6) are those of a blind server, and
training stops. Not found is a blind server whose numbers differ from request to request.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from internvideo3.model.prompt import Prompter
from internvideo3.tasks.video import Frames
from internvideo3.training.documents import Prompt
from internvideo3.training.endpoint import Endpoint, EndpointError
from internvideo3.training.recipe import RecipeError
from internvideo3.training.rollouts import Response

SEES = "looks at videos"
"""What `Endpoint.known` holds once it is found."""
SAME = 1e-6
"""Nats by which log-probabilities of one computation may differ."""
CERTAIN = 1e-3
"""Nats: what is this near to 0 may be as likely after every video."""
LOOK_TOKENS = 16
"""Most tokens sampled for a look at blank frames."""
ROUNDING = 1e-2
"""Nats by which a server's log-probability may lie above 0."""


@dataclass(frozen=True)
class RemoteTeacher:
    """Scores responses through an endpoint."""

    endpoint: Endpoint
    tokenizer: Any

    def logps(self, prompt: Prompt, prompt_ids: list[int], response: Response) -> Tensor:
        """The teacher's log-probability of each id of a response, `[T]`.

        Raises:
            EndpointError: The server does not answer, in another form, or without looking at the
                video.
            RecipeError: Its tokens are not the student's.
        """
        ids = [*prompt_ids, *response.ids]
        values = self._values(prompt.frames, ids)
        said = _log_probabilities(values[-len(response.ids) :], self.endpoint)
        if SEES not in self.endpoint.known:
            _check_sight(self.endpoint, zip(values, self._values(blank(prompt.frames), ids),
                                            strict=True))  # fmt: skip
        return torch.tensor(said, dtype=torch.float32)

    def _values(self, frames: Frames, ids: list[int]) -> list[Any]:
        """What the server tells of each id; whatever it likes of those of the prompt."""
        body = {
            "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0,
            # vLLM's: text cannot tell the ids of half characters apart.
            "return_tokens_as_token_ids": True, "videos": [encoded(frames)],
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
        if len(values) != len(ids):
            raise EndpointError(
                f"{self.endpoint.url} gives {len(values)} log-probabilities of {len(ids)} ids; one "
                "of each is needed (null for those that nothing said)."
            )
        return values

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


@dataclass(frozen=True)
class PushedWeights:
    """A checkpoint that a server was told to answer with."""

    endpoint: Endpoint
    folder: Path
    """Which the server sees under the same path."""
    digest: str
    """Of its weights."""

    def push(self) -> None:
        """Tell the server.

        Raises:
            EndpointError: It does not answer, cannot read the folder, or read something else.
        """
        beside = self.endpoint.beside_version()
        reply = beside.post("update_weights_from_disk", {"model_path": str(self.folder)})
        found = reply.get("digest") if isinstance(reply, dict) else None
        if found not in (None, self.digest):
            raise EndpointError(
                f"{self.endpoint.url} read other weights from {self.folder} ({found!s:.12}, not "
                f"{self.digest:.12}): it must see the trainer's disk under the same path."
            )


@dataclass(frozen=True)
class RemoteSampler:
    """Samples responses through an endpoint, from weights that were pushed to it."""

    weights: PushedWeights
    prompter: Prompter
    barred: tuple[int, ...]
    max_new_tokens: int

    def sample(self, prompt: Prompt, count: int, seed: int) -> list[Response]:
        """Answer a prompt `count` times.

        Raises:
            EndpointError: The server does not answer, in another form, from other weights, or
                without looking at the video.
        """
        ids = self.prompter.piece(prompt.text, [prompt.frames]).ids
        body = {
            "prompt": ids, "videos": [encoded(prompt.frames)], "n": count, "seed": seed,
            "temperature": 1.0, "max_tokens": self.max_new_tokens, "logprobs": 0,
            "logit_bias": {str(one): -100 for one in self.barred}, "return_token_ids": True,
        }  # fmt: skip
        reply = self.weights.endpoint.post("completions", body)
        if self._older(reply):
            self.weights.push()
            reply = self.weights.endpoint.post("completions", body)
        if self._older(reply):
            raise EndpointError(
                f"{self.weights.endpoint.url} samples from weights "
                f"{reply['system_fingerprint']!s:.12}, the policy's are {self.weights.digest:.12}. "
                "Does another trainer push to it?"
            )
        made = self._responses(reply, count)
        if SEES not in self.weights.endpoint.known:
            self._look(body, prompt.frames, made)
        return made

    def _look(self, body: Mapping[str, Any], frames: Frames, made: Sequence[Response]) -> None:
        """Compare a few tokens with what is sampled where the video is blank.

        Only the log-probabilities of equal ids after equal ids say something, whatever was drawn.
        """
        few = min(self.max_new_tokens, LOOK_TOKENS)
        asked = {**body, "videos": [encoded(blank(frames))], "max_tokens": few}
        reply = self.weights.endpoint.post("completions", asked)
        others = self._responses(reply, len(made))
        _check_sight(
            self.weights.endpoint,
            (pair for one in made for other in others for pair in _in_step(one, other)),
        )

    def _older(self, reply: Any) -> bool:
        told = reply.get("system_fingerprint") if isinstance(reply, dict) else None
        return told not in (None, self.weights.digest)

    def _responses(self, reply: Any, count: int) -> list[Response]:
        try:
            made = [self._response(choice) for choice in reply["choices"]]
        except (LookupError, TypeError, ValueError) as error:
            raise EndpointError(
                f"{self.weights.endpoint.url} gives no sampled ids with their log-probabilities "
                f"(return_token_ids, logprobs): {reply!r:.300}"
            ) from error
        if len(made) != count or not all(one.ids for one in made):
            raise EndpointError(
                f"{self.weights.endpoint.url} gave {len(made)} responses of "
                f"{[len(one.ids) for one in made]} tokens; {count} were asked for."
            )
        self._check(made)
        return made

    def _check(self, made: Sequence[Response]) -> None:
        """That the responses can be trained on, and are what was asked for."""
        for one in made:
            _log_probabilities(one.logps, self.weights.endpoint)
        longest = max(len(one.ids) for one in made)
        if longest > self.max_new_tokens:
            raise EndpointError(
                f"{self.weights.endpoint.url} sampled {longest} tokens; max_tokens was "
                f"{self.max_new_tokens}, which it must keep to."
            )
        barred = {token for one in made for token in one.ids}.intersection(self.barred)
        if barred:
            raise EndpointError(
                f"{self.weights.endpoint.url} sampled the ids {sorted(barred)}, which logit_bias "
                "-100 bars: a policy cannot be trained on vision tokens that it says itself. The "
                "server must keep to logit_bias."
            )

    def _response(self, choice: Mapping[str, Any]) -> Response:
        ids = tuple(map(int, choice["token_ids"]))
        logps = tuple(map(float, choice["logprobs"]["token_logprobs"]))
        if len(ids) != len(logps):
            raise ValueError("as many log-probabilities as ids are needed")
        text = self.prompter.tokenizer.decode(list(ids), skip_special_tokens=True)
        return Response(ids, logps, text)


def blank(frames: Frames) -> Frames:
    """Frames of the same form without a picture: black for bright ones, white for dark ones."""
    shade = 0 if frames.pixels_THWC.mean() > 127 else 255
    return replace(frames, pixels_THWC=np.full_like(frames.pixels_THWC, shade), digest="")


def _check_sight(endpoint: Endpoint, pairs: Iterable[tuple[Any, Any]]) -> None:
    """Note that a server sees, or refuse one that does not.

    Args:
        endpoint: The server.
        pairs: Log-probabilities of the same ids, with the video and with blank frames.

    Raises:
        EndpointError: They are the same. (Where all are certain nothing is known, and the next
            answer is looked at.)
    """
    told = [(a, b) for a, b in pairs if _is_number(a) and _is_number(b)]
    if any(abs(a - b) > SAME for a, b in told):
        endpoint.known.add(SEES)
    elif any(a < -CERTAIN for a, _ in told):
        raise EndpointError(
            f"{endpoint.url} gives the same log-probabilities for a video and for blank frames in "
            "its place: it does not look at the field `videos`, so training would be blind. Use "
            "`internvideo3 serve-policy`, or a server that reads the field (src/internvideo3/"
            "training/remote.py has its form)."
        )


def _in_step(one: Response, other: Response) -> list[tuple[float, float]]:
    """Log-probabilities of the ids with which two responses both begin."""
    pairs: list[tuple[float, float]] = []
    steps = zip(one.ids, one.logps, other.ids, other.logps, strict=False)
    for id_here, here, id_there, there in steps:
        if id_here != id_there:
            break
        pairs.append((here, there))
    return pairs


def _log_probabilities(values: Sequence[Any], endpoint: Endpoint) -> tuple[float, ...]:
    """A server's numbers, if they are what they should be.

    Raises:
        EndpointError: One is none: null, no number, not finite, or above 0.
    """
    for place, value in enumerate(values):
        if not _is_number(value) or value > ROUNDING:
            raise EndpointError(
                f"{endpoint.url} gives {value!r:.80} as log-probability of token {place + 1} of "
                f"{len(values)} of a response, where a finite number of at most 0 is needed. "
                "See the server's own log; its weights or their number format may be broken."
            )
    return tuple(map(float, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def decoded(video: Mapping[str, Any]) -> Frames:
    """What `encoded` made of frames.

    Raises:
        ValueError: It is no such thing.
    """
    try:
        pictures = [_picture(one) for one in video["frames"]]
        return Frames(
            pixels_THWC=np.stack(pictures),
            indices=tuple(map(int, video["indices"])),
            source_fps=float(video["source_fps"]),
            total_frames=int(video["total_frames"]),
            duration_s=int(video["total_frames"]) / float(video["source_fps"]),
            digest="",
        )
    except (KeyError, TypeError, OSError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"a video needs frames (pictures of one size, base64), indices, source_fps and "
            f"total_frames: {error}"
        ) from error


def _picture(text: str) -> np.ndarray[Any, Any]:
    content = base64.b64decode(text, validate=True)
    try:
        # One kind alone: some that PIL knows run other programs (EPS, Ghostscript).
        return np.asarray(Image.open(io.BytesIO(content), formats=("PNG",)).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


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
