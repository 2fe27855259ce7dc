"""InternVideo3 on transformers' Qwen3-VL: everything but the text attention is theirs, subclassed.

Importing this file registers the classes with `AutoConfig`, `AutoModel` and
`AutoModelForImageTextToText`, and the text model alone with `AutoModelForCausalLM`; no
`trust_remote_code` is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Qwen3ForCausalLM,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLTextModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer

from internvideo3.model.attention import LatentAttention, RowAttention
from internvideo3.model.cache import LatentCache
from internvideo3.model.config import InternVideo3Config, InternVideo3TextConfig
from internvideo3.model.prerope import PreropeAttention
from internvideo3.model.released import ReleasedAttention

ATTENTIONS: dict[str, type[RowAttention]] = {
    "latent": LatentAttention,
    "prerope": PreropeAttention,
    "released": ReleasedAttention,
}
"""Attention class of each `row_form`."""


class _InitialisesLatentAttention:
    """Gives the parameters that transformers does not know a random start."""

    config: Any

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if not isinstance(module, LatentAttention | PreropeAttention):
            return
        std = self.config.get_text_config().initializer_range
        drawn = [module.k_up, module.v_up]
        if isinstance(module, LatentAttention):
            drawn += [module.rope_write, module.rope_read]
            gain = torch.zeros_like(module.nope_gain)
            gain[0] = 1.0
            init.copy_(module.nope_gain, gain)
        else:
            init.zeros_(module.k_bias)
        for parameter in drawn:
            init.normal_(parameter, std=max(std, parameter.shape[-1] ** -0.5))
        if module.config.modality_adapters:
            init.copy_(module.adapter_weight, torch.eye(module.rank).expand(2, -1, -1))
            init.zeros_(module.adapter_bias)


class InternVideo3TextModel(_InitialisesLatentAttention, Qwen3VLTextModel):
    """Qwen3-VL's text model with M²LA in every layer."""

    config: InternVideo3TextConfig
    config_class = InternVideo3TextConfig
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs = {"hidden_states": Qwen3VLTextDecoderLayer}

    def __init__(self, config: InternVideo3TextConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = ATTENTIONS[config.row_form](config, index)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        visual_pos_masks: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Qwen3VLTextModel.forward`; creates a `LatentCache` where that creates its own.

        No cache is created while gradients are recorded.

        Raises:
            ValueError: the given cache is not a `LatentCache`.
        """
        if past_key_values is not None and not isinstance(past_key_values, LatentCache):
            raise ValueError(
                f"an InternVideo3 model caches latent rows, not {type(past_key_values).__name__}: "
                "pass a LatentCache, or no cache at all."
            )
        wanted = self.config.use_cache if use_cache is None else use_cache
        if wanted and past_key_values is None and not torch.is_grad_enabled():
            past_key_values = LatentCache(self.config.num_hidden_layers)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=wanted and past_key_values is not None,
            visual_pos_masks=visual_pos_masks,
            modality_mask=visual_pos_masks,
            **kwargs,
        )


class InternVideo3Model(_InitialisesLatentAttention, Qwen3VLModel):
    """Vision tower and M²LA text model, without a language-model head."""

    config: InternVideo3Config
    config_class = InternVideo3Config
    _supports_flash_attn = False
    _supports_flex_attn = False


class InternVideo3ForConditionalGeneration(
    _InitialisesLatentAttention, Qwen3VLForConditionalGeneration
):
    """The whole model: answers questions about text, images and videos."""

    config: InternVideo3Config
    config_class = InternVideo3Config
    _supports_flash_attn = False
    _supports_flex_attn = False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Hands `generate` a `LatentCache` unless the caller brought one."""
        _own_cache(generation_config, model_kwargs, text_layers(self.config))


class InternVideo3ForCausalLM(_InitialisesLatentAttention, Qwen3ForCausalLM):
    """The text model alone, for sources without vision (Qwen3 dense, Llama-style GQA).

    On text Qwen3-VL's three position axes are equal, so its text model is theirs.
    """

    config: InternVideo3TextConfig  # type: ignore[assignment]
    config_class = InternVideo3TextConfig
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_record_outputs = {"hidden_states": Qwen3VLTextDecoderLayer}

    def __init__(self, config: InternVideo3TextConfig) -> None:
        # Qwen3ForCausalLM's own __init__ would build a GQA model first.
        Qwen3PreTrainedModel.__init__(self, config)
        self.model = InternVideo3TextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """Hands `generate` a `LatentCache` unless the caller brought one."""
        _own_cache(generation_config, model_kwargs, self.config.num_hidden_layers)


def _own_cache(
    generation_config: GenerationConfig, model_kwargs: dict[str, Any], layers: int
) -> None:
    """Puts a `LatentCache` among the arguments of `generate` unless the caller brought a cache.

    Raises:
        ValueError: another kind of cache is asked for.
    """
    if generation_config.cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={generation_config.cache_implementation!r} stores keys and "
            "values; an InternVideo3 model has its own cache. Leave the option out."
        )
    if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
        model_kwargs["past_key_values"] = LatentCache(layers)


def text_layers(config: InternVideo3Config) -> int:
    """Number of text layers."""
    text = config.text_config
    assert isinstance(text, InternVideo3TextConfig)
    return text.num_hidden_layers


AutoModel.register(InternVideo3TextConfig, InternVideo3TextModel, exist_ok=True)
AutoModel.register(InternVideo3Config, InternVideo3Model, exist_ok=True)
AutoModelForImageTextToText.register(
    InternVideo3Config, InternVideo3ForConditionalGeneration, exist_ok=True
)
AutoModelForCausalLM.register(InternVideo3TextConfig, InternVideo3ForCausalLM, exist_ok=True)
