"""A session whose replies are heard while they are made, and can be cut short."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from internvideo3.model.session import Limits, Reply, Session, StopReason

PIECE = 8
"""Tokens between two times that the listener is told."""
HALF = "\N{REPLACEMENT CHARACTER}"

Listener = Callable[[str], None]
"""Told of what was said since the last time; may raise to end the reply."""


class HeardSession(Session):
    """A session that generates piece by piece; a greedy reply is that of `Session`.

    A sampled reply draws the pieces after the first from seeds of their own.

    Args:
        model: see `Session`.
        processor: see `Session`.
        media_options: see `Session`.
        listener: told of every piece, of an empty one too.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        media_options: Mapping[str, Any] | None = None,
        listener: Listener,
    ) -> None:
        super().__init__(model, processor, media_options=media_options)
        self.listener = listener

    def generate(self, limits: Limits) -> Reply:
        """Answers; what the listener raises ends the reply and is passed on."""
        prompt_tokens, ids, told = len(self), list[int](), ""
        self.listener("")
        while True:
            most = min(PIECE, limits.max_new_tokens - len(ids))
            seed = random.Random(f"{limits.seed}/{len(ids)}").getrandbits(62)
            piece = super().generate(
                replace(limits, max_new_tokens=most, seed=seed if ids else limits.seed)
            )
            ids += piece.token_ids
            text: str = self.processor.tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            ended = piece.stop_reason is StopReason.STOP or len(ids) >= limits.max_new_tokens
            # Half a character, at the end of a piece, is told when its rest is there.
            whole = text if ended else text.rstrip(HALF)
            self.listener(whole[len(told) :])
            told = max(told, whole, key=len)
            if ended:
                return Reply(text, tuple(ids), piece.stop_reason, prompt_tokens, len(ids))
