"""Weights of a latent attention layer multiplied out for inference.

Everything between the normalised query, key and value of a token and its rotated row or absorbed
query is linear; multiplied out, a decoded token costs one product for its row and one per head for
its query. The products are made by running the layer's own steps on unit vectors.

Axes: E = 2 K D (a token's keys and values), W row width, H query heads, D head width, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from internvideo3.model.attention import LatentAttention


CAPTURING = "transformers.utils.output_capturing"


@dataclass(frozen=True)
class RowMap:
    """`[k; v] -> [c | k_rope before rotation]` for one modality."""

    weight_WE: Tensor
    bias_W: Tensor

    def __call__(self, kv_BTE: Tensor) -> Tensor:
        """Rows before rotation, [B, T, W]."""
        return functional.linear(kv_BTE, self.weight_WE, self.bias_W)


@dataclass(frozen=True)
class Folded:
    """The multiplied-out weights of one layer."""

    state: tuple[tuple[int, int], ...]
    """Identity and version of the parameters they were made of."""
    text: RowMap
    vision: RowMap
    query_HDW: Tensor
    """`q -> [absorbed content query | slot query before rotation]` of each head."""

    def rows(self, kv_BTE: Tensor, vision_BT: Tensor | None) -> Tensor:
        """Rows before rotation, [B, T, W]."""
        text = self.text(kv_BTE)
        if vision_BT is None or self.vision is self.text:
            return text
        return torch.where(vision_BT.to(text.device)[..., None], self.vision(kv_BTE), text)

    def queries(self, q_BTHD: Tensor) -> Tensor:
        """Absorbed queries before rotation, [B, H, T, W]."""
        B, T, H, D = q_BTHD.shape
        flat = q_BTHD.permute(2, 0, 1, 3).reshape(H, B * T, D) @ self.query_HDW
        return flat.view(H, B, T, -1).transpose(0, 1)


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer is its weight and bias and nothing else: no adapter, no hook."""
    return type(linear) is nn.Linear and not is_hooked(linear)


def is_hooked(module: nn.Module) -> bool:
    """Whether more happens in a module than its own forward, which a step does not call.

    Hooks of transformers, which stay once hidden states were asked for, change nothing. accelerate
    replaces `forward` to bring weights from elsewhere.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    own = [one for one in hooks if getattr(one, "__module__", "") != CAPTURING]
    return bool(own) or "_hf_hook" in vars(module)


def state_of(layer: LatentAttention) -> tuple[tuple[int, int], ...]:
    """Changes when a parameter is replaced or written to; not by way of its `.data`.

    Nor by a fused optimiser, nor where a parameter was made in inference mode: it has no version.
    """
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in layer.foldable())


@torch.no_grad()
def fold(layer: LatentAttention) -> Folded:
    """Multiplies a layer's weights out, in float32 at least."""
    kind = layer.k_up.dtype
    K, D = layer.num_kv_heads, layer.head_dim
    unit_ED = torch.eye(K * D, dtype=kind, device=layer.k_up.device)
    rope_EW = layer.rotary_key(unit_ED.view(1, K * D, K, D))[0]
    rope_WE = functional.pad(rope_EW.T, (0, K * D))

    def row_map(modality: int) -> RowMap:
        weight, bias = _latent(layer, modality)
        rope_bias = torch.zeros(len(rope_WE), dtype=kind, device=bias.device)
        return RowMap(torch.cat([weight.to(kind), rope_WE]), torch.cat([bias.to(kind), rope_bias]))

    text = row_map(0)
    vision = row_map(1) if layer.config.modality_adapters else text
    return Folded(state_of(layer), text, vision, _query_map(layer).to(kind))


def _latent(layer: LatentAttention, modality: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of the latent with a modality's adapter: `M_t A`, `M_t b + δ_t`."""
    wide = torch.promote_types(layer.k_up.dtype, torch.float32)
    weight, bias = layer.latent_proj.weight.to(wide), layer.latent_proj.bias.to(wide)
    if not layer.config.modality_adapters:
        return weight, bias
    adapter = layer.adapter_weight[modality].to(wide)
    return adapter @ weight, adapter @ bias + layer.adapter_bias[modality].to(wide)


def _query_map(layer: LatentAttention) -> Tensor:
    """[H, D, W], in float32 at least."""
    H, K, D = layer.num_heads, layer.num_kv_heads, layer.head_dim
    kind = layer.k_up.dtype
    wide = torch.promote_types(kind, torch.float32)
    unit_DHD = torch.eye(D, dtype=kind, device=layer.k_up.device)[:, None].expand(-1, H, -1)
    content_KGDD = layer.content_query(unit_DHD).transpose(0, 1).unflatten(0, (K, -1)).to(wide)
    absorbed = torch.einsum("kgde,ker->kgdr", content_KGDD, layer.k_up.to(wide)).flatten(0, 1)
    slots = layer.slot_query(unit_DHD[None])[0].transpose(0, 1).to(wide)
    return torch.cat([absorbed, slots], dim=-1)
