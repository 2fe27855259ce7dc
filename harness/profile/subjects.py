"""The models that a profile measures: checkpoints, or random weights in an exact shape."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from internvideo3.harness.profile.shapes import check_shape
from internvideo3.harness.profile.workload import WorkloadError
from internvideo3.model.checkpoint import (
    cache_bytes_per_token,
    load_model,
    read_config,
    resolve_checkpoint,
)
from internvideo3.model.config import InternVideo3Config
from internvideo3.model.modeling import InternVideo3ForConditionalGeneration

TEXT_8B: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 2**22,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
"""Qwen3-VL-8B-Instruct's text model (its config.json)."""
VISION_8B: Mapping[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 4096,
    "deepstack_visual_indexes": [8, 16, 24],
}
TINY: Mapping[str, Any] = dict(TEXT_8B) | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION_TINY: Mapping[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}
RANDOM: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any] | None]] = {
    "random:8b-gqa": (TEXT_8B, VISION_8B, None),
    "random:8b-m2la": (TEXT_8B, VISION_8B, {"latent_rank": 896, "rope_slots": 64}),
    "random:8b-m2la-576": (TEXT_8B, VISION_8B, {"latent_rank": 512, "rope_slots": 32}),
    "random:tiny-gqa": (TINY, VISION_TINY, None),
    "random:tiny-m2la": (TINY, VISION_TINY, {"latent_rank": 448, "rope_slots": 32}),
}
"""Text shape, vision shape, and the latent row of M²LA (1024 and 576 numbers of 2048)."""
STD = 0.02
FACTORS = ("rope_write", "rope_read", "nope_gain")


@dataclass(frozen=True)
class Subject:
    """A model ready to be measured."""

    name: str
    model: Any
    processor: Any | None
    """None for random weights: there is no tokenizer."""
    attention: str
    """"gqa" or "m2la"."""

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes of a token, all layers together."""
        return cache_bytes_per_token(self.model.config, self.model.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, the vision tower's included."""
        return sum(p.nbytes for p in self.model.parameters())


def config_of(name: str) -> Any:
    """The configuration of a model by name.

    Raises:
        WorkloadError: no random shape of this name.
        CheckpointError: no checkpoint of this name, or of an architecture that is not known.
    """
    if name.startswith("random:"):
        if name not in RANDOM:
            raise WorkloadError(f"no shape {name!r}; known are {', '.join(RANDOM)}.")
        text, vision, latent = RANDOM[name]
        kind: Any = Qwen3VLConfig if latent is None else InternVideo3Config
        return kind(text_config=dict(text) | dict(latent or {}), vision_config=dict(vision))
    path = resolve_checkpoint(name)
    check_shape(path)
    read_config(path)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path, local_files_only=True)


def label_of(name: str) -> str | None:
    """What a model's results are not those of a trained one of full size for."""
    return {"scale": "scale", "random": "random weights"}.get(name.partition(":")[0])


def attention_of(config: Any) -> str:
    """The attention of a configuration: "gqa" or "m2la"."""
    return "m2la" if isinstance(config, InternVideo3Config) else "gqa"


def form_of(config: Any) -> str:
    """The form of what a configuration caches: "gqa", or that of its M²LA rows."""
    return "gqa" if attention_of(config) == "gqa" else str(config.text_config.row_form)


@functools.cache
def parameters_of(name: str) -> int:
    """How many parameters a model by name has, all of them counted once; nothing is loaded."""
    config = config_of(name)
    with torch.device("meta"):
        model = class_of(config)(config)
    counts = {id(p): p.numel() for p in model.parameters()}
    return sum(counts.values())


def class_of(config: Any) -> Any:
    """The model class of a configuration."""
    latent = isinstance(config, InternVideo3Config)
    return InternVideo3ForConditionalGeneration if latent else Qwen3VLForConditionalGeneration


def load(name: str, device: torch.device, dtype: str) -> Subject:
    """Load or make a model.

    Raises:
        WorkloadError: no random shape of this name.
        CheckpointError: the checkpoint cannot be used.
    """
    config = config_of(name)
    attention = attention_of(config)
    if not name.startswith("random:"):
        return Subject(name, *load_model(name, device, dtype), attention)
    kind = getattr(torch, dtype)
    with torch.device(device):
        model = class_of(config)._from_config(config, dtype=kind).eval()
    return Subject(name, randomised(model), None, attention)


@torch.no_grad()
def randomised(model: Any) -> Any:
    """The model with weights drawn anew: not zeros, which make a GPU faster than it is.

    Factors of a head's coordinates are around one: M²LA's rotary part would otherwise weigh next to
    nothing, and a wrong position would not be seen by the gate.
    """
    drawn = torch.Generator(model.device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name.rpartition(".")[2] not in FACTORS:
            parameter.normal_(std=STD, generator=drawn)
        else:
            parameter.uniform_(0.5, 1.5, generator=drawn)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    return model.requires_grad_(False)
