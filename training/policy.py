"""A model on packed rows: what policy, reference and teacher passes share.

`Policy.forward` is the only entry, so that FSDP2 gathers the root's weights (embeddings, head)
around everything that uses them.

Letters: T tokens of a row, t those of this process, N supervised tokens, n those of this process,
W text width, V vocabulary, F vision tokens, P processes that share a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from internvideo3.model.attention import RowAttention
from internvideo3.model.prerope import PreropeAttention
from internvideo3.model.vision import Encoded, encode
from internvideo3.training.attention import GQA_NAME, Backend, PackedAttention, Sharing
from internvideo3.training.objectives.linear_cross_entropy import IGNORE, chunk_tokens
from internvideo3.training.packing import Pack

Objective = Callable[[Tensor, Tensor], Tensor]
"""(hidden states `[N,W]` that predict the supervised tokens, output embeddings `[V,W]`) → loss."""

BARRED_LOGIT = -1e9
"""Finite, so that probability times log-probability of a barred id is 0 and not NaN."""


class Policy(nn.Module):
    """A Qwen3-VL, GQA or M²LA, on packed rows."""

    def __init__(
        self,
        model: Any,
        *,
        train_vision: bool = False,
        recompute: bool = False,
        backend: Backend = "segments",
        sharing: Sharing | None = None,
    ) -> None:
        """Prepare a model for packed rows.

        Args:
            model: A Qwen3-VL for conditional generation, GQA or M²LA.
            train_vision: Whether the vision tower learns.
            recompute: Recompute each layer's activations in the backward pass.
            backend: Of the attention; all have the same numbers.
            sharing: The processes among which rows are divided.

        Raises:
            ValueError: The attention of the model cannot run on packed rows.
        """
        super().__init__()
        self.model = model
        self.train_vision = train_vision
        self.backend = backend
        self.sharing = sharing
        _check_attention(model)
        model.model.visual.requires_grad_(train_vision)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    def beside(self, model: Any) -> Policy:
        """Another model, not trained, on the same rows in the same way."""
        return Policy(model.eval(), backend=self.backend, sharing=self.sharing)

    def copied(self) -> Policy:
        """A copy as it is now, not trained."""
        return self.beside(deepcopy(self.model))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def forward(self, pack: Pack, objective: Objective) -> Tensor:
        """Run a row and apply an objective to what predicts its supervised tokens."""
        inner, config = self.model.model, self.model.config
        pack = pack if self.sharing is None else pack.padded(self.sharing.count)
        mine = self._part(len(pack.ids_T))
        visual_T = (pack.ids_T == config.video_token_id) | (pack.ids_T == config.image_token_id)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_vision):
            before = int(visual_T[: mine.start].sum())
            seen = self._see(pack).slice(before, before + int(visual_T[mine].sum()))
        visual_1t = visual_T[None, mine]
        embeds_1tW = inner.language_model.embed_tokens(pack.ids_T[None, mine])
        tokens_FW = seen.tokens_VX.to(embeds_1tW.dtype)
        hidden_1tW = inner.language_model(
            inputs_embeds=embeds_1tW.masked_scatter(visual_1t[..., None], tokens_FW),
            # Of no use, but of a form that transformers passes on: it would make T² numbers.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds_1tW.device),
            position_ids=pack.positions_3T[:, None, mine],
            visual_pos_masks=visual_1t,
            deepstack_visual_embeds=list(seen.deepstack),
            use_cache=False,
            packed=PackedAttention(pack.document_T, pack.branch_T, self.backend, self.sharing),
        ).last_hidden_state
        told_T = pack.labels_T != IGNORE
        hidden_NW = self._whole(hidden_1tW[0, told_T[mine]], told_T)
        return objective(hidden_NW, self.model.lm_head.weight)

    def _part(self, tokens: int) -> slice:
        """This process's tokens of a row."""
        if self.sharing is None:
            return slice(0, tokens)
        each = tokens // self.sharing.count
        return slice(self.sharing.rank * each, (self.sharing.rank + 1) * each)

    def _whole(self, hidden_nW: Tensor, told_T: Tensor) -> Tensor:
        """Hidden states of all supervised tokens of the row, from each process's own."""
        if self.sharing is None:
            return hidden_nW
        counts = told_T.view(self.sharing.count, -1).sum(1).tolist()
        longest = max(counts)
        padded = functional.pad(hidden_nW, (0, 0, 0, longest - len(hidden_nW)))
        parts_PnW = self.sharing.gathered(padded, 0).split(longest)
        return torch.cat([part[:n] for part, n in zip(parts_PnW, counts, strict=True)])

    def _see(self, pack: Pack) -> Encoded:
        """Everything of a row that can be seen, in the order of its tokens.

        A row of text alone shows the tower one grey picture and uses nothing of it, so that
        processes that share the tower's weights gather them together.
        """
        if not len(pack.grid_thw):
            side = self.model.config.vision_config.spatial_merge_size
            width = self.model.model.visual.patch_embed.proj.weight[0].numel()
            grey = torch.zeros(side * side, width, device=pack.ids_T.device)
            seen = encode(self.model, "image", grey, torch.tensor([1, side, side]))
            return seen.slice(0, 0)
        pieces, first = [], 0
        for grid_3 in _joined(pack.grid_thw):
            count = int(grid_3.prod())
            pieces.append(encode(self.model, "video", pack.pixels[first : first + count], grid_3))
            first += count
        return Encoded.joined(pieces)


def token_logps(
    hidden_NW: Tensor,
    head_VW: Tensor,
    ids_N: Tensor,
    barred: Sequence[int],
    chunk: int | None = None,
) -> Tensor:
    """Log-probabilities `[N]` of given ids, a chunk of logits at a time.

    Args:
        hidden_NW: Hidden states that predict the ids.
        head_VW: Output embeddings.
        ids_N: The ids.
        barred: Ids that sampling never takes; their probability is 0 here too.
        chunk: Tokens projected at a time; None: `chunk_tokens` of the vocabulary.
    """
    size = chunk or chunk_tokens(len(head_VW))

    def some(hidden_CW: Tensor, ids_C: Tensor) -> Tensor:
        logits_CV = barred_logits(functional.linear(hidden_CW, head_VW).float(), barred)
        picked_C: Tensor = logits_CV.gather(-1, ids_C[:, None])[:, 0] - logits_CV.logsumexp(-1)
        return picked_C

    pieces = zip(hidden_NW.split(size), ids_N.split(size), strict=True)
    return torch.cat([checkpoint(some, h, i, use_reentrant=False) for h, i in pieces])


def barred_logits(logits_NV: Tensor, barred: Sequence[int]) -> Tensor:
    """Logits under which the barred ids have no probability."""
    where = torch.tensor(list(barred), dtype=torch.long, device=logits_NV.device)
    return logits_NV.index_fill(-1, where, BARRED_LOGIT)


def vision_ids(model: Any, processor: Any) -> tuple[int, ...]:
    """Ids that only a prompt may hold.

    A policy that samples one would be asked for features that do not exist at its next forward.
    """
    config, tokenizer = model.config, processor.tokenizer
    known = tokenizer.get_vocab()
    named = {
        config.image_token_id, config.video_token_id,
        config.vision_start_token_id, config.vision_end_token_id,
    }  # fmt: skip
    return tuple(sorted(named | {known[t] for t in ("<|vision_pad|>",) if t in known}))


def _check_attention(model: Any) -> None:
    """Let transformers' own attention find the packed one; M²LA finds it by itself."""
    text = model.model.language_model
    first = text.layers[0].self_attn
    if isinstance(first, PreropeAttention):
        raise ValueError(
            "the row form `prerope` does not train: its rows hold no rotary key. Convert with the "
            "row form `latent` or `released`."
        )
    if not isinstance(first, RowAttention):
        text.config._attn_implementation = GQA_NAME


def _joined(grids_N3: Tensor) -> list[Tensor]:
    """Neighbouring grids of one frame size as one long video.

    The tower attends within a temporal patch only, so this changes nothing but the number of calls.
    """
    joined: list[Tensor] = []
    for grid_3 in grids_N3:
        if joined and torch.equal(joined[-1][1:], grid_3[1:]):
            joined[-1] = torch.cat([joined[-1][:1] + grid_3[:1], grid_3[1:]])
        else:
            joined.append(grid_3)
    return joined
