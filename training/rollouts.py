"""Responses of the policy to a prompt, sampled in a session with a fork for each.

A `Sampler` has the policy in this process; `remote.RemoteSampler` asks a server that has it.

Vision ids are barred: a policy that says one could not be continued. The log-probabilities are of
the sampled ids under the barred distribution at temperature 1, which is what training recomputes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from internvideo3.model.prompt import Prompter
from internvideo3.model.session import Session
from internvideo3.training.documents import Branch, Document, Prompt
from internvideo3.training.policy import barred_logits


@dataclass(frozen=True)
class Response:
    """What the policy said, by id; never tokenised again."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    text: str
    """Without special tokens."""


class Samples(Protocol):
    """Who samples responses."""

    @property
    def barred(self) -> tuple[int, ...]:
        """Ids that are never sampled."""

    def sample(self, prompt: Prompt, count: int, seed: int) -> list[Response]:
        """Answer a prompt `count` times."""


@dataclass(frozen=True)
class Sampler:
    """Samples responses with one model."""

    model: Any
    processor: Any
    barred: tuple[int, ...]
    max_new_tokens: int

    def session(self) -> Session:
        """An empty context; frames come as they are to be seen."""
        return Session(self.model, self.processor, media_options={"do_resize": False})

    def sample(self, prompt: Prompt, count: int, seed: int) -> list[Response]:
        """Answer a prompt `count` times; the prompt is encoded once."""
        trunk = self.session()
        trunk.append_text(prompt.text, [prompt.frames])
        return self.answers(trunk, count, seed)

    @torch.no_grad()
    def answers(self, trunk: Session, count: int, seed: int) -> list[Response]:
        """Continue a context `count` times; equal seeds give equal ids."""
        return [self._one(trunk.fork(), seed * 4099 + n) for n in range(count)]

    def _one(self, session: Session, seed: int) -> Response:
        generator = torch.Generator().manual_seed(seed % 2**63)
        stop = self.processor.tokenizer.eos_token_id
        ids: list[int] = []
        logps: list[float] = []
        while len(ids) < self.max_new_tokens and (not ids or ids[-1] != stop):
            if ids:
                session.append_ids(ids[-1:])
            logits_1V = barred_logits(session.logits_last.float().cpu()[None], self.barred)
            logp_V = logits_1V[0].log_softmax(-1)
            ids.append(int(torch.multinomial(logp_V.exp(), 1, generator=generator)))
            logps.append(float(logp_V[ids[-1]]))
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Response(tuple(ids), tuple(logps), text)


def answered(prompt: Prompt, responses: Sequence[Response], prompter: Prompter) -> Document:
    """A prompt and its responses as a document.

    The prompt's last token opens each branch, since what it predicts differs between them.
    """
    piece = prompter.piece(prompt.text, [prompt.frames])
    last = piece.ids[-1]
    branches = tuple(Branch((last, *one.ids), len(one.ids)) for one in responses)
    return Document(tuple(piece.ids[:-1]), tuple(piece.media), branches)
