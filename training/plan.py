"""What memory a stage needs, before anything is bought or started.

The activations are not estimated by formula: passes of the model's own code run on fake tensors
(shapes without storage) and an accountant of torch follows every allocation, so the 8B model at
256K tokens is planned on a laptop in a minute. The text model and the vision tower are followed
one after the other, as they run: while the text model works, the tower only keeps what its backward
pass needs. Of a deep model two shallow ones are followed: every layer adds the same (a test
compares with following all layers). A row is planned at its fullest: every token is a vision token,
and every token is learnt.

Weights are counted: with their gradients and two moments in float32, divided among the GPUs
(FSDP2), what is gathered while it is used, and the other models that a stage holds.

Letters: T tokens of a row, t those of one process, W text width, V their vision tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import Qwen3VLForConditionalGeneration

from internvideo3.model.config import InternVideo3Config
from internvideo3.model.conversion.options import PRESETS
from internvideo3.model.modeling import InternVideo3ForConditionalGeneration
from internvideo3.training.attention import PackedAttention, Segment, Sharing
from internvideo3.training.objectives.linear_cross_entropy import told_cross_entropy
from internvideo3.training.policy import Policy
from internvideo3.training.recipe import RecipeError

GIB = 1 << 30
FLOAT_BYTES = 4
FOLLOWED = 2
"""Layers of the first shallow text model that is followed for a deep one; a second has one more."""
FRAMES = 8
"""Frames that the followed tower sees: a fused kernel's memory does not depend on their number."""
LEARNT_BYTES = 12
"""Beside a weight that learns: its gradient and AdamW's two moments in float32."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row in training."""

    tokens: int
    """Of the whole row."""
    parts: int = 1
    """Processes that share it."""
    recompute: bool
    """Whether layers recompute their activations."""
    bfloat16: bool
    """Whether products run in bf16."""
    train_vision: bool
    """Whether the vision tower learns."""

    @property
    def own(self) -> int:
        """Tokens of one process."""
        return self.tokens // self.parts


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
    """Patches of the row, which no process has a part of only."""
    tower: int
    """What the vision tower keeps for its backward pass."""
    activations: int
    """All else, at its peak: what the text model's backward pass needs, and temporaries."""
    others: Mapping[str, int] = field(default_factory=dict)
    """Other models, by name, as they stay on this GPU."""
    start: int
    """All models whole, as they are loaded before they are divided."""

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
        sampler: Whether a copy of the model samples responses on each of several GPUs.

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
    if sampler and gpus > 1:
        others["sampler"] = FLOAT_BYTES * found.total
        whole += found.total
    # FSDP2 holds a layer in use and the next one, and what is in no layer for the whole pass; the
    # head's gradient is whole from the loss to the end, a layer's until it is divided.
    gathered = FLOAT_BYTES * (found.root + found.head + 3 * found.layer)
    vision = config.vision_config
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return Plan(
        weights=found.total,
        states=(FLOAT_BYTES * found.total + LEARNT_BYTES * learnt) // gpus,
        gathered=0 if gpus == 1 else gathered,
        pixels=FLOAT_BYTES * row.tokens * vision.spatial_merge_size**2 * patch,
        tower=tower.kept,
        activations=worst - tower.kept,
        others=others,
        start=FLOAT_BYTES * whole,
    )


def _frozen_bytes(found: Weights, gpus: int) -> int:
    """Of a divided model without a backward pass, what was gathered of the root stays."""
    if gpus == 1:
        return FLOAT_BYTES * found.total
    return FLOAT_BYTES * (found.total // gpus + found.root)


def build(config: Any) -> Any:
    """The model of a configuration, GQA or M²LA."""
    if isinstance(config, InternVideo3Config):
        return InternVideo3ForConditionalGeneration(config)
    return Qwen3VLForConditionalGeneration(config)


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


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Bytes of a model in a pass, beside weights and gradients: at each moment most layers count.

    They are kept apart, since the worst moment of a shallow model need not be that of a deep one.
    """

    forward: int
    """Most in the forward pass; autocast keeps the weights that it has cast until its end."""
    backward: int
    """Most in the backward pass."""
    casting: int
    """What is left of the forward pass before autocast ends, without the outputs."""
    kept: int
    """What is left after it: what the backward pass needs."""

    def deeper(self, more: Moments, layers: int) -> Moments:
        """With so many more layers, from what one more adds."""
        mine, theirs = vars(self), vars(more)
        return Moments(**{key: mine[key] + (theirs[key] - mine[key]) * layers for key in mine})


class Alone(Sharing):
    """One of several processes by itself: it gets as much as it would get from the others."""

    def gathered(self, part: Tensor, dim: int) -> Tensor:
        """As many copies of the part as there are processes."""
        return torch.cat([part] * self.count, dim)

    def _exchanged(self, sent: Tensor) -> Tensor:
        return sent.clone()


def follow(config: Any, row: Row, moments: Callable[[Any, Row], Moments]) -> Moments:
    """Moments of a text model or a tower, from two shallow ones where it is deep.

    Args:
        config: Of the model.
        row: The row.
        moments: `text_moments` or `tower_moments`.
    """
    cut: Callable[[Any, int], Any] = shallow
    depth, few = config.text_config.num_hidden_layers, FOLLOWED
    if moments is tower_moments:
        # Every level of DeepStack has a merger, whose activations are kept too.
        levels = len(config.vision_config.deepstack_visual_indexes)
        cut, depth, few = shallow_tower, config.vision_config.depth, levels + 1
    if depth <= few + 1:
        return moments(config, row)
    first, second = (moments(cut(config, n), row) for n in (few, few + 1))
    return first.deeper(second, depth - few)


def shallow(config: Any, layers: int) -> Any:
    """The same model with fewer text layers, of the same widths."""
    told = config.to_dict()
    text = told["text_config"]
    text["num_hidden_layers"] = layers
    for name, value in text.items():
        if isinstance(value, list) and len(value) == config.text_config.num_hidden_layers:
            text[name] = value[:layers]
    return type(config).from_dict(told)


def shallow_tower(config: Any, blocks: int) -> Any:
    """The same model with fewer blocks of the vision tower, and all levels of DeepStack."""
    told = shallow(config, 1).to_dict()
    levels = len(config.vision_config.deepstack_visual_indexes)
    told["vision_config"] |= {"depth": blocks, "deepstack_visual_indexes": list(range(levels))}
    return type(config).from_dict(told)


def _learning(config: Any, row: Row) -> Policy:
    """A policy whose gradients are there, so that the worst moment is that of the activations."""
    model = build(config).train()
    policy = Policy(model, train_vision=row.train_vision, recompute=row.recompute)
    # The tracker cannot follow frozen weights; without gradients a tower learns nothing either way.
    for parameter in policy.requires_grad_(True).parameters():
        parameter.grad = torch.empty_like(parameter)
    return policy


def _bytes(tracker: Any, moment: str) -> int:
    (found,) = tracker.get_tracker_snapshot(moment).values()
    return int(found["Total"])


def text_moments(config: Any, row: Row) -> Moments:
    """A pass of a text model on no storage."""
    with FakeTensorMode():
        policy = _learning(config, row)
        tracker: Any = MemTracker()
        tracker.track_external(policy)
        with tracker:
            with torch.autocast(policy.device.type, torch.bfloat16, enabled=row.bfloat16):
                loss = text_loss(policy, row)
                forward, casting = _bytes(tracker, "peak"), _bytes(tracker, "current")
            kept = _bytes(tracker, "current")
            _forget_peak(tracker)
            loss.backward()
        return _beside(_held(policy), forward, _bytes(tracker, "peak"), casting, kept)


def _forget_peak(tracker: Any) -> None:
    """The next peak is that of what follows; the tracker has no word for it."""
    tracker._peak_mem.clear()


def _held(policy: Policy) -> int:
    """Weights and gradients, which the plan counts by themselves."""
    return 2 * sum(p.nbytes for p in policy.parameters())


def _beside(held: int, forward: int, backward: int, casting: int, kept: int) -> Moments:
    return Moments(
        forward=forward - held, backward=backward - held, casting=casting - held, kept=kept - held
    )


def text_loss(policy: Policy, row: Row) -> Tensor:
    """The text model and the chunked loss as `Policy.forward` has them, with every token learnt.

    What the tower hands over is made here, and goes when it goes there.
    """
    model, device = policy.model, policy.device
    width = model.config.text_config.hidden_size
    levels = 1 + len(model.config.vision_config.deepstack_visual_indexes)
    dtype = torch.bfloat16 if row.bfloat16 else torch.float32
    grain = torch.zeros((), dtype=dtype, device=device, requires_grad=row.train_vision)
    seen = [grain.expand(row.own, width).clone() for _ in range(levels)]
    text = model.model.language_model
    embeds_1tW = text.embed_tokens(torch.zeros(1, row.own, dtype=torch.long, device=device))
    tokens_VW = seen[0].to(embeds_1tW.dtype)
    visual_1t1 = torch.ones(1, row.own, 1, dtype=torch.bool, device=device)
    sharing = None if row.parts == 1 else Alone(None, 0, row.parts)  # type: ignore[arg-type]
    zeros_T = torch.zeros(row.own * row.parts, dtype=torch.long, device=device)
    packed = PackedAttention(zeros_T, zeros_T, sharing=sharing)
    # One document; fake tensors have no values to find it by.
    object.__setattr__(packed, "segments", (Segment(0, len(zeros_T), (0, 0)),))
    hidden_1tW = text(
        inputs_embeds=embeds_1tW.masked_scatter(visual_1t1, tokens_VW),
        position_ids=torch.arange(row.own, device=device).expand(3, 1, -1),
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        use_cache=False,
        packed=packed,
    ).last_hidden_state
    hidden_TW = hidden_1tW[0] if sharing is None else sharing.gathered(hidden_1tW[0], 0)
    weight_T = torch.ones(len(zeros_T), device=device)
    return told_cross_entropy(hidden_TW, model.lm_head.weight, zeros_T, weight_T)


def tower_moments(config: Any, row: Row) -> Moments:
    """The vision tower by itself on no storage: forward, and backward if it learns."""
    patches = row.own * config.vision_config.spatial_merge_size**2
    with FakeTensorMode():
        policy = _learning(config, row)
        visual = policy.model.model.visual
        pixels = torch.empty(patches, visual.patch_embed.proj.weight[0].numel())
        tracker: Any = MemTracker()
        tracker.track_external(policy, pixels)
        with tracker:
            with torch.autocast(policy.device.type, torch.bfloat16, enabled=row.bfloat16):
                seen = tower_outputs(visual, pixels, row)
                outputs = sum(one.nbytes for one in seen)
                forward, casting = _bytes(tracker, "peak"), _bytes(tracker, "current") - outputs
            kept = _bytes(tracker, "current") - outputs
            _forget_peak(tracker)
            gradients = [torch.empty_like(one) for one in seen]
            if row.train_vision:
                torch.autograd.backward(seen, gradients)
        held = _held(policy) + pixels.nbytes
        return _beside(held, forward, _bytes(tracker, "peak"), casting, kept)


def tower_outputs(visual: Any, pixels: Tensor, row: Row) -> list[Tensor]:
    """What the tower makes of a row. What it derives from the values of grids is given to it."""
    patches = len(pixels)
    derived = {
        "interp_indices": torch.zeros(patches, 4, dtype=torch.long),
        "interp_weights": torch.empty(patches, 4),
        "position_ids": torch.zeros(patches, 2, dtype=torch.long),
        # Not a tensor: the attention reads these numbers.
        "cu_seqlens": np.linspace(0, patches, FRAMES + 1).astype(np.int64),
    }
    grids = torch.empty(1, 3, dtype=torch.long)
    with torch.set_grad_enabled(row.train_vision):
        out = visual(pixels, grid_thw=grids, return_dict=True, **derived)
    return [out.pooler_output, *out.deepstack_features]
