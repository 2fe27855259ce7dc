"""What a substitute of QK-norm costs alone: the source with nothing compressed.

Every key pair gets a rotary slot of its own and the latent is the values, so a row loses nothing
and what is left of a difference is the norm's. With the exact norm the layers compute what the
source computes, by way of cached rows.

Axes: H query heads, K key/value heads, D head width, F = D/2, S = K F slots, E = 2 K D.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from internvideo3.model.attention import RowAttention
from internvideo3.model.config import InternVideo3TextConfig
from internvideo3.model.conversion.lowrank import LowRank
from internvideo3.model.conversion.norms import LinearNorm
from internvideo3.model.conversion.plan import LayerPlan, build_layer
from internvideo3.model.conversion.rotary import RotarySlots

BOTH = ("q", "k")


def uncompressed(
    attention: Any, norm: LinearNorm | None, replaced: Sequence[str] = BOTH
) -> RowAttention:
    """A layer at full rank.

    Args:
        attention: the source's layer.
        norm: the substitute; None: the exact norm.
        replaced: whose norm is replaced, "q", "k" or both.
    """
    D, X = attention.head_dim, attention.o_proj.out_features
    H, K = (p.out_features // D for p in (attention.q_proj, attention.k_proj))
    config = InternVideo3TextConfig(
        hidden_size=X,
        num_hidden_layers=1,
        num_attention_heads=H,
        num_key_value_heads=K,
        head_dim=D,
        attention_bias=attention.q_proj.bias is not None,
        qk_norm="exact" if hasattr(attention, "q_norm") else "linear",
        latent_rank=K * D,
        rope_slots=K * D // 2,
        rope_slot_frequencies=[[*range(D // 2)] * K],
    )
    built = build_layer(_lossless(H, K, D), config, 0, attention)
    built.o_proj = attention.o_proj  # no copy: there is no bias to add
    if norm is not None:
        for name in replaced:
            setattr(built, f"{name}_proj", _linear(norm, name, attention))
            setattr(built, f"{name}_norm", nn.Identity())
    return built


def _lossless(H: int, K: int, D: int) -> LayerPlan:
    """All pairs in slots, all values in the latent."""
    own_SK = torch.eye(K, dtype=torch.complex128).repeat_interleave(D // 2, dim=0)
    slots = RotarySlots([*range(D // 2)] * K, own_SK, own_SK, 1.0)
    values_RE = torch.eye(2 * K * D, dtype=torch.float64)[K * D :]
    everything = torch.eye(2 * K * D, dtype=torch.float64)
    low = LowRank(values_RE, values_RE.T, 1.0, torch.ones(K * D), everything, everything)
    gain_HF = torch.ones(H, D // 2, dtype=torch.complex128)
    return LayerPlan(torch.zeros(2 * K * D, dtype=torch.float64), gain_HF, slots, low, [], None)


def _linear(norm: LinearNorm, name: str, attention: Any) -> nn.Linear:
    """The projection with the norm's substitute folded in."""
    weight: Tensor = getattr(norm, f"{name}_weight")
    like = attention.q_proj.weight
    with torch.device(like.device):
        made = nn.Linear(weight.shape[1], weight.shape[0]).to(like.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(getattr(norm, f"{name}_bias"))
    return made.requires_grad_(False)
