"""Attention over cached segments, and M²LA's latent attention in its two forms.

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

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from internvideo3.model.cache import LatentCache, Part
from internvideo3.model.config import InternVideo3TextConfig

MAX_SCORES = 1 << 26
"""Scores held at once by `attend`; longer inputs are taken in runs of queries."""


def attend(q_BKGTW: Tensor, parts: list[Part], scale: float) -> Tensor:
    """Softmax attention over several segments, merged by log-sum-exp.

    Each part holds keys [b, K, N, W] and values [b, K, N, V]. With b = 1 and B > 1 the batch is
    folded into the queries, so that the shared segment is read once and never expanded.

    Returns:
        [B, K, G, T, V].
    """
    B, K, G, T, _ = q_BKGTW.shape
    if len(parts) == 1 and K > 1 and parts[0].tensors[0].shape[0] == B:
        return _attend_whole(q_BKGTW, parts[0], scale)
    cached = sum(part.tensors[0].shape[2] for part in parts)
    run = max(1, MAX_SCORES // (B * K * G * cached))
    if run >= T:
        return _merge([_attend_part(q_BKGTW, part, scale) for part in parts])
    outs: list[Tensor] = []
    for start in range(0, T, run):
        stop = min(start + run, T)
        cut = [_query_rows(part, start, stop, T) for part in parts]
        q_run = q_BKGTW[..., start:stop, :]
        outs.append(_merge([_attend_part(q_run, part, scale) for part in cut]))
    return torch.cat(outs, dim=3)


def _attend_whole(q_BKGTW: Tensor, part: Part, scale: float) -> Tensor:
    """Attention over a single segment by torch's fused kernels; [B, K, G, T, V]."""
    K, T = q_BKGTW.shape[1], q_BKGTW.shape[3]
    if T == 1 and part.mask_BxTN is None:
        # One query sees everything: a head's group is then a sequence of queries to its keys.
        k_BKNW, v_BKNV = part.tensors
        q_BKGW = q_BKGTW.squeeze(3)
        out_BKGV = functional.scaled_dot_product_attention(q_BKGW, k_BKNW, v_BKNV, scale=scale)
        return out_BKGV.unsqueeze(3)
    return _attend_causal(q_BKGTW.flatten(1, 2), part, scale).unflatten(1, (K, -1))


def _query_rows(part: Part, start: int, stop: int, new_tokens: int) -> Part:
    """The part as queries `start` to `stop` of `new_tokens` see it."""
    mask = part.mask_BxTN
    if part.causal:
        cached = part.tensors[0].shape[2]
        mask = _causal_mask(new_tokens, cached, part.tensors[0].device)
    return part if mask is None else Part(part.tensors, mask[..., start:stop, :])


def _merge(found: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Merges outputs [B, K, G, T, V] of several segments by their log-sum-exp [B, K, G, T]."""
    outs = [out for out, _ in found]
    if len(outs) == 1:
        return outs[0]
    lse_PBKGT = torch.stack([lse for _, lse in found])
    # A padding query may see nothing at all; the clamp gives it zeros, not NaN.
    total_BKGT = lse_PBKGT.logsumexp(0).clamp_min(torch.finfo(lse_PBKGT.dtype).min)
    weight_PBKGT = (lse_PBKGT - total_BKGT).exp().to(outs[0].dtype)
    return (weight_PBKGT[..., None] * torch.stack(outs)).sum(0)


def _attend_part(q_BKGTW: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over one segment: normalised output [B,K,G,T,V] and log-sum-exp [B,K,G,T]."""
    k_bKNW, v_bKNV = part.tensors
    B, K, G, T, W = q_BKGTW.shape
    b, N, V = k_bKNW.shape[0], k_bKNW.shape[2], v_bKNV.shape[3]
    fold = B // b
    q_bKMW = q_BKGTW.permute(1, 0, 2, 3, 4) if fold > 1 else q_BKGTW
    q_bKMW = q_bKMW.reshape(b, K, fold * G * T, W)
    mask = _causal_mask(T, N, q_bKMW.device) if part.causal else part.mask_BxTN
    if mask is None:
        out, lse = _attend_unmasked(q_bKMW, k_bKNW, v_bKNV, scale)
    else:
        # [B or 1, 1, T, N] -> [b, 1, fold or 1, 1, T, N]
        mask = mask[:, None, None] if fold == 1 else mask[None, None]
        scores = torch.matmul(q_bKMW * scale, k_bKNW.mT).view(b, K, fold, G, T, N)
        out, lse = _softmax(_masked(scores, mask).view(b, K, -1, N), v_bKNV)
    out, lse = out.view(b, K, fold, G, T, V), lse.view(b, K, fold, G, T)
    if fold > 1:
        return out[0].transpose(0, 1), lse[0].transpose(0, 1)
    return out[:, :, 0], lse[:, :, 0]


def _attend_unmasked(
    q_bKMW: Tensor, k_bKNW: Tensor, v_bKNV: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Every query sees every key: output [b, K, M, V] and log-sum-exp [b, K, M]."""
    if q_bKMW.device.type != "cpu" or torch.is_grad_enabled():
        return _softmax(torch.matmul(q_bKMW * scale, k_bKNW.mT), v_bKNV)
    # torch's CPU flash attention; only the operator itself hands out the log-sum-exp.
    width = v_bKNV.shape[3]
    v_bKNW = functional.pad(v_bKNV, (0, k_bKNW.shape[3] - width))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out_bKMW, lse_bKM = flash(q_bKMW, k_bKNW, v_bKNW, scale=scale)
    return out_bKMW[..., :width], lse_bKM


def _softmax(scores_bKMN: Tensor, v_bKNV: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax-weighted values [b, K, M, V] and log-sum-exp [b, K, M].

    A query that sees nothing gets zeros and -inf, and so weight 0 in a merge.
    """
    if scores_bKMN.dtype in (torch.float16, torch.bfloat16):
        scores_bKMN = scores_bKMN.float()
    lowest = torch.finfo(scores_bKMN.dtype).min
    top_bKM1 = scores_bKMN.detach().amax(-1, keepdim=True).clamp_min(lowest)
    weights_bKMN = (scores_bKMN - top_bKM1).exp_()
    total_bKM1 = weights_bKMN.sum(-1, keepdim=True)
    lse_bKM = (total_bKM1.log() + top_bKM1)[..., 0]
    out_bKMV = torch.matmul(weights_bKMN.to(v_bKNV.dtype), v_bKNV)
    return out_bKMV / total_bKM1.clamp_min(torch.finfo(lse_bKM.dtype).tiny).to(out_bKMV), lse_bKM


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, float("-inf"))
    return scores + mask.to(scores.dtype)


def _causal_mask(new_tokens: int, cached: int, device: torch.device) -> Tensor:
    """Boolean [1, 1, T, N]: query t sees tokens up to N - T + t."""
    queries = torch.arange(cached - new_tokens, cached, device=device)
    return (torch.arange(cached, device=device) <= queries[:, None])[None, None]


def _attend_causal(q_BHTW: Tensor, part: Part, scale: float) -> Tensor:
    """Attention of several queries over a single segment by torch's fused kernels; [B, H, T, V]."""
    k_BKNW, v_BKNV = part.tensors
    T, N, groups = q_BHTW.shape[2], k_BKNW.shape[2], q_BHTW.shape[1] // k_BKNW.shape[1]
    mask = part.mask_BxTN
    if part.causal and T != N:
        mask = _causal_mask(T, N, q_BHTW.device)
    width = v_BKNV.shape[3]
    if q_BHTW.device.type == "cpu":
        # torch has a flash kernel for CPU, but for keys and values of one width only.
        v_BKNV = functional.pad(v_BKNV, (0, k_BKNW.shape[3] - width))
    return functional.scaled_dot_product_attention(
        q_BHTW,
        _repeat_heads(k_BKNW, groups),
        _repeat_heads(v_BKNV, groups),
        attn_mask=mask,
        is_causal=part.causal and T == N,
        scale=scale,
    )[..., :width]


def _repeat_heads(x_BKNW: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return x_BKNW
    return x_BKNW[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Multiplies complex numbers `[Re | Im]` (last axis 2 S) by cos + i sin (last axis S)."""
    re, im = x.chunk(2, dim=-1)
    return torch.cat([re * cos - im * sin, re * sin + im * cos], dim=-1)


class LatentAttention(nn.Module):
    """M²LA of one layer, in place of transformers' `Qwen3VLTextAttention`."""

    def __init__(self, config: InternVideo3TextConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.rank = config.rank(layer_idx)
        self.slot_frequencies = config.slot_frequencies(layer_idx)
        self.scale = self.head_dim**-0.5

        X, H, K, D = config.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim
        S, R, bias = len(self.slot_frequencies), self.rank, config.attention_bias
        self.q_proj = nn.Linear(X, H * D, bias=bias)
        self.k_proj = nn.Linear(X, K * D, bias=bias)
        self.v_proj = nn.Linear(X, K * D, bias=bias)
        self.q_norm = Qwen3VLTextRMSNorm(D, eps=config.rms_norm_eps)
        self.k_norm = Qwen3VLTextRMSNorm(D, eps=config.rms_norm_eps)
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
        self._slots: Tensor | None = None

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
            **kwargs: ignored (transformers passes its own).

        Returns:
            Output [B, T, X], and None in the place of attention weights.
        """
        B, T, _ = hidden_states.shape
        slots = self._slot_index(hidden_states.device)
        cos_BTS, sin_BTS = (x.index_select(-1, slots) for x in position_embeddings)
        row_B1TW = self.write(hidden_states, cos_BTS, sin_BTS, modality_mask)[:, None]
        q_BHTD, q_rope_BHTS = self.queries(hidden_states, cos_BTS, sin_BTS)
        if past_key_values is None:
            parts = [Part((row_B1TW,), attention_mask, attention_mask is None and T > 1)]
        else:
            parts = past_key_values.extend(self.layer_idx, (row_B1TW,), attention_mask)
        if self._absorbs(B, T, parts):
            heads_BHTD = self.attend_absorbed(q_BHTD, q_rope_BHTS, parts)
        else:
            heads_BHTD = self.attend_reconstructed(q_BHTD, q_rope_BHTS, parts)
        return self.o_proj(heads_BHTD.transpose(1, 2).reshape(B, T, -1)), None

    def write(
        self, x_BTX: Tensor, cos_BTS: Tensor, sin_BTS: Tensor, vision_BT: Tensor | None
    ) -> Tensor:
        """The cached rows `[c | k_rope]` of new tokens, [B, T, r + 2 S]."""
        B, T, _ = x_BTX.shape
        k_BTKD = self.k_norm(self.k_proj(x_BTX).view(B, T, self.num_kv_heads, self.head_dim))
        kv_BTE = torch.cat([k_BTKD.flatten(2), self.v_proj(x_BTX)], dim=-1)
        c_BTR = self.adapt(self.latent_proj(kv_BTE), vision_BT)
        return torch.cat([c_BTR, rotate(self.rotary_key(k_BTKD), cos_BTS, sin_BTS)], dim=-1)

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
        text = functional.linear(c_BTR, self.adapter_weight[0], self.adapter_bias[0])
        if vision_BT is None:
            return text
        vision = functional.linear(c_BTR, self.adapter_weight[1], self.adapter_bias[1])
        return torch.where(vision_BT.to(c_BTR.device)[..., None], vision, text)

    def queries(self, x_BTX: Tensor, cos_BTS: Tensor, sin_BTS: Tensor) -> tuple[Tensor, Tensor]:
        """Content query `ḡ q` [B, H, T, D] and rotated slot query [B, H, T, 2 S]."""
        B, T, _ = x_BTX.shape
        q_BTHD = self.q_norm(self.q_proj(x_BTX).view(B, T, self.num_heads, self.head_dim))
        re, im = q_BTHD.chunk(2, dim=-1)
        q_nope = rotate(q_BTHD, *self.nope_gain)
        slots = self._slot_index(x_BTX.device)
        q_slot = torch.cat([re.index_select(-1, slots), im.index_select(-1, slots)], dim=-1)
        q_slot = rotate(q_slot, *self.rope_read.mT)
        q_slot = rotate(q_slot, cos_BTS[:, :, None], sin_BTS[:, :, None])
        return q_nope.transpose(1, 2), q_slot.transpose(1, 2)

    def attend_reconstructed(
        self, q_BHTD: Tensor, q_rope_BHTS: Tensor, parts: list[Part]
    ) -> Tensor:
        """Attention on keys and values rebuilt per head; returns [B, H, T, D]."""
        q_BHTW = torch.cat([q_BHTD, q_rope_BHTS], dim=-1)
        rebuilt = [Part(self.rebuild(p.tensors[0][:, 0]), p.mask_BxTN, p.causal) for p in parts]
        q_BKGTW = q_BHTW.unflatten(1, (self.num_kv_heads, -1))
        return attend(q_BKGTW, rebuilt, self.scale).flatten(1, 2)

    def rebuild(self, row_bNW: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [b, K, N, D + 2 S] (rotary part shared by all heads) and values [b, K, N, D]."""
        K, D = self.num_kv_heads, self.head_dim
        c_bNR, rope_bNS = row_bNW.split([self.rank, row_bNW.shape[-1] - self.rank], dim=-1)
        up = torch.cat([self.k_up.flatten(0, 1), self.v_up.flatten(0, 1)])
        k_bNKD, v_bNKD = (
            x.unflatten(-1, (K, D)) for x in functional.linear(c_bNR, up).chunk(2, dim=-1)
        )
        rope_bKNS = rope_bNS[:, None].expand(-1, K, -1, -1)
        return torch.cat([k_bNKD.transpose(1, 2), rope_bKNS], dim=-1), v_bNKD.transpose(1, 2)

    def attend_absorbed(self, q_BHTD: Tensor, q_rope_BHTS: Tensor, parts: list[Part]) -> Tensor:
        """Attention on the cached rows themselves (one shared head); returns [B, H, T, D]."""
        q_BKGTD = q_BHTD.unflatten(1, (self.num_kv_heads, -1))
        q_BKGTR = torch.einsum("bkgtd,kdr->bkgtr", q_BKGTD, self.k_up)
        q_B1HTW = torch.cat([q_BKGTR.flatten(1, 2), q_rope_BHTS], dim=-1)[:, None]
        # The rows are keys and values at once; of the output only the latent part is wanted.
        rows = [Part((p.tensors[0], p.tensors[0]), p.mask_BxTN, p.causal) for p in parts]
        out_BHTW = attend(q_B1HTW, rows, self.scale)[:, 0]
        c_BKGTR = out_BHTW[..., : self.rank].unflatten(1, (self.num_kv_heads, -1))
        return torch.einsum("bkgtr,kdr->bkgtd", c_BKGTR, self.v_up).flatten(1, 2)

    def _absorbs(self, batch: int, new_tokens: int, parts: list[Part]) -> bool:
        """Whether the absorbed form is chosen."""
        if self.config.attention_form != "auto":
            return self.config.attention_form == "absorbed"
        if torch.is_grad_enabled():
            return False
        longest = max(parts, key=lambda p: p.tensors[0].shape[2])
        queries = new_tokens * (batch // longest.tensors[0].shape[0])
        return queries < break_even(self)

    def _slot_index(self, device: torch.device) -> Tensor:
        """Frequency index of each slot."""
        # Not a buffer: transformers drops the values of non-persistent buffers on loading.
        if self._slots is None or self._slots.device != device:
            self._slots = torch.tensor(self.slot_frequencies, dtype=torch.long, device=device)
        return self._slots


def break_even(attention: LatentAttention) -> float:
    """New queries per cached token above which reconstruction needs fewer multiplications.

    Per cached token, with Q queries: reconstruct 2 K D r + Q H (2 D + 2 S), absorbed
    Q H (2 r + 2 S); equal at Q = K D r / (H (r - D)).
    """
    K, D, H, r = attention.num_kv_heads, attention.head_dim, attention.num_heads, attention.rank
    return K * D * r / (H * (r - D)) if r > D else float("inf")
