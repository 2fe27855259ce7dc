"""A model on packed rows: what policy, reference and teacher passes share.

`Policy.forward` is the only entry, so that FSDP2 gathers the root's weights (embeddings, head)
around everything that uses them.

Letters: T tokens of a row, N supervised tokens, W text width, V vocabulary, F vision tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from internvideo3.model.vision import Encoded, encode
from internvideo3.training.objectives.linear_cross_entropy import CHUNK, IGNORE
from internvideo3.training.packing import Pack

Objective = Callable[[Tensor, Tensor], Tensor]
"""(hidden states `[N,W]` that predict the supervised tokens, output embeddings `[V,W]`) → loss."""

BARRED_LOGIT = -1e9
"""Finite, so that probability times log-probability of a barred id is 0 and not NaN."""


class Policy(nn.Module):
    """A Qwen3-VL, GQA or M²LA, on packed rows."""

    def __init__(self, model: Any, *, train_vision: bool = False, recompute: bool = False) -> None:
        super().__init__()
        self.model = model
        self.train_vision = train_vision
        model.model.visual.requires_grad_(train_vision)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def forward(self, pack: Pack, objective: Objective) -> Tensor:
        """Run a row and apply an objective to what predicts its supervised tokens."""
        inner = self.model.model
        config = self.model.config
        visual_T = (pack.ids_T == config.video_token_id) | (pack.ids_T == config.image_token_id)
        visual_1T = visual_T[None]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.train_vision):
            seen = self._see(pack)
        embeds_1TW = inner.language_model.embed_tokens(pack.ids_T[None])
        tokens_FW = seen.tokens_VX.to(embeds_1TW.dtype)
        embeds_1TW = embeds_1TW.masked_scatter(visual_1T[..., None], tokens_FW)
        hidden_1TW = inner.language_model(
            inputs_embeds=embeds_1TW,
            attention_mask=_additive(pack.visible(), embeds_1TW.dtype),
            position_ids=pack.positions_3T[:, None],
            visual_pos_masks=visual_1T,
            deepstack_visual_embeds=list(seen.deepstack),
            use_cache=False,
        ).last_hidden_state
        return objective(hidden_1TW[0, pack.labels_T != IGNORE], self.model.lm_head.weight)

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
    hidden_NW: Tensor, head_VW: Tensor, ids_N: Tensor, barred: Sequence[int], chunk: int = CHUNK
) -> Tensor:
    """Log-probabilities `[N]` of given ids, a chunk of logits at a time.

    Args:
        hidden_NW: Hidden states that predict the ids.
        head_VW: Output embeddings.
        ids_N: The ids.
        barred: Ids that sampling never takes; their probability is 0 here too.
        chunk: Tokens projected at a time.
    """

    def some(hidden_CW: Tensor, ids_C: Tensor) -> Tensor:
        logits_CV = barred_logits(functional.linear(hidden_CW, head_VW).float(), barred)
        picked_C: Tensor = logits_CV.gather(-1, ids_C[:, None])[:, 0] - logits_CV.logsumexp(-1)
        return picked_C

    pieces = zip(hidden_NW.split(chunk), ids_N.split(chunk), strict=True)
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


def _additive(sees_TT: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(sees_TT.shape, dtype=dtype, device=sees_TT.device)
    return mask.masked_fill_(~sees_TT, torch.finfo(dtype).min)[None, None]


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
