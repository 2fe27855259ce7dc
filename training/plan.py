"""What memory a stage needs, before anything is bought or started.

The activations are not estimated by formula: passes of the model's own code run on fake tensors
(shapes without storage) and an accountant of torch follows every allocation, so the 8B model at
256K tokens is planned on a laptop in seconds. Of a deep model two shallow ones are followed: every
layer adds the same (a test compares with following all layers). States are counted: weights,
gradients and two moments in float32, divided among the GPUs (FSDP2), and the layer that is gathered
at a time.

Letters: T tokens of a pass, W text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from internvideo3.model.config import InternVideo3Config
from internvideo3.model.modeling import InternVideo3ForConditionalGeneration
from internvideo3.training.attention import PackedAttention, Segment
from internvideo3.training.objectives.linear_cross_entropy import told_cross_entropy

GIB = 1 << 30
FOLLOWED = (2, 3)
"""Layers of the two shallow models that are followed for a deep one."""
STATE_BYTES = 16
"""Of one weight: itself, its gradient and AdamW's two moments in float32."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes that one GPU needs at the worst moment of a step."""

    tokens: int
    weights: int
    """Number of weights of the whole model."""
    states: int
    """Weights, gradients and moments that stay on this GPU."""
    gathered: int
    """Weights of other GPUs that are here while they are used."""
    activations: int
    """All else, at its peak: what the backward pass needs, and temporaries."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.gathered + self.activations


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


def plan_step(config: Any, tokens: int, gpus: int, *, recompute: bool, bfloat16: bool) -> Plan:
    """Plan a pass of the text model over one document of so many tokens.

    Not in it: the vision tower's activations (frames pass through it in turns).

    Args:
        config: An InternVideo3 configuration.
        tokens: Tokens of the pass.
        gpus: GPUs that share the states.
        recompute: Whether layers recompute their activations.
        bfloat16: Whether products run in bf16.
    """
    activations = activation_bytes(config, tokens, recompute=recompute, bfloat16=bfloat16)
    with torch.device("meta"):
        model = InternVideo3ForConditionalGeneration(config)
    weights = sum(p.numel() for p in model.parameters())
    largest = sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    ends = model.model.language_model.embed_tokens.weight.numel()
    ends += 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    # FSDP2 holds a layer in use and the next one, and embeddings and head for the whole pass.
    gathered = 0 if gpus == 1 else 4 * (2 * largest + ends)
    return Plan(
        tokens=tokens,
        weights=weights,
        states=STATE_BYTES * weights // gpus,
        gathered=gathered,
        activations=activations,
    )


def activation_bytes(config: Any, tokens: int, *, recompute: bool, bfloat16: bool) -> int:
    """Most bytes of activations at once, from two shallow models where the model is deep."""
    depth = config.text_config.num_hidden_layers
    if depth <= FOLLOWED[1]:
        return fake_peak(config, tokens, recompute=recompute, bfloat16=bfloat16)
    few, more = (
        fake_peak(shallow(config, n), tokens, recompute=recompute, bfloat16=bfloat16)
        for n in FOLLOWED
    )
    layers_between = FOLLOWED[1] - FOLLOWED[0]
    return int(few + (more - few) * (depth - FOLLOWED[0]) // layers_between)


def shallow(config: Any, layers: int) -> Any:
    """The same model with fewer layers, of the same widths."""
    told = config.to_dict()
    text = told["text_config"]
    text["num_hidden_layers"] = layers
    for name, value in text.items():
        if isinstance(value, list) and len(value) == config.text_config.num_hidden_layers:
            text[name] = value[:layers]
    return type(config).from_dict(told)


def run_pass(model: Any, embeds_1TW: Tensor, bfloat16: bool) -> None:
    """Forward and backward of the text model and the chunked loss; every token supervised."""
    tokens = embeds_1TW.shape[1]
    text, device = model.model.language_model, embeds_1TW.device
    zeros_T = torch.zeros(tokens, dtype=torch.long)
    packed = PackedAttention(zeros_T, zeros_T)
    # One document; fake tensors have no values to find it by.
    object.__setattr__(packed, "segments", (Segment(0, tokens, (0, 0)),))
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        hidden_1TW = text(
            inputs_embeds=embeds_1TW,
            position_ids=torch.arange(tokens, device=device).expand(3, 1, -1),
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            use_cache=False,
            packed=packed,
        ).last_hidden_state
        labels_T = torch.zeros(tokens, dtype=torch.long, device=device)
        weight_T = torch.ones(tokens, device=device)
        loss = told_cross_entropy(hidden_1TW[0], model.lm_head.weight, labels_T, weight_T)
    loss.backward()


def fake_peak(config: Any, tokens: int, *, recompute: bool, bfloat16: bool) -> int:
    """Most bytes at once, beside weights and gradients, in a pass of a model without storage."""
    with FakeTensorMode():
        model = InternVideo3ForConditionalGeneration(config).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            # There from the start, so that the worst moment is that of the activations.
            parameter.grad = torch.empty_like(parameter)
        width = config.text_config.hidden_size
        embeds_1TW = torch.empty(1, tokens, width, requires_grad=True)
        tracker: Any = MemTracker()
        tracker.track_external(model)
        with tracker:
            run_pass(model, embeds_1TW, bfloat16)
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    return int(peak["Total"]) - 2 * int(held)
