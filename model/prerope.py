"""A latent of keys before rotation: the highest fidelity per cached number, but not absorbable.

    c = A [k; v] + b,     [k; v] ≈ B c + d,     k is rotated after reconstruction.

Nothing of a key is cut off from its rotation, so no rotary slots are stored. In return keys of all
cached tokens are rebuilt at every step: r · 2 K D multiplications per cached token and layer, where
the absorbed form needs H (2 r + 2 S) per query. Right where prefill dominates.

A rotation needs a token's position: the first layer's rows carry its cosines and sines for all
layers, D numbers per token in all.

Axes: B batch, b batch of a segment, T new tokens, N cached tokens, X model width, H query heads,
K key/value heads, D head width, R rank, E = 2 K D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from internvideo3.model.attention import RowAttention, adapted, head_norm, nest, rotate
from internvideo3.model.cache import LatentCache, Part
from internvideo3.model.config import InternVideo3TextConfig
from internvideo3.model.segments import attend, attend_blocks, goes_by_blocks


class PreropeAttention(RowAttention):
    """Attention whose cached rows are latents of unrotated keys and values."""

    def __init__(self, config: InternVideo3TextConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        X, H, K, D = config.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        R, bias = self.rank, config.attention_bias
        self.q_proj = nn.Linear(X, H * D, bias=bias)
        self.k_proj = nn.Linear(X, K * D, bias=bias)
        self.v_proj = nn.Linear(X, K * D, bias=bias)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        self.latent_proj = nn.Linear(2 * K * D, R, bias=True)
        self.k_up = nn.Parameter(torch.empty(K, D, R))
        self.v_up = nn.Parameter(torch.empty(K, D, R))
        self.k_bias = nn.Parameter(torch.empty(K, D))
        self.o_proj = nn.Linear(H * D, X, bias=True)
        if config.modality_adapters:
            self.adapter_weight = nn.Parameter(torch.empty(2, R, R))
            self.adapter_bias = nn.Parameter(torch.empty(2, R))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: LatentCache | None = None,
        modality_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As `RowAttention.forward`; always reconstructs."""
        B, T, _ = hidden_states.shape
        cos_BTF, sin_BTF = (x[..., : self.head_dim // 2] for x in position_embeddings)
        row_B1TW = self.project(hidden_states, modality_mask)[:, None]
        turn_B1TD = torch.cat([cos_BTF, sin_BTF], dim=-1)[:, None]
        parts = self._parts(row_B1TW, turn_B1TD, attention_mask, past_key_values)
        q_BHTD, _ = self.queries(hidden_states, cos_BTF, sin_BTF)
        q_BKGTD = q_BHTD.unflatten(1, (self.num_kv_heads, -1))
        if goes_by_blocks(parts, T):
            heads_BKGTD = attend_blocks(q_BKGTD, parts, self.scale, self._pair)
        else:
            rebuilt = [Part(self._pair(p), p.mask_BxTN, p.causal) for p in parts]
            heads_BKGTD = attend(q_BKGTD, rebuilt, self.scale)
        heads_BHTD = heads_BKGTD.flatten(1, 2)
        return self.o_proj(heads_BHTD.transpose(1, 2).reshape(B, T, -1)), None

    def _pair(self, part: Part) -> tuple[Tensor, Tensor]:
        return self.rotated(*part.tensors)

    def _parts(
        self, row: Tensor, turn: Tensor, mask: Tensor | None, past: LatentCache | None
    ) -> list[Part]:
        """Segments to attend to, each with rows and turns."""
        if past is None:
            return [Part((row, turn), mask, mask is None and row.shape[2] > 1)]
        if self.layer_idx == 0:
            return past.extend(0, (row, turn), mask)
        parts = past.extend(self.layer_idx, (row,), mask)
        # Every layer caches the same tokens in the same segments.
        first = past.segmented(0).parts(row.shape[2], mask, past.placement)
        return [
            Part((own.tensors[0], other.tensors[1]), own.mask_BxTN, own.causal)
            for own, other in zip(parts, first, strict=True)
        ]

    def project(self, x_BTX: Tensor, vision_BT: Tensor | None) -> Tensor:
        """The cached latents of new tokens, [B, T, r]; positions do not enter."""
        B, T, _ = x_BTX.shape
        k_BTKD = self.k_norm(self.k_proj(x_BTX).view(B, T, self.num_kv_heads, self.head_dim))
        c_BTR = self.latent_proj(torch.cat([k_BTKD.flatten(2), self.v_proj(x_BTX)], dim=-1))
        if self.config.modality_adapters:
            c_BTR = adapted(c_BTR, self.adapter_weight, self.adapter_bias, vision_BT)
        return nest(c_BTR, self.vision_rank, vision_BT)

    def queries(self, x_BTX: Tensor, cos_BTS: Tensor, sin_BTS: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries [B, H, T, D], and no slot queries [B, H, T, 0]."""
        q_BTHD = self.q_norm(self.q_proj(x_BTX).unflatten(-1, (self.num_heads, -1)))
        q_BHTD = rotate(q_BTHD.transpose(1, 2), cos_BTS[:, None], sin_BTS[:, None])
        return q_BHTD, q_BHTD[..., :0]

    def rotated(self, row_b1NR: Tensor, turn_b1ND: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of cached tokens, both [b, K, N, D]."""
        K, D = self.num_kv_heads, self.head_dim
        rank = row_b1NR.shape[-1]  # of vision tokens it may be smaller
        up = torch.cat([self.k_up.flatten(0, 1), self.v_up.flatten(0, 1)])[:, :rank]
        k_bNKD, v_bNKD = (
            x.unflatten(-1, (K, D)) for x in functional.linear(row_b1NR[:, 0], up).chunk(2, dim=-1)
        )
        cos_bNF, sin_bNF = turn_b1ND.chunk(2, dim=-1)
        k_bKND = rotate((k_bNKD + self.k_bias).transpose(1, 2), cos_bNF, sin_bNF)
        return k_bKND, v_bNKD.transpose(1, 2)
