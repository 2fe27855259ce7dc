"""What memory a stage needs, before anything is bought or started.

Activations are followed through the model's own code (`follow.py`). Weights are counted: with their
gradients and two moments in float32, divided among the GPUs (FSDP2), what is gathered while it is
used, and the other models that a stage holds. Of the host's memory only the
patches of a row are counted, of which a process holds as many as it has rows in a step. What is
there for a while is not: videos as they are decoded, states as they are saved, and the whole
weights of the first process (`weights`, in float32) as it writes a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from internvideo3.model.config import InternVideo3Config
from internvideo3.model.conversion.options import PRESETS
from internvideo3.training.follow import Row, build, follow, text_moments, tower_moments
from internvideo3.training.recipe import RecipeError

GIB = 1 << 30
FLOAT_BYTES = 4
LEARNT_BYTES = 12
"""Beside a weight that learns: its gradient and AdamW's two moments in float32."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How many weights a model has, and where."""

    total: int
    tower: int
    root: int
    """Of no layer: embeddings, head, the tower's mergers. FSDP2 gathers them for a whole pass."""
    head: int
    layer: int
    """Of the largest layer."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes that one GPU needs at the worst moment."""

    weights: int
    """Number of weights of the whole model."""
    states: int
    """Weights, gradients and moments that stay on this GPU."""
    gathered: int
    """Weights and gradients of other GPUs that are here while they are used."""
    pixels: int
    """Patches of this process's part of the row."""
    tower: int
    """What the vision tower keeps for its backward pass."""
    activations: int
    """All else, at its peak: what the text model's backward pass needs, and temporaries."""
    others: Mapping[str, int] = field(default_factory=dict)
    """Other models, by name, as they stay on this GPU."""
    start: int
    """All models whole, as they are loaded before they are divided."""
    host_pixels: int
    """On the host: patches of a whole row, which every process that shares it has there."""

    @property
    def step(self) -> int:
        """All of a step."""
        held = self.states + self.gathered + sum(self.others.values())
        return held + self.pixels + self.tower + self.activations

    @property
    def total(self) -> int:
        """Of a step or of the start, whichever needs more."""
        return max(self.step, self.start)


def released_config() -> InternVideo3Config:
    """The 8B shape: Qwen3-VL-8B with the released latent row of 896 + 128 numbers.

    Sizes of Qwen/Qwen3-VL-8B-Instruct's config.json and of the released InternVideo3-8B-Instruct.
    """
    text = {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "rms_norm_eps": 1e-6, "attention_bias": False,
        "max_position_embeddings": 262144, "latent_rank": 896, "rope_slots": 64,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16,
        "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "out_hidden_size": 4096, "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    return InternVideo3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)


def latent_config(source: Any, preset: str) -> InternVideo3Config:
    """The shape that a conversion gives a GQA model; where it has a choice, with most rotary slots.

    Args:
        source: A Qwen3-VL configuration.
        preset: Of the conversion's options.

    Raises:
        RecipeError: There is no such preset.
    """
    if preset not in PRESETS:
        raise RecipeError(f"no preset {preset!r} of the conversion. Known: {', '.join(PRESETS)}.")
    options = PRESETS[preset](source.text_config)
    slots = options.slot_choices()[-1]
    text = source.text_config.to_dict()
    text.pop("model_type")
    rank = options.latent_rank(slots, text["num_hidden_layers"], text["head_dim"])
    text |= {
        "latent_rank": rank, "rope_slots": slots, "row_form": options.row_form,
        "qk_norm": options.norm,
    }  # fmt: skip
    told = source.to_dict() | {"model_type": "internvideo3", "text_config": text}
    made: InternVideo3Config = InternVideo3Config.from_dict(told)
    return made


def plan_step(
    config: Any, row: Row, gpus: int, *, frozen: Mapping[str, Any] = NOTHING, sampler: bool = False
) -> Plan:
    """Plan a pass over a row.

    Args:
        config: A Qwen3-VL or InternVideo3 configuration, of what learns.
        row: The row and how it is run.
        gpus: GPUs that share the states.
        frozen: Configurations of models that only read, by the name that the plan gives them.
        sampler: Whether the processes sample responses themselves: each of several with a copy of
            the model, which is in bf16 where products are, and then one has it as well.

    Raises:
        ValueError: The attention of the model cannot run on packed rows.
    """
    found = count_weights(config)
    learnt = found.total if row.train_vision else found.total - found.tower
    text, tower = follow(config, row, text_moments), follow(config, row, tower_moments)
    worst = max(
        tower.forward, tower.backward, tower.casting + text.forward, tower.kept + text.backward
    )
    read = {name: count_weights(one) for name, one in frozen.items()}
    others = {name: _frozen_bytes(one, gpus) for name, one in read.items()}
    whole = found.total + sum(one.total for one in read.values())
    if sampler and (gpus > 1 or row.bfloat16):
        others["sampler"] = (2 if row.bfloat16 else FLOAT_BYTES) * found.total
        whole += found.total
    # FSDP2 holds a layer in use and the next one, and what is in no layer for the whole pass; the
    # head's gradient is whole from the loss to the end, a layer's until it is divided.
    gathered = FLOAT_BYTES * (found.root + found.head + 3 * found.layer)
    vision = config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    token_pixels = FLOAT_BYTES * vision.spatial_merge_size**2 * patch
    return Plan(
        weights=found.total,
        states=(FLOAT_BYTES * found.total + LEARNT_BYTES * learnt) // gpus,
        gathered=0 if gpus == 1 else gathered,
        pixels=row.own * token_pixels,
        tower=tower.kept,
        activations=worst - tower.kept,
        others=others,
        start=FLOAT_BYTES * whole,
        host_pixels=row.tokens * token_pixels,
    )


def _frozen_bytes(found: Weights, gpus: int) -> int:
    """Of a divided model without a backward pass, what was gathered of the root stays."""
    if gpus == 1:
        return FLOAT_BYTES * found.total
    return FLOAT_BYTES * (found.total // gpus + found.root)


def count_weights(config: Any) -> Weights:
    """Weights of a model, by where FSDP2 has them."""
    with torch.device("meta"):
        model = build(config)
    visual = model.model.visual
    layers = [
        sum(p.numel() for p in layer.parameters())
        for layer in (*visual.blocks, *model.model.language_model.layers)
    ]
    total = sum(p.numel() for p in model.parameters())
    return Weights(
        total=total,
        tower=sum(p.numel() for p in visual.parameters()),
        root=total - sum(layers),
        head=model.lm_head.weight.numel(),
        layer=max(layers),
    )
