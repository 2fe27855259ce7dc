"""What calibration batches say about each attention layer of the source model.

One forward and one backward pass per batch. The gradient of the loss reaches a layer as dO, the
gradient of its head outputs; everything else follows in closed form (P = softmax(scores)):

    dS = P ∘ (dO Vᵀ − rowsum(P ∘ dO Vᵀ)),   y = [ unrotate(scale dSᵀ Q) ; Pᵀ dO ]

y is the gradient of a token's key before rotation and of its value; `y yᵀ` is the Fisher metric if
the labels are drawn from the model itself.

Axes: B batch, T tokens, H query heads, K key/value heads, G = H/K, D head width, F = D/2,
E = 2 K D (a token's keys and values z = [k; v]), M modality (0 text, 1 vision).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextAttention,
    apply_rotary_pos_emb,
)

Batch = dict[str, Any]
"""Keyword arguments of the model's forward; `labels` marks the supervised tokens."""


@dataclass
class LayerCall:
    """One call of one attention layer of the source."""

    layer: int
    attention: Qwen3VLTextAttention
    x_BTX: Tensor
    cos_BTD: Tensor
    sin_BTD: Tensor
    mask: Tensor | None
    """As transformers hands it to the layer: None (causal), boolean or additive."""
    heads_BTE: Tensor | None = None
    """Input of the output projection; part of the graph."""

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised unrotated queries [B,H,T,D] and keys, and values, both [B,K,T,D]."""
        shape = (*self.x_BTX.shape[:2], -1, self.attention.head_dim)
        q = self.attention.q_norm(self.attention.q_proj(self.x_BTX).view(shape))
        k = self.attention.k_norm(self.attention.k_proj(self.x_BTX).view(shape))
        v = self.attention.v_proj(self.x_BTX).view(shape)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def scores_bias(self) -> Tensor:
        """Additive mask [B or 1, 1, T, T], float32."""
        T, device = self.x_BTX.shape[1], self.x_BTX.device
        mask = self.mask
        if mask is None:
            mask = torch.ones(T, T, dtype=torch.bool, device=device).tril()[None, None]
        if mask.dtype != torch.bool:
            return mask.float()
        return torch.zeros(mask.shape, device=device).masked_fill(~mask, -1e30)


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens of one layer, float64."""

    moment_MEE: Tensor
    """Σ ω z zᵀ, ω the token weight."""
    first_ME: Tensor
    """Σ ω z."""
    weight_M: Tensor
    """Σ ω."""
    fisher_MEE: Tensor
    """Σ y yᵀ."""
    mean_sum_E: Tensor
    """Σ z over tokens that are not the first of their sequence."""
    mean_count: float
    """Number of those tokens."""
    gain_HF: Tensor
    """Σ dS² e^{-iθΔ} over pairs at distance Δ (complex)."""
    score_H: Tensor
    """Σ dS²."""
    query_HF: Tensor
    """Σ_m (Σ_m' dS²) |q_{a,f}(m)|²."""

    @classmethod
    def zeros(
        cls, heads: int, kv_heads: int, head_dim: int, device: torch.device
    ) -> LayerStatistics:
        """Empty sums."""
        E, F = 2 * kv_heads * head_dim, head_dim // 2

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            moment_MEE=zeros(2, E, E),
            first_ME=zeros(2, E),
            weight_M=zeros(2),
            fisher_MEE=zeros(2, E, E),
            mean_sum_E=zeros(E),
            mean_count=0.0,
            gain_HF=zeros(heads, F, dtype=torch.complex128),
            score_H=zeros(heads),
            query_HF=zeros(heads, F),
        )

    def mean(self) -> Tensor:
        """Mean of z over tokens that are not sinks, [E]."""
        return self.mean_sum_E / max(self.mean_count, 1.0)

    def second_moment(self) -> Tensor:
        """Weighted second moment of z, not centred, [E, E]."""
        return self.moment_MEE.sum(0) / self.weight_M.sum()

    def covariance(self, about_E: Tensor, modality: int | None = None) -> Tensor:
        """Weighted second moment of z − about, [E, E], of one modality or of all tokens."""
        which = slice(None) if modality is None else slice(modality, modality + 1)
        total = self.weight_M[which].sum()
        first_E = self.first_ME[which].sum(0) / total
        cross = torch.outer(first_E, about_E)
        moment = self.moment_MEE[which].sum(0) / total
        return moment - cross - cross.T + torch.outer(about_E, about_E)


@dataclass
class Recorder:
    """Hooks that catch every attention call of one forward pass."""

    calls: list[LayerCall] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def attach(self, model: Qwen3VLForConditionalGeneration) -> None:
        """Starts recording."""
        for index, layer in enumerate(model.model.language_model.layers):
            attention = layer.self_attn
            enter = self._enter(index)
            self._handles += [
                attention.register_forward_pre_hook(enter, with_kwargs=True),
                attention.o_proj.register_forward_pre_hook(self._leave),
            ]

    def detach(self) -> None:
        """Stops recording."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            cos, sin = kwargs["position_embeddings"]
            assert isinstance(module, Qwen3VLTextAttention)
            x = kwargs["hidden_states"].detach()
            self.calls.append(LayerCall(index, module, x, cos, sin, kwargs["attention_mask"]))

        return hook

    def _leave(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.calls[-1].heads_BTE = args[0]


def record(model: Qwen3VLForConditionalGeneration, batch: Batch) -> tuple[list[LayerCall], Tensor]:
    """Runs the model on a batch; returns its attention calls and its logits [B, T, vocabulary]."""
    recorder = Recorder()
    recorder.attach(model)
    inputs = {k: v for k, v in on_device(batch, model.device).items() if k != "labels"}
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        recorder.detach()
    return recorder.calls, logits


def collect(
    model: Qwen3VLForConditionalGeneration,
    batches: Iterable[Batch],
    *,
    seed: int,
    token_floor: float,
) -> list[LayerStatistics]:
    """Statistics of every attention layer over the calibration batches.

    Raises:
        ValueError: there is no batch.
    """
    text = text_config(model)
    kv_heads = text.num_key_value_heads or text.num_attention_heads
    shape = (text.num_attention_heads, kv_heads, text.head_dim)
    stats = [LayerStatistics.zeros(*shape, model.device) for _ in range(text.num_hidden_layers)]
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    for batch in batches:
        seen += 1
        calls, grads = _gradients(model, batch, generator)
        valid_BT = valid_tokens(batch, calls[0].x_BTX)
        vision_BT = vision_tokens(model, batch, valid_BT)
        for call, grad_BTE in zip(calls, grads, strict=True):
            with torch.no_grad():
                _add(stats[call.layer], call, grad_BTE, valid_BT, vision_BT, token_floor)
    if not seen:
        raise ValueError("no calibration batch was given; pass at least one dict of model inputs.")
    return stats


def _gradients(
    model: Qwen3VLForConditionalGeneration, batch: Batch, generator: torch.Generator
) -> tuple[list[LayerCall], tuple[Tensor, ...]]:
    """Attention calls of one batch and the loss gradient of each one's head outputs."""
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    try:
        with torch.enable_grad():
            calls, logits = record(model, batch)
            loss = _sampled_loss(logits, supervised(model, batch, logits.device), generator)
            heads = [call.heads_BTE for call in calls if call.heads_BTE is not None]
            return calls, torch.autograd.grad(loss, heads)
    finally:
        handle.remove()


def supervised(
    model: Qwen3VLForConditionalGeneration, batch: Batch, device: torch.device
) -> Tensor:
    """Positions [B, T] whose next token counts: labelled ones, or all text without labels."""
    ids = batch["input_ids"]
    counts = torch.zeros(ids.shape, dtype=torch.bool)
    if batch.get("labels") is not None:
        counts[:, :-1] = batch["labels"][:, 1:].cpu() != -100
    else:
        valid = valid_tokens(batch, ids).cpu()
        counts[:, :-1] = (valid & ~vision_tokens(model, batch, valid).cpu())[:, 1:]
    return counts.to(device)


def _sampled_loss(logits: Tensor, counts_BT: Tensor, generator: torch.Generator) -> Tensor:
    """Sum of cross-entropies against labels drawn from the model itself."""
    chosen = logits[counts_BT].float()
    labels = torch.multinomial(chosen.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(chosen, labels.to(chosen.device), reduction="sum")


def _add(
    stats: LayerStatistics,
    call: LayerCall,
    grad_BTE: Tensor,
    valid_BT: Tensor,
    vision_BT: Tensor,
    token_floor: float,
) -> None:
    q, k, v = (x.float() for x in call.qkv())
    cos, sin = call.cos_BTD.float(), call.sin_BTD.float()
    B, H, T, D = q.shape
    K = k.shape[1]
    grad_BHTD = grad_BTE.float().view(B, T, H, D).transpose(1, 2)
    q_rot, k_rot = apply_rotary_pos_emb(q, k, cos, sin)
    score_grad, key_grad, value_grad = _attention_gradients(
        q_rot.unflatten(1, (K, -1)),
        k_rot,
        v,
        grad_BHTD.unflatten(1, (K, -1)),
        call.scores_bias(),
        call.attention.scaling,
    )
    # Rotating back: e^{-iθm} has sine −sin.
    key_grad, _ = apply_rotary_pos_emb(key_grad, key_grad, cos, -sin)
    z_BTE = torch.cat([k, v], dim=1).transpose(1, 2).flatten(2)
    y_BTE = torch.cat([key_grad, value_grad], dim=1).transpose(1, 2).flatten(2)
    _add_tokens(stats, z_BTE, y_BTE, valid_BT, vision_BT, token_floor)
    _add_pairs(stats, score_grad.flatten(1, 2), q, cos, sin, valid_BT)


def _attention_gradients(
    q_BKGTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, grad_BKGTD: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scaled scores [B,K,G,T,T], rotated keys and values, both [B,K,T,D]."""
    keys, values = k_BKTD[:, :, None], v_BKTD[:, :, None]
    probs = (scale * q_BKGTD @ keys.mT + bias[:, :, None]).softmax(-1)
    value_side = grad_BKGTD @ values.mT
    score_grad = probs * (value_side - (probs * value_side).sum(-1, keepdim=True))
    key_grad = scale * (score_grad.mT @ q_BKGTD).sum(2)
    return score_grad, key_grad, (probs.mT @ grad_BKGTD).sum(2)


def _add_tokens(
    stats: LayerStatistics,
    z_BTE: Tensor,
    y_BTE: Tensor,
    valid_BT: Tensor,
    vision_BT: Tensor,
    token_floor: float,
) -> None:
    weight_BT = y_BTE.double().square().sum(-1) * valid_BT
    # One batch must not drown another: each is brought to a mean token weight of one.
    weight_BT = weight_BT / (weight_BT.sum() / valid_BT.sum()).clamp_min(1e-300)
    weight_BT = (weight_BT + token_floor) * valid_BT
    for modality, chosen_BT in enumerate((valid_BT & ~vision_BT, valid_BT & vision_BT)):
        z, y, weight = z_BTE[chosen_BT].double(), y_BTE[chosen_BT].double(), weight_BT[chosen_BT]
        stats.moment_MEE[modality] += (z * weight[:, None]).T @ z
        stats.first_ME[modality] += weight @ z
        stats.weight_M[modality] += weight.sum()
        stats.fisher_MEE[modality] += y.T @ y
    # The first token of a sequence is an attention sink and an outlier.
    ordinary_BT = valid_BT & (valid_BT.cumsum(1) > 1)
    stats.mean_sum_E += z_BTE[ordinary_BT].double().sum(0)
    stats.mean_count += float(ordinary_BT.sum())


def _add_pairs(
    stats: LayerStatistics,
    score_grad_BHTT: Tensor,
    q_BHTD: Tensor,
    cos_BTD: Tensor,
    sin_BTD: Tensor,
    valid_BT: Tensor,
) -> None:
    power = score_grad_BHTT.square() * valid_BT[:, None, :, None]
    F = cos_BTD.shape[-1] // 2
    turn_B1TF = torch.complex(cos_BTD[..., :F], sin_BTD[..., :F])[:, None]
    # Σ_mm' dS² e^{-iθ(m − m')} = Σ_m conj(e^{iθm}) Σ_m' dS² e^{iθm'}
    inner = torch.complex(power @ turn_B1TF.real, power @ turn_B1TF.imag)
    stats.gain_HF += (turn_B1TF.conj() * inner).sum((0, 2)).to(torch.complex128)
    row_BHT = power.sum(-1)
    stats.score_H += row_BHT.sum((0, 2)).double()
    q_power = q_BHTD[..., :F].square() + q_BHTD[..., F:].square()
    stats.query_HF += (row_BHT[..., None] * q_power).sum((0, 2)).double()


def text_config(model: Qwen3VLForConditionalGeneration) -> Qwen3VLTextConfig:
    """The model's text configuration."""
    config = model.config.text_config
    assert isinstance(config, Qwen3VLTextConfig)
    return config


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def valid_tokens(batch: Batch, like: Tensor) -> Tensor:
    """Tokens that are not padding, boolean [B, T], on the device of `like` ([B, T, ...])."""
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 2:
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
    valid: Tensor = mask.to(like.device, torch.bool)
    return valid


def vision_tokens(model: Qwen3VLForConditionalGeneration, batch: Batch, like: Tensor) -> Tensor:
    """Image and video tokens, boolean [B, T], on the device of `like`."""
    ids = batch["input_ids"].to(like.device)
    vision: Tensor = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
    return vision
