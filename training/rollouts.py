"""Responses of the policy to a prompt, sampled together in forks of one session.

A `Sampler` has the policy in this process; `remote.RemoteSampler` asks a server that has it.

Vision ids are barred: a policy that says one could not be continued. The log-probabilities are of
the sampled ids under the barred distribution at temperature 1, which is what training recomputes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from internvideo3.model.decoding import Limits
from internvideo3.model.prompt import Prompter
from internvideo3.model.session import Reply, Session
from internvideo3.training.documents import Branch, Document, Prompt


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

    def answers(self, trunk: Session, count: int, seed: int) -> list[Response]:
        """Continue a context `count` times; equal seeds give equal ids."""
        limits = [
            Limits(
                self.max_new_tokens,
                stop_ids=(self.processor.tokenizer.eos_token_id,),
                temperature=1.0,
                seed=(seed * 4099 + n) % 2**63,
                barred_ids=self.barred,
            )
            for n in range(count)
        ]
        replies = Session.generate_batch([trunk.fork() for _ in limits], limits)
        return [Response(one.token_ids, _drawn(one), one.text) for one in replies]


def _drawn(reply: Reply) -> tuple[float, ...]:
    assert reply.logps is not None, "a reply at temperature 1 is drawn"
    return reply.logps


def answered(prompt: Prompt, responses: Sequence[Response], prompter: Prompter) -> Document:
    """A prompt and its responses as a document.

    The prompt's last token opens each branch, since what it predicts differs between them.
    """
    piece = prompter.piece(prompt.text, [prompt.frames])
    last = piece.ids[-1]
    branches = tuple(Branch((last, *one.ids), len(one.ids)) for one in responses)
    return Document(tuple(piece.ids[:-1]), tuple(piece.media), branches)
