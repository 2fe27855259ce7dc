"""The models that can be converted, seen through one interface.

Qwen3-VL (any size), Qwen3 dense, and Llama-style GQA. All three project queries, keys and values,
rotate queries and keys by the same `rotate_half` convention and hand `position_embeddings` to every
attention layer; QK-norm is there or not. Groups may have any size: with a key/value head for each
query head, or with one for all, every formula holds as it stands. One head has nothing to be mixed
with, so there only its frequencies' importance tells slots apart.

Axes: B batch, T tokens, X model width, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Batch = dict[str, Any]
"""Keyword arguments of a model's forward; `labels` marks the supervised tokens."""

FAMILIES = {"qwen3_vl": "Qwen3-VL", "qwen3": "Qwen3", "llama": "Llama-style GQA"}
"""Model types that can be converted."""


class SourceError(ValueError):
    """A model that cannot be converted; says why and what can."""


@dataclass(frozen=True)
class Projections:
    """How one layer makes its queries, keys and values before rotation."""

    q_proj: Callable[[Tensor], Tensor]
    k_proj: Callable[[Tensor], Tensor]
    v_proj: Callable[[Tensor], Tensor]
    q_norm: Callable[[Tensor], Tensor]
    k_norm: Callable[[Tensor], Tensor]
    head_dim: int

    @classmethod
    def of(cls, attention: Any) -> Projections:
        """Those of a source's attention layer."""
        same = nn.Identity()
        q_norm = getattr(attention, "q_norm", same)
        k_norm = getattr(attention, "k_norm", same)
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        return cls(q, k, v, q_norm, k_norm, attention.head_dim)

    def __call__(self, x_BTX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised unrotated queries [B, H, T, D] and keys, and values, both [B, K, T, D]."""
        shape = (*x_BTX.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x_BTX).view(shape))
        k = self.k_norm(self.k_proj(x_BTX).view(shape))
        v = self.v_proj(x_BTX).view(shape)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@dataclass(frozen=True)
class Source:
    """A GQA model that is to be converted."""

    model: PreTrainedModel

    @classmethod
    def of(cls, model: Any) -> Source:
        """Checks the model.

        Raises:
            SourceError: it cannot be converted.
        """
        check_config(model.config.to_dict())
        return cls(model)

    @property
    def text(self) -> Any:
        """Its text configuration."""
        return self.model.config.get_text_config()

    @property
    def backbone(self) -> nn.Module:
        """The model without its language-model head."""
        return self.model.model  # type: ignore[no-any-return]

    @property
    def head(self) -> nn.Linear:
        """Hidden states to logits."""
        return self.model.lm_head  # type: ignore[no-any-return]

    @property
    def layers(self) -> list[Any]:
        """Its decoder layers."""
        text = getattr(self.model.model, "language_model", self.model.model)
        return list(text.layers)

    @property
    def has_norm(self) -> bool:
        """Whether queries and keys are normalised."""
        return hasattr(self.layers[0].self_attn, "q_norm")

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.model.device

    def hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [B, T, X] of a batch."""
        inputs = {k: v for k, v in on_device(batch, self.device).items() if k != "labels"}
        states: Tensor = self.backbone(**inputs, use_cache=False).last_hidden_state
        return states

    def vision_tokens(self, batch: Batch) -> Tensor:
        """Image and video tokens, boolean [B, T], in host memory."""
        ids = batch["input_ids"].cpu()
        config = self.model.config
        found = torch.zeros(ids.shape, dtype=torch.bool)
        for name in ("image_token_id", "video_token_id"):
            if (token := getattr(config, name, None)) is not None:
                found |= ids == token
        return found

    def supervised(self, batch: Batch) -> Tensor:
        """Positions [B, T] whose next token counts: labelled ones, or all text without labels."""
        ids = batch["input_ids"]
        counts = torch.zeros(ids.shape, dtype=torch.bool)
        if batch.get("labels") is not None:
            counts[:, :-1] = batch["labels"][:, 1:].cpu() != -100
        else:
            counts[:, :-1] = (valid_tokens(batch) & ~self.vision_tokens(batch))[:, 1:]
        return counts


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses what cannot be converted, by its configuration alone.

    Raises:
        SourceError: not a known GQA architecture, already latent, with sliding windows, or with
            rotary or MLP options that a converted model does not have.
    """
    kind = config.get("model_type")
    if str(kind).startswith("internvideo3"):
        raise SourceError(
            "the model is latent already (M²LA); give the GQA model it was converted from."
        )
    if kind not in FAMILIES:
        raise SourceError(
            f"{kind!r} models cannot be converted; known are {', '.join(FAMILIES.values())}."
        )
    text = config.get("text_config", config)
    layer_types = set(text.get("layer_types") or ["full_attention"])
    if text.get("use_sliding_window") or layer_types != {"full_attention"}:
        raise SourceError(
            "the model has sliding-window layers; a latent layer attends to everything. "
            "Convert a model with full attention in every layer."
        )
    if text.get("mlp_bias"):
        raise SourceError("the model's MLP has biases, which a converted model has no place for.")
    heads, kv_heads = text["num_attention_heads"], text.get("num_key_value_heads")
    if kv_heads and heads % kv_heads:
        raise SourceError(f"{heads} query heads do not share {kv_heads} key/value heads evenly.")


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def valid_tokens(batch: Batch) -> Tensor:
    """Tokens that are not padding, boolean [B, T], in host memory."""
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return torch.ones(batch["input_ids"].shape, dtype=torch.bool)
    valid: Tensor = mask.cpu().to(torch.bool)
    return valid
