"""What calibration batches say about one attention layer of the source model.

The recorded gradient dO of a layer's head outputs gives everything else in closed form
(P = softmax(scores)):

    dS = P ∘ (dO Vᵀ − rowsum(P ∘ dO Vᵀ)),   y = [ unrotate(scale dSᵀ Q) ; Pᵀ dO ]

y is the gradient of a token's key before rotation and of its value; `y yᵀ` is the Fisher metric if
the labels are drawn from the model itself.

Axes: B batch, T tokens, H query heads, K key/value heads, G = H/K, D head width, F = D/2,
E = 2 K D (a token's keys and values z = [k; v]), M modality (0 text, 1 vision).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from internvideo3.model.conversion.recording import LayerCall
from internvideo3.model.conversion.source import Projections


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens of one layer, float64."""

    moment_MEE: Tensor
    """Σ ω z zᵀ, ω the token weight."""
    plain_EE: Tensor
    """Σ z zᵀ, every token alike."""
    plain_E: Tensor
    """Σ z."""
    first_ME: Tensor
    """Σ ω z."""
    weight_M: Tensor
    """Σ ω."""
    fisher_MEE: Tensor
    """Σ y yᵀ."""
    mean_sum_E: Tensor
    """Σ z over tokens that are not the first of their sequence."""
    mean_count: Tensor
    """Number of those tokens, a scalar."""
    tokens_M: Tensor
    """Number of tokens."""
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
            plain_EE=zeros(E, E),
            plain_E=zeros(E),
            first_ME=zeros(2, E),
            weight_M=zeros(2),
            fisher_MEE=zeros(2, E, E),
            mean_sum_E=zeros(E),
            mean_count=zeros(),
            tokens_M=zeros(2),
            gain_HF=zeros(heads, F, dtype=torch.complex128),
            score_H=zeros(heads),
            query_HF=zeros(heads, F),
        )

    @classmethod
    def load(cls, file: Path, device: torch.device) -> LayerStatistics:
        """Reads what `save` wrote."""
        found = load_file(file, device=str(device))
        found["gain_HF"] = torch.view_as_complex(found["gain_HF"])
        return cls(**found)

    def save(self, file: Path) -> None:
        """Writes a file that exists only when it is whole."""
        partial = file.with_suffix(".partial")
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors["gain_HF"] = torch.view_as_real(self.gain_HF)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.rename(file)

    @property
    def kv_heads(self) -> int:
        """K."""
        return len(self.plain_E) // (4 * self.gain_HF.shape[1])

    def mean(self) -> Tensor:
        """Mean of z over tokens that are not sinks, [E]."""
        return self.mean_sum_E / self.mean_count.clamp_min(1.0)

    def second_moment(self, weighted: bool = True) -> Tensor:
        """Second moment of z, not centred, [E, E]; tokens weighted by ω or alike."""
        if weighted:
            return self.moment_MEE.sum(0) / self.weight_M.sum()
        return self.plain_EE / self.tokens_M.sum()

    def covariance(
        self, about_E: Tensor, modality: int | None = None, weighted: bool = True
    ) -> Tensor:
        """Second moment of z − about, [E, E], of one modality or of all tokens."""
        which = slice(None) if modality is None else slice(modality, modality + 1)
        total = self.weight_M[which].sum()
        first_E, moment = self.first_ME[which].sum(0), self.moment_MEE[which].sum(0)
        if not weighted:
            first_E, moment, total = self.plain_E, self.plain_EE, self.tokens_M.sum()
        cross = torch.outer(first_E / total, about_E)
        return moment / total - cross - cross.T + torch.outer(about_E, about_E)


@torch.no_grad()
def collect(
    projections: Projections, calls: Iterable[LayerCall], *, scale: float, token_floor: float
) -> LayerStatistics:
    """Sums one layer's recorded calls up.

    Args:
        projections: how keys, values and queries are made; the source's own, or what replaces them.
        calls: the layer's recorded calls.
        scale: of attention scores.
        token_floor: weight added to every token's share of the loss, in units of the mean weight.
    """
    stats: LayerStatistics | None = None
    for call in calls:
        q, k, v = (x.float() for x in projections(call.x_BTX))
        if stats is None:
            stats = LayerStatistics.zeros(q.shape[1], k.shape[1], q.shape[3], q.device)
        _add(stats, call, (q, k, v), scale, token_floor)
    assert stats is not None, "a recording has at least one batch"
    return stats


def _add(
    stats: LayerStatistics,
    call: LayerCall,
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float,
    token_floor: float,
) -> None:
    q_BHTD, k_BKTD, v_BKTD = qkv
    cos, sin = call.cos_BTD.float(), call.sin_BTD.float()
    B, _, T, D = q_BHTD.shape
    grad_BHTD = call.grad_BTE.float().view(B, T, -1, D).transpose(1, 2)
    q_rot, k_rot = apply_rotary_pos_emb(q_BHTD, k_BKTD, cos, sin)
    K = k_BKTD.shape[1]
    bias = call.scores_bias()
    key_grads, value_grads = [], []
    # One key/value head at a time: scores of all heads at once would not fit for long inputs.
    for h, (q, grad) in enumerate(
        zip(q_rot.chunk(K, dim=1), grad_BHTD.chunk(K, dim=1), strict=True)
    ):
        own = slice(h, h + 1)
        score_grad, key_grad, value_grad = _attention_gradients(
            q[:, None], k_rot[:, own], v_BKTD[:, own], grad[:, None], bias, scale
        )
        key_grads.append(key_grad)
        value_grads.append(value_grad)
        _add_pairs(stats, score_grad[:, 0], q_BHTD.chunk(K, dim=1)[h], call, h)
    # Rotating back: e^{-iθm} has sine −sin.
    key_grad = torch.cat(key_grads, dim=1)
    key_grad, _ = apply_rotary_pos_emb(key_grad, key_grad, cos, -sin)
    z_BTE = torch.cat([k_BKTD, v_BKTD], dim=1).transpose(1, 2).flatten(2)
    y_BTE = torch.cat([key_grad, *value_grads], dim=1).transpose(1, 2).flatten(2)
    _add_tokens(stats, z_BTE, y_BTE, call.valid_BT, call.vision_BT, token_floor)


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
        stats.tokens_M[modality] += len(z)
        stats.fisher_MEE[modality] += y.T @ y
    every = z_BTE[valid_BT].double()
    stats.plain_EE += every.T @ every
    stats.plain_E += every.sum(0)
    # The first token of a sequence is an attention sink and an outlier.
    ordinary_BT = valid_BT & (valid_BT.cumsum(1) > 1)
    stats.mean_sum_E += z_BTE[ordinary_BT].double().sum(0)
    stats.mean_count += ordinary_BT.sum()


def _add_pairs(
    stats: LayerStatistics,
    score_grad_BGTT: Tensor,
    q_BGTD: Tensor,
    call: LayerCall,
    kv_head: int,
) -> None:
    """Adds one group of query heads."""
    G = q_BGTD.shape[1]
    own = slice(kv_head * G, (kv_head + 1) * G)
    power = score_grad_BGTT.square() * call.valid_BT[:, None, :, None]
    F = q_BGTD.shape[-1] // 2
    cos, sin = call.cos_BTD.float()[..., :F], call.sin_BTD.float()[..., :F]
    turn_B1TF = torch.complex(cos, sin)[:, None]
    # Σ_mm' dS² e^{-iθ(m − m')} = Σ_m conj(e^{iθm}) Σ_m' dS² e^{iθm'}
    inner = torch.complex(power @ turn_B1TF.real, power @ turn_B1TF.imag)
    stats.gain_HF[own] += (turn_B1TF.conj() * inner).sum((0, 2)).to(torch.complex128)
    row_BGT = power.sum(-1)
    stats.score_H[own] += row_BGT.sum((0, 2)).double()
    q_power = q_BGTD[..., :F].square() + q_BGTD[..., F:].square()
    stats.query_HF[own] += (row_BGT[..., None] * q_power).sum((0, 2)).double()
