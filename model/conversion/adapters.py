"""Modality adapters `c -> M_t c + δ_t` in closed form (paper section 3.2.1, last paragraph).

Given encoder A and decoder B, and for modality t its covariance C_t, mean μ_t and metric G_t, the
map that minimises the weighted error of `B (M c + δ)` against R (z − μ) is the regression

    P_t = (Bᵀ G_t B)⁻¹ Bᵀ G_t
    M_t = P_t R C_t Aᵀ (A C_t Aᵀ)⁻¹,    δ_t = P_t R (μ_t − μ) − M_t A (μ_t − μ).

With one metric for all modalities M_t is the identity: A is already optimal for it. What an adapter
can gain is what the metrics differ in; whether it helps the model is measured, not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from internvideo3.model.conversion.lowrank import LowRank, weigh_metric
from internvideo3.model.conversion.statistics import LayerStatistics


@dataclass(frozen=True)
class Adapter:
    """Affine map of one modality on the latent, and the errors it was judged by."""

    weight_RR: Tensor
    bias_R: Tensor
    error_before: float
    error_after: float


def fit_adapter(
    stats: LayerStatistics, low: LowRank, gain_HF: Tensor, ridge: float, modality: int
) -> Adapter:
    """Optimal adapter of one modality; the identity where the modality was not seen."""
    rank = len(low.encoder_RE)
    A, B, R = low.encoder_RE, low.decoder_ER, low.residual_RE
    eye = torch.eye(rank, dtype=A.dtype, device=A.device)
    none = torch.zeros(rank, dtype=A.dtype, device=A.device)
    if float(stats.weight_M[modality]) == 0.0:
        return Adapter(eye, none, 0.0, 0.0)
    mu = stats.mean()
    metric = weigh_metric(stats.fisher_MEE[modality], gain_HF, ridge)
    offset = stats.first_ME[modality] / stats.weight_M[modality] - mu
    centred = stats.covariance(mu + offset, modality)
    project = torch.linalg.solve(B.T @ metric @ B, B.T @ metric)
    seen = A @ centred @ A.T
    seen = seen + 1e-6 * seen.diagonal().mean() * eye
    weight = torch.linalg.solve(seen, A @ centred @ R.T @ project.T).T
    bias = project @ R @ offset - weight @ A @ offset
    about_mean = centred + torch.outer(offset, offset)

    def error(weight: Tensor, bias: Tensor) -> float:
        left = R - B @ weight @ A
        shift = B @ bias
        cross = torch.outer(left @ offset, shift)
        moment = left @ about_mean @ left.T - cross - cross.T + torch.outer(shift, shift)
        return float((metric * moment).sum())

    share = float(stats.weight_M[modality] / stats.weight_M.sum())
    return Adapter(weight, bias, share * error(eye, none), share * error(weight, bias))
