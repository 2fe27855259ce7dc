"""One step of the text model over a segmented cache, for GQA and M²LA alike.

Positions are explicit and three-dimensional; nothing here reads or writes `rope_deltas`, which is
mutable state of the model and belongs to whoever ran it last.

Axes: B batch, T new tokens, X text model width, V vision tokens, Y vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from internvideo3.model.cache import (
    LatentCache,
    Part,
    Placement,
    SegmentedCache,
    SharedKVCache,
)
from internvideo3.model.config import InternVideo3TextConfig
from internvideo3.model.device import current
from internvideo3.model.segments import attend
from internvideo3.model.vision import Encoded

SEGMENTS = "internvideo3_segments"
"""Name under which transformers finds `_attend_segments`. It is not registered for masks, so that
transformers builds none: the cache knows what each query may see."""


@dataclass(frozen=True)
class Tokens:
    """New tokens of a batch."""

    ids_BT: Tensor
    positions_3BT: Tensor
    """Temporal, height and width position of each token."""
    visual_BT: Tensor | None = None
    """True for vision tokens; None: there are none."""
    encoded: Encoded | None = None
    """Features of the vision tokens, in order."""

    def chunks(self, size: int) -> Iterator[Tokens]:
        """Runs of at most `size` tokens; vision features are cut along."""
        seen = 0
        for start in range(0, self.ids_BT.shape[1], size):
            cut = slice(start, start + size)
            ids_BT, positions_3BT = self.ids_BT[:, cut], self.positions_3BT[..., cut]
            if self.visual_BT is None or self.encoded is None:
                yield Tokens(ids_BT, positions_3BT)
                continue
            visual_BT = self.visual_BT[:, cut]
            count = int(visual_BT.sum())
            if count:
                encoded = self.encoded.slice(seen, seen + count)
                yield Tokens(ids_BT, positions_3BT, visual_BT, encoded)
            else:
                yield Tokens(ids_BT, positions_3BT)
            seen += count


def new_cache(model: Any) -> SegmentedCache:
    """An empty cache of the kind the model needs."""
    text = model.config.text_config
    kind = LatentCache if isinstance(text, InternVideo3TextConfig) else SharedKVCache
    return kind(text.num_hidden_layers)


def run(
    model: Any, cache: SegmentedCache, tokens: Tokens, placement: Placement | None = None
) -> Tensor:
    """Appends tokens to the cache; returns their final hidden states [B, T, X]."""
    text = model.model.language_model
    embeds_BTX = text.embed_tokens(tokens.ids_BT)
    deepstack: list[Tensor] | None = None
    if tokens.visual_BT is not None and tokens.encoded is not None:
        embeds_BTX[tokens.visual_BT] = tokens.encoded.tokens_VX.to(embeds_BTX)
        deepstack = list(tokens.encoded.deepstack)
    with current(embeds_BTX.device), _over_segments(text), cache.step(placement):
        hidden: Tensor = text(
            inputs_embeds=embeds_BTX,
            position_ids=tokens.positions_3BT,
            past_key_values=cache,
            use_cache=True,
            visual_pos_masks=tokens.visual_BT,
            deepstack_visual_embeds=deepstack,
        ).last_hidden_state
    return hidden


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Next-token logits [..., Y] of hidden states [..., X]."""
    scores: Tensor = model.lm_head(hidden)
    return scores


@contextmanager
def _over_segments(text: nn.Module) -> Iterator[None]:
    """Makes transformers' GQA layers attend over the segments of a `SharedKVCache`."""
    config: Any = text.config
    before = config._attn_implementation
    config._attn_implementation = SEGMENTS
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend_segments(
    module: nn.Module,
    query: Tensor,
    key: list[Part],
    value: list[Part],
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; `key` is what `SharedKVCache.update` returned."""
    stored_heads = key[0].tensors[0].shape[1]
    out_BKGTD = attend(query.unflatten(1, (stored_heads, -1)), key, scaling)
    return out_BKGTD.flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(SEGMENTS, _attend_segments)
