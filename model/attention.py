"""M²LA's latent attention in its two forms.

One attention, two forms with the same numbers (paper section 3.2.1, notation of DeepSeek's MLA):

- reconstruct: up-project keys and values of every head from the latent, then attend (prefill,
  training);
- absorbed: fold the up-projections into query and output, then attend over the cached rows
  themselves (decode).

With x the layer input, h a KV head, f a rotary frequency and s a rotary slot of frequency f(s):

    k, v        = norm(W_k x), W_v x                    exact QK-norm, before anything is compressed
    c           = A [k; v] + b                          latent, rank r
    k'_s        = e^{i θ_f(s) m} Σ_h w_{s,h} k_{h,f(s)}   shared rotary key, complex
    row         = [c | Re k' | Im k']                   what is cached
    score_a     = scale · ( (ḡ_a q_a) · B^k_h c + Re Σ_s conj(e^{iθm} p̄_{a,s} q_{a,f(s)}) k'_s )
    out         = W_o [ B^v_h Σ_j attention_j c_j ]_a + b_o

where ḡ is the conjugate positional gain of the part of the key that is not rotated, and p̄ reads a
slot for query head a. A complex number is a pair of channels (f, f + D/2), transformers'
`rotate_half` convention.

Axes: B batch, b batch of a segment (B or 1), T new tokens, N cached tokens, H query heads,
K key/value heads, G query heads per key/value head, D head width, F = D/2, R rank, S slots,
W width of a key, V width of a value, X model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from internvideo3.model.cache import LatentCache, Part
from internvideo3.model.config import InternVideo3TextConfig
from internvideo3.model.folding import Folded, fold, is_plain, state_of
from internvideo3.model.segments import attend, attend_blocks, goes_by_blocks


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiplies complex numbers `[Re | Im]` (last axis 2 S) by cos + i sin (last axis S)."""
    re, im = x.chunk(2, dim=-1)
    return torch.cat([re * cos - im * sin, re * sin + im * cos], dim=-1)


class RowAttention(nn.Module, ABC):
    """Attention over cached rows `[c | k_rope]`; how rows and queries are made is a subclass's."""

    k_up: Tensor
    """Up-projection of keys, [K, D, R]."""
    v_up: Tensor
    """Up-projection of values, [K, D, R]."""
    o_proj: nn.Linear

    def __init__(self, config: InternVideo3TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.rank = config.rank(layer_idx)
        self.vision_rank = config.rank_of_vision(layer_idx)
        self.slot_frequencies = config.slot_frequencies(layer_idx)
        self.scale = self.head_dim**-0.5
        self._slots: Tensor | None = None

    @abstractmethod
    def project(self, x_BTX: Tensor, vision_BT: Tensor | None) -> Tensor:
        """Rows `[c | k_rope before rotation]` of new tokens, [B, T, r + 2 S]."""

    def write(
        self, x_BTX: Tensor, cos_BTS: Tensor, sin_BTS: Tensor, vision_BT: Tensor | None
    ) -> Tensor:
        """The cached rows `[c | k_rope]` of new tokens, [B, T, r + 2 S]."""
        row_BTW = self.project(x_BTX, vision_BT)
        c_BTR, rope_BTS = row_BTW[..., : self.rank], row_BTW[..., self.rank :]
        return torch.cat([c_BTR, rotate(rope_BTS, cos_BTS, sin_BTS)], dim=-1)

    @abstractmethod
    def queries(self, x_BTX: Tensor, cos_BTS: Tensor, sin_BTS: Tensor) -> tuple[Tensor, Tensor]:
        """Content query [B, H, T, D] and rotated slot query [B, H, T, 2 S]."""

    def absorbed_queries(self, x_BTX: Tensor, cos_BTS: Tensor, sin_BTS: Tensor) -> Tensor:
        """Queries against cached rows, `[q~ | rotated slot query]`, [B, H, T, r + 2 S]."""
        q_BHTD, q_rope_BHTS = self.queries(x_BTX, cos_BTS, sin_BTS)
        q_BKGTD = q_BHTD.unflatten(1, (self.num_kv_heads, -1))
        q_BKGTR = torch.einsum("bkgtd,kdr->bkgtr", q_BKGTD, self.k_up)
        return torch.cat([q_BKGTR.flatten(1, 2), q_rope_BHTS], dim=-1)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: LatentCache | None = None,
        modality_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attends from new tokens to themselves and to the cache.

        Args:
            hidden_states: [B, T, X].
            position_embeddings: cos and sin of the source's rotary angles, each [B, T, D].
            attention_mask: boolean (True: attend) or additive, [B or 1, 1, T, N] over all cached
                and new tokens; None: causal.
            past_key_values: the cache; None: attend among the new tokens only.
            modality_mask: [B, T], True for vision tokens; None: all text.
            **kwargs: `packed`, training's attention over packed rows, if it is to be used; the
                rest is ignored (transformers passes its own).

        Returns:
            Output [B, T, X], and None in the place of attention weights.
        """
        B, T, _ = hidden_states.shape
        slots = self._slot_index(hidden_states.device)
        cos_BTS, sin_BTS = (x.index_select(-1, slots) for x in position_embeddings)
        row_B1TW = self.write(hidden_states, cos_BTS, sin_BTS, modality_mask)[:, None]
        if "packed" in kwargs:
            q_BHTW = torch.cat(self.queries(hidden_states, cos_BTS, sin_BTS), dim=-1)
            heads_BHTD = kwargs["packed"].latent(self, q_BHTW, row_B1TW[:, 0])
            return self.o_proj(heads_BHTD.transpose(1, 2).reshape(B, T, -1)), None
        if past_key_values is None:
            parts = [Part((row_B1TW,), attention_mask, attention_mask is None and T > 1)]
        else:
            parts = past_key_values.extend(self.layer_idx, (row_B1TW,), attention_mask)
        if self._absorbs(B, T, parts):
            q_BHTW = self.absorbed_queries(hidden_states, cos_BTS, sin_BTS)
            heads_BHTD = self.attend_absorbed(q_BHTW, parts)
        else:
            q_BHTW = torch.cat(self.queries(hidden_states, cos_BTS, sin_BTS), dim=-1)
            heads_BHTD = self.attend_reconstructed(q_BHTW, parts)
        return self.o_proj(heads_BHTD.transpose(1, 2).reshape(B, T, -1)), None

    def attend_reconstructed(self, q_BHTW: Tensor, parts: list[Part]) -> Tensor:
        """Attention on keys and values rebuilt per head; returns [B, H, T, D]."""
        if goes_by_blocks(parts, q_BHTW.shape[2]):
            q_BKGTW = q_BHTW.unflatten(1, (self.num_kv_heads, -1))
            return attend_blocks(q_BKGTW, parts, self.scale, self._pair).flatten(1, 2)
        rebuilt = [Part(self._pair(p), p.mask_BxTN, p.causal) for p in parts]
        q_BKGTW = q_BHTW.unflatten(1, (self.num_kv_heads, -1))
        return attend(q_BKGTW, rebuilt, self.scale).flatten(1, 2)

    def _pair(self, part: Part) -> tuple[Tensor, Tensor]:
        return self.rebuild(part.rows())

    def rebuild(self, row_bNW: Tensor, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Keys [b, K, N, D + 2 S] (rotary part shared by all heads) and values [b, K, N, D].

        `heads` chooses among the key/value heads. Rows may be of a smaller, nested rank.
        """
        rank = self.rank_of(row_bNW)
        k_up, v_up = self.k_up[heads, :, :rank], self.v_up[heads, :, :rank]
        K, D = len(k_up), self.head_dim
        c_bNR, rope_bNS = row_bNW.split([rank, row_bNW.shape[-1] - rank], dim=-1)
        up = torch.cat([k_up.flatten(0, 1), v_up.flatten(0, 1)])
        k_bNKD, v_bNKD = (
            x.unflatten(-1, (K, D)) for x in functional.linear(c_bNR, up).chunk(2, dim=-1)
        )
        rope_bKNS = rope_bNS[:, None].expand(-1, K, -1, -1)
        return torch.cat([k_bNKD.transpose(1, 2), rope_bKNS], dim=-1), v_bNKD.transpose(1, 2)

    def attend_absorbed(self, q_BHTW: Tensor, parts: list[Part]) -> Tensor:
        """Attention on the cached rows themselves (one shared head); returns [B, H, T, D]."""
        # The rows are keys and values at once; of the output only the latent part is wanted.
        rows = [replace(part, latent=self._nested(part)) for part in parts]
        out_BHTW = attend(q_BHTW[:, None], rows, self.scale)[:, 0]
        c_BKGTR = out_BHTW[..., : self.rank].unflatten(1, (self.num_kv_heads, -1))
        return torch.einsum("bkgtr,kdr->bkgtd", c_BKGTR, self.v_up).flatten(1, 2)

    def rank_of(self, rows: Tensor) -> int:
        """Latent columns of cached rows [..., W]: of vision tokens they may be fewer."""
        return rows.shape[-1] - 2 * len(self.slot_frequencies)

    def _nested(self, part: Part) -> int | None:
        rank = part.width - 2 * len(self.slot_frequencies)
        return None if rank == self.rank else rank

    def _absorbs(self, batch: int, new_tokens: int, parts: list[Part]) -> bool:
        """Whether the absorbed form is chosen."""
        if self.config.attention_form != "auto":
            return self.config.attention_form == "absorbed"
        if torch.is_grad_enabled():
            return False
        longest = max(parts, key=lambda p: p.cached)
        queries = new_tokens * (batch // longest.copies)
        return queries < break_even(self)

    def _slot_index(self, device: torch.device) -> Tensor:
        """Frequency index of each slot."""
        # Not a buffer: transformers drops the values of non-persistent buffers on loading.
        if self._slots is None or self._slots.device != device:
            # Kept: it must serve training too after a reply in inference mode.
            with torch.inference_mode(False):
                self._slots = torch.tensor(self.slot_frequencies, dtype=torch.long, device=device)
        return self._slots


class LatentAttention(RowAttention):
    """M²LA of one layer, in place of transformers' `Qwen3VLTextAttention`."""

    def __init__(self, config: InternVideo3TextConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        X, H, K, D = config.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        S, R, bias = len(self.slot_frequencies), self.rank, config.attention_bias
        self.q_proj = nn.Linear(X, H * D, bias=bias)
        self.k_proj = nn.Linear(X, K * D, bias=bias)
        self.v_proj = nn.Linear(X, K * D, bias=bias)
        self.q_norm, self.k_norm = head_norm(config), head_norm(config)
        self.latent_proj = nn.Linear(2 * K * D, R, bias=True)
        self.rope_write = nn.Parameter(torch.empty(2, S, K))
        self.rope_read = nn.Parameter(torch.empty(2, S, H))
        self.nope_gain = nn.Parameter(torch.empty(2, H, D // 2))
        self.k_up = nn.Parameter(torch.empty(K, D, R))
        self.v_up = nn.Parameter(torch.empty(K, D, R))
        self.o_proj = nn.Linear(H * D, X, bias=True)
        if config.modality_adapters:
            self.adapter_weight = nn.Parameter(torch.empty(2, R, R))
            self.adapter_bias = nn.Parameter(torch.empty(2, R))
        self._made: Folded | None = None

    def project(self, x_BTX: Tensor, vision_BT: Tensor | None) -> Tensor:
        """Rows `[c | k_rope before rotation]` of new tokens, [B, T, r + 2 S]."""
        B, T, _ = x_BTX.shape
        k_BTKD = self.k_norm(self.k_proj(x_BTX).view(B, T, self.num_kv_heads, self.head_dim))
        kv_BTE = torch.cat([k_BTKD.flatten(2), self.v_proj(x_BTX)], dim=-1)
        folded = self._folded()
        if folded is not None:
            row_BTW = folded.rows(kv_BTE, vision_BT)
            c_BTR, rope_BTS = row_BTW[..., : self.rank], row_BTW[..., self.rank :]
        else:
            c_BTR = self.adapt(self.latent_proj(kv_BTE), vision_BT)
            rope_BTS = self.rotary_key(k_BTKD)
        return torch.cat([nest(c_BTR, self.vision_rank, vision_BT), rope_BTS], dim=-1)

    def rotary_key(self, k_BTKD: Tensor) -> Tensor:
        """Shared rotary key before rotation, [B, T, 2 S]: `k'_s = Σ_h w_{s,h} k_{h,f(s)}`."""
        slots = self._slot_index(k_BTKD.device)
        re, im = (k.index_select(-1, slots).mT for k in k_BTKD.chunk(2, dim=-1))  # [B, T, S, K]
        w_re, w_im = self.rope_write
        return torch.cat([(w_re * re - w_im * im).sum(-1), (w_re * im + w_im * re).sum(-1)], dim=-1)

    def adapt(self, c_BTR: Tensor, vision_BT: Tensor | None) -> Tensor:
        """Modality adapter `c -> M_t c + δ_t`, t = text or vision (paper section 3.2.1).

        It is applied before the row is cached: per token and linear, it commutes with caching, so
        attention needs no modality mask.
        """
        if not self.config.modality_adapters:
            return c_BTR
        return adapted(c_BTR, self.adapter_weight, self.adapter_bias, vision_BT)

    def queries(self, x_BTX: Tensor, cos_BTS: Tensor, sin_BTS: Tensor) -> tuple[Tensor, Tensor]:
        """Content query `ḡ q` [B, H, T, D] and rotated slot query [B, H, T, 2 S]."""
        q_BTHD = self._normalised_query(x_BTX)
        q_slot = rotate(self.slot_query(q_BTHD), cos_BTS[:, :, None], sin_BTS[:, :, None])
        return self.content_query(q_BTHD).transpose(1, 2), q_slot.transpose(1, 2)

    def absorbed_queries(self, x_BTX: Tensor, cos_BTS: Tensor, sin_BTS: Tensor) -> Tensor:
        """Queries against cached rows, `[q~ | rotated slot query]`, [B, H, T, r + 2 S]."""
        folded = self._folded()
        if folded is None:
            return super().absorbed_queries(x_BTX, cos_BTS, sin_BTS)
        q_BHTW = folded.queries(self._normalised_query(x_BTX))
        q_rope = rotate(q_BHTW[..., self.rank :], cos_BTS[:, None], sin_BTS[:, None])
        return torch.cat([q_BHTW[..., : self.rank], q_rope], dim=-1)

    def _normalised_query(self, x_BTX: Tensor) -> Tensor:
        q_BTHD: Tensor = self.q_norm(self.q_proj(x_BTX).unflatten(-1, (self.num_heads, -1)))
        return q_BTHD

    def content_query(self, q_BTHD: Tensor) -> Tensor:
        """`ḡ q`: what meets the part of a key that is not rotated, [B, T, H, D]."""
        return rotate(q_BTHD, *self.nope_gain)

    def slot_query(self, q_BTHD: Tensor) -> Tensor:
        """`p̄_s q_{f(s)}` before rotation, [B, T, H, 2 S]."""
        slots = self._slot_index(q_BTHD.device)
        re, im = (x.index_select(-1, slots) for x in q_BTHD.chunk(2, dim=-1))
        return rotate(torch.cat([re, im], dim=-1), *self.rope_read.mT)

    def foldable(self) -> list[Tensor]:
        """The parameters that `folding` multiplies out."""
        adapters = [self.adapter_weight, self.adapter_bias] if self.config.modality_adapters else []
        latent = [self.latent_proj.weight, self.latent_proj.bias]
        return [*latent, self.rope_write, self.rope_read, self.nope_gain, self.k_up, *adapters]

    def forget_folded(self) -> None:
        """Drops the multiplied-out weights; the next pass without gradients makes them anew.

        To be called after weights were written by way of `.data`, which leaves no trace; between
        `train()` and `eval()` it is.
        """
        self._made = None

    def train(self, mode: bool = True) -> Self:
        """As of any module; weights may have been written meanwhile."""
        self.forget_folded()
        return super().train(mode)

    def _folded(self) -> Folded | None:
        """Multiplied-out weights, as long as no gradient is wanted and there is no adapter.

        A pass with gradients, and gradients that are there, foretell steps of an optimiser, which
        may leave no trace: torch's fused ones do not count versions up.
        """
        if torch.is_grad_enabled():
            self.forget_folded()
            return None
        if self.k_up.is_inference() or not is_plain(self.latent_proj):
            return None
        if any(parameter.grad is not None for parameter in self.foldable()):
            return fold(self)
        if self._made is None or self._made.state != state_of(self):
            self._made = fold(self)
        return self._made


def head_norm(config: InternVideo3TextConfig) -> nn.Module:
    """QK-norm of one head, or nothing where the norm is part of the projections."""
    if config.qk_norm == "linear":
        return nn.Identity()
    return Qwen3VLTextRMSNorm(config.head_dim, eps=config.rms_norm_eps)


def adapted(c_BTR: Tensor, weight_MRR: Tensor, bias_MR: Tensor, vision_BT: Tensor | None) -> Tensor:
    """`M_t c + δ_t`, t = 0 for text and 1 for vision tokens."""
    text = functional.linear(c_BTR, weight_MRR[0], bias_MR[0])
    if vision_BT is None:
        return text
    vision = functional.linear(c_BTR, weight_MRR[1], bias_MR[1])
    return torch.where(vision_BT.to(c_BTR.device)[..., None], vision, text)


def nest(c_BTR: Tensor, vision_rank: int, vision_BT: Tensor | None) -> Tensor:
    """Latents with the coordinates beyond their nested rank set to zero for vision tokens.

    A zero coordinate adds nothing to scores and outputs, so this equals reading only the first
    `vision_rank` coordinates of a vision row.
    """
    rank = c_BTR.shape[-1]
    if vision_BT is None or vision_rank == rank:
        return c_BTR
    beyond_R = torch.arange(rank, device=c_BTR.device) >= vision_rank
    return c_BTR.masked_fill(vision_BT.to(c_BTR.device)[..., None] & beyond_R, 0.0)


def break_even(attention: RowAttention) -> float:
    """New queries per cached token above which reconstruction needs fewer multiplications.

    Per cached token, with Q queries: reconstruct 2 K D r + Q H (2 D + 2 S), absorbed
    Q H (2 r + 2 S); equal at Q = K D r / (H (r - D)).
    """
    K, D, H, r = attention.num_kv_heads, attention.head_dim, attention.num_heads, attention.rank
    return K * D * r / (H * (r - D)) if r > D else float("inf")
