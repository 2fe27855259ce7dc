"""A policy for trainers in other processes: samples ids, scores ids, takes new weights. No HTTP.

Ids go in and come out, so nothing is tokenised twice; frames come with them, as the trainer sees
them. What is sampled, and how likely it was, is what `rollouts.Sampler` gives in the trainer's own
process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from internvideo3.model.checkpoint import load_model, resolve_checkpoint, weights_digest
from internvideo3.model.prompt import Frames, Piece, Prompter, PromptError, check_places
from internvideo3.training.documents import Branch, Document
from internvideo3.training.packing import pack
from internvideo3.training.policy import Policy, token_logps
from internvideo3.training.rollouts import Response, Sampler


class ServedPolicy:
    """A model, and the digest of its weights.

    Args:
        name: Checkpoint folder or name.
        device: Where to; None for CUDA if there is a GPU.
        dtype: A floating type, or auto.

    Raises:
        CheckpointError: It cannot be used.
        ValueError: Its attention cannot run on packed rows.
    """

    def __init__(self, name: str | Path, device: str | None = None, dtype: str = "auto") -> None:
        self._device, self._dtype = device, dtype
        self.take(resolve_checkpoint(name))

    def take(self, folder: Path) -> None:
        """Answer with the weights of a checkpoint folder from here on.

        Raises:
            CheckpointError: It cannot be used; the present weights stay.
        """
        model, self.processor = load_model(folder, self._device, self._dtype)
        # As the trainer holds it, so that both compute with the same attention.
        self.policy = Policy(model.eval())
        self.digest = weights_digest(folder)
        """Of the weights that answer at present."""

    @property
    def model(self) -> Any:
        """The model that answers."""
        return self.policy.model

    def sample(
        self, ids: Sequence[int], videos: Sequence[Frames], *, count: int, seed: int,
        barred: tuple[int, ...], max_new_tokens: int,
    ) -> list[Response]:  # fmt: skip
        """Continue a prompt `count` times at temperature 1.

        Raises:
            PromptError: The prompt's vision tokens are not those of its videos.
        """
        sampler = Sampler(self.model, self.processor, barred, max_new_tokens)
        trunk = sampler.session()
        trunk.append_piece(self._piece(ids, videos))
        return sampler.answers(trunk, count, seed)

    @torch.no_grad()
    def logps(self, ids: Sequence[int], videos: Sequence[Frames]) -> list[float | None]:
        """How likely each id is after those before it, over the whole vocabulary.

        None for the ids up to the last vision token and the one after it, which nothing said; of
        words alone, for the first.

        Raises:
            PromptError: The vision tokens are not those of the videos, or no words follow them or
                the first id.
        """
        piece = self._piece(ids, videos)
        config = self.model.config
        check_places(piece, config)
        seen = {config.image_token_id, config.video_token_id}
        first = max((n for n, one in enumerate(ids) if one in seen), default=-1) + 1
        trunk, words = ids[: first + 1], ids[first + 1 :]
        if not words:
            what = (
                "ends with its video" if piece.media else "is one id, before which nothing stands"
            )
            raise PromptError(f"the prompt {what}; give the ids that follow it.")
        laid = pack([_document(trunk, words, piece)], self.model)
        laid = laid.to(self.model.device)
        labels_N = torch.tensor(words, device=self.model.device)
        found_N = self.policy(laid, lambda h, w: token_logps(h, w, labels_N, ()))
        return [None] * len(trunk) + [float(one) for one in found_N]

    def _piece(self, ids: Sequence[int], videos: Sequence[Frames]) -> Piece:
        tokens = self.processor
        opening = f"{tokens.vision_start_token}{tokens.video_token}{tokens.vision_end_token}"
        prompter = Prompter(self.processor, {"do_resize": False})
        media = [prompter.piece(opening, [one]).media[0] for one in videos]
        return Piece(list(ids), media)


def _document(trunk: Sequence[int], words: Sequence[int], piece: Piece) -> Document:
    """Words behind a prompt; behind a single id they are a trunk, which cannot be empty."""
    if len(trunk) == 1:
        return Document((*trunk, *words), (), (), ((1, 1 + len(words)),))
    branch = Branch((trunk[-1], *words), len(words))
    return Document(tuple(trunk[:-1]), tuple(piece.media), (branch,))
