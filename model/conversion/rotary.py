"""Which parts of the keys keep their rotation, and what replaces it elsewhere.

RoPE multiplies the pair f of every KV head by the same e^{iθ_f m}, so it commutes with any complex
mixing of the heads within one frequency. Per frequency the weighted complex PCA of the K heads'
pairs gives components e; a rotary slot is one (frequency, component), and the S most important
ones over all frequencies are kept. This holds for interleaved MRoPE: a pair has one axis.

Axes: H query heads, K key/value heads, G = H/K, F frequencies, S slots, E = 2 K D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from internvideo3.model.conversion.statistics import LayerStatistics


@dataclass(frozen=True, kw_only=True)
class SlotRule:
    """How slots are found."""

    mixing: str = "complex"
    """"complex": any unitary mixing of the heads within a frequency; "real": orthogonal; "mean":
    the heads' discrete Fourier transform, so that the last component is their mean."""
    importance: bool = True
    """Whether components count by what the loss loses, or by their energy."""
    per_frequency: bool = False
    """Whether every frequency gets one slot first, as the released layout needs."""
    token_weights: bool = True
    """Whether tokens count by their loss gradient."""


@dataclass(frozen=True)
class RotarySlots:
    """Shared rotary keys of one layer: `k'_s = Σ_h write_{s,h} k_{h,f(s)}`."""

    frequencies: list[int]
    """f(s)."""
    write_SK: Tensor
    """Complex."""
    rebuild_SK: Tensor
    """Complex p: `k_h ≈ Σ_s p_{s,h} k'_s` within a frequency."""
    energy_kept: float
    """Share of the importance Σ λ that the chosen slots carry."""


def positional_gain(stats: LayerStatistics) -> Tensor:
    """Best constant in place of e^{-iθΔ}, [H, F].

    `g_{a,f} = Σ_Δ om_a(Δ) e^{-iθ_f Δ} / Σ_Δ om_a(Δ)`, where om_a(Δ) is Σ (dLoss/dscore)² over the
    pairs at distance Δ. Near 1 for slow frequencies; near 0 for fast ones, where an unrotated key
    would only be noise.
    """
    return stats.gain_HF / stats.score_H.clamp_min(1e-300)[:, None]


def choose_slots(
    stats: LayerStatistics, gain_HF: Tensor, slots: int, rule: SlotRule | None = None
) -> RotarySlots:
    """The `slots` components whose rotation the loss would miss most.

    Weights `w_{h,f} = Σ_{a in group(h)} Σ om_a |q_{a,f}|² (1 − |g_{a,f}|²)`; eigenvectors u and
    eigenvalues λ of `diag(w)^{1/2} E[k kᴴ] diag(w)^{1/2}`; `write = uᴴ diag(w)^{1/2}`,
    `p = diag(w)^{-1/2} u`. The gain g of a rotation that nothing replaces counts as zero.
    """
    rule = rule or SlotRule()
    moment_FKK = _pair_moments(stats.second_moment(rule.token_weights), gain_HF.shape[1])
    if rule.mixing == "real":
        # RoRoPE's rotation: real and imaginary parts are samples of one real vector.
        moment_FKK = moment_FKK.real.to(moment_FKK.dtype)
    F, K = moment_FKK.shape[:2]
    w_FK = torch.ones(F, K, dtype=torch.float64, device=gain_HF.device)
    if rule.importance:
        lost_HF = stats.query_HF * (1 - gain_HF.abs().square()).clamp_min(0)
        w_FK = lost_HF.unflatten(0, (K, -1)).sum(1).T
        w_FK = w_FK.clamp_min(1e-6 * float(w_FK.mean()) + 1e-300)
    root_FK = w_FK.sqrt()
    weighted_FKK = root_FK[:, :, None] * moment_FKK * root_FK[:, None, :]
    if rule.mixing == "mean":
        values_FK, u_FKK = _fixed_components(weighted_FKK)
    else:
        values_FK, u_FKK = torch.linalg.eigh(weighted_FKK)
    ranked_FK = values_FK.clone()
    if rule.per_frequency:
        # The last component of each frequency (the largest, or the mean) before all others.
        ranked_FK[:, -1] += values_FK.sum()
    chosen = ranked_FK.flatten().argsort(descending=True)[:slots].sort().values
    freq_S, component_S = chosen // K, chosen % K
    u_SK = u_FKK[freq_S, :, component_S]
    return RotarySlots(
        frequencies=freq_S.tolist(),
        write_SK=u_SK.conj() * root_FK[freq_S],
        rebuild_SK=u_SK / root_FK[freq_S],
        energy_kept=float(values_FK.flatten()[chosen].sum() / values_FK.sum()),
    )


def _fixed_components(moment_FKK: Tensor) -> tuple[Tensor, Tensor]:
    """Energies and vectors of the heads' Fourier components, their mean last."""
    F, K = moment_FKK.shape[:2]
    index_K = torch.arange(K, dtype=torch.float64, device=moment_FKK.device)
    angle_KK = 2 * torch.pi / K * index_K[:, None] * index_K.flip(0)
    u_FKK = torch.polar(torch.full_like(angle_KK, K**-0.5), angle_KK).expand(F, K, K)
    return (u_FKK.mH @ moment_FKK @ u_FKK).diagonal(dim1=1, dim2=2).real, u_FKK


def _pair_moments(moment_EE: Tensor, frequencies: int) -> Tensor:
    """Complex `E[k_{h,f} conj(k_{g,f})]`, [F, K, K]."""
    F, keys = frequencies, len(moment_EE) // 2
    K = keys // (2 * F)
    blocks = moment_EE[:keys, :keys].view(K, 2, F, K, 2, F)
    same = blocks.diagonal(dim1=2, dim2=5)  # [K, 2, K, 2, F]
    real = same[:, 0, :, 0] + same[:, 1, :, 1]
    imag = same[:, 1, :, 0] - same[:, 0, :, 1]
    return torch.complex(real, imag).permute(2, 0, 1)


@dataclass(frozen=True)
class PairGeometry:
    """How the keys of one layer lie in their rotary planes (Figure 3, right); per frequency."""

    flatness_F: list[float]
    """Minor over major axis of the keys' scatter in their plane, averaged over heads by energy.

    The figure's caption says "2D geometric flatness" and no more. Taken here: the plane of a pair
    is what RoPE turns; keys that fill it evenly (1) have no preferred direction that averaging
    over positions could keep, keys on a line (0) do. It is the ratio √(λ₂/λ₁) of the 2 x 2
    covariance of (k[f], k[f + F]), means left in, since rotation acts on the mean as well.
    """
    alignment_F: list[float]
    """Share of key energy in the first complex direction of the heads: 1 if one shared rotary pair
    carries every head exactly, 1/K if the heads have nothing in common."""


def pair_geometry(stats: LayerStatistics) -> PairGeometry:
    """Flatness and alignment from the unweighted second moments."""
    moment_EE = stats.second_moment(weighted=False)
    F, K = stats.gain_HF.shape[1], stats.kv_heads
    values_FK = torch.linalg.eigvalsh(_pair_moments(moment_EE, F)).clamp_min(0)
    keys = K * 2 * F
    blocks = moment_EE[:keys, :keys].view(K, 2, F, K, 2, F)
    own = blocks.diagonal(dim1=0, dim2=3).diagonal(dim1=1, dim2=3)  # [2, 2, K, F]
    axes_KF2 = torch.linalg.eigvalsh(own.permute(2, 3, 0, 1)).clamp_min(0)
    energy_KF = axes_KF2.sum(-1)
    ratio_KF = (axes_KF2[..., 0] / axes_KF2[..., 1].clamp_min(1e-300)).sqrt()
    flatness_F = (energy_KF * ratio_KF).sum(0) / energy_KF.sum(0).clamp_min(1e-300)
    alignment_F = values_FK[:, -1] / values_FK.sum(1).clamp_min(1e-300)
    return PairGeometry(flatness_F.tolist(), alignment_F.tolist())


def residual_map(slots: RotarySlots, kv_heads: int, head_dim: int) -> Tensor:
    """Real matrix [E, E] that takes z = [k; v] to [k − Σ_s p_s k'_s; v]."""
    F = head_dim // 2
    device = slots.write_SK.device
    kept_FKK = torch.zeros(F, kv_heads, kv_heads, dtype=torch.complex128, device=device)
    outer = slots.rebuild_SK[:, :, None] * slots.write_SK[:, None, :]
    kept_FKK.index_add_(0, torch.tensor(slots.frequencies, dtype=torch.long, device=device), outer)
    left_FKK = torch.eye(kv_heads, device=device) - kept_FKK
    block = torch.zeros(kv_heads, 2, F, kv_heads, 2, F, dtype=torch.float64, device=device)
    for f in range(F):
        block[:, 0, f, :, 0, f] = left_FKK[f].real
        block[:, 0, f, :, 1, f] = -left_FKK[f].imag
        block[:, 1, f, :, 0, f] = left_FKK[f].imag
        block[:, 1, f, :, 1, f] = left_FKK[f].real
    keys = kv_heads * head_dim
    residual = torch.eye(2 * keys, dtype=torch.float64, device=device)
    residual[:keys, :keys] = block.reshape(keys, keys)
    return residual
