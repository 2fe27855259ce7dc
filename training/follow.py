"""What a pass allocates, followed through the model's own code.

Passes run on fake tensors (shapes without storage) and an accountant of torch follows every
allocation, so the 8B model at 256K tokens is planned on a laptop in a minute. The text model and
the vision tower are followed one after the other, as they run: while the text model works, the
tower only keeps what its backward pass needs. Of a deep model two shallow ones are followed, and of
the loss its first chunks: every layer adds the same, and every chunk needs the same (tests compare
with following all layers and all chunks). What was followed is remembered. A row is followed at its
fullest: every token is a vision token, and every token is learnt.

Letters: T tokens of a row, t those of one process, W text width, V their vision tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import Qwen3VLForConditionalGeneration

from internvideo3.model.config import InternVideo3Config
from internvideo3.model.modeling import InternVideo3ForConditionalGeneration
from internvideo3.training.attention import PackedAttention, Segment, Sharing
from internvideo3.training.objectives.linear_cross_entropy import _ChunkedCrossEntropy, chunk_tokens
from internvideo3.training.policy import Policy

FOLLOWED = 2
"""Layers of the first shallow text model that is followed for a deep one; a second has one more."""
CHUNKS = 3
"""Chunks of the loss that are followed; in the second one, temporaries of two chunks meet."""
FRAMES = 8
"""Frames that the followed tower sees: a fused kernel's memory does not depend on their number."""


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


def build(config: Any) -> Any:
    """The model of a configuration, GQA or M²LA."""
    if isinstance(config, InternVideo3Config):
        return InternVideo3ForConditionalGeneration(config)
    return Qwen3VLForConditionalGeneration(config)


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


Follower = Callable[[Any, Row], Moments]
"""`text_moments` or `tower_moments`."""
_FOLLOWED: dict[tuple[str, Row, Follower], Moments] = {}
"""Configuration as JSON, row and follower → what was found: stages of a recipe are often alike."""


def follow(config: Any, row: Row, moments: Follower) -> Moments:
    """Moments of a text model or a tower, from two shallow ones where it is deep.

    What was followed before is remembered; a tower does not know who else has parts of the row.

    Args:
        config: Of the model.
        row: The row.
        moments: `text_moments` or `tower_moments`.
    """
    if moments is tower_moments:
        row = replace(row, tokens=row.own, parts=1)
    key = (config.to_json_string(use_diff=False), row, moments)
    if key not in _FOLLOWED:
        _FOLLOWED[key] = _from_shallow(config, row, moments)
    return _FOLLOWED[key]


def _from_shallow(config: Any, row: Row, moments: Follower) -> Moments:
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
    head_VW = model.lm_head.weight
    given = (hidden_TW, head_VW, zeros_T, weight_T, chunk_tokens(len(head_VW)))
    loss: Tensor = _FirstChunks.apply(*given)
    return loss


class _FirstChunks(_ChunkedCrossEntropy):
    """The loss of a row, of which a few chunks are run: each further one needs the same memory."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NW: Tensor, head_VW: Tensor, labels_N: Tensor, weight_N: Tensor, chunk: int
    ) -> Tensor:
        run = slice(0, CHUNKS * chunk)
        # The gradient of the chunks that are not run, there while the others are.
        rest_NW = torch.empty_like(hidden_NW[run.stop :])
        given = (hidden_NW[run], head_VW, labels_N[run], weight_N[run], chunk)
        total: Tensor = _ChunkedCrossEntropy.forward(ctx, *given)
        _, grad_VW = ctx.to_save
        del rest_NW
        ctx.save_for_backward(torch.empty_like(hidden_NW), grad_VW)
        return total


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
