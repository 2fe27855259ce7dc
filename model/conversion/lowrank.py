"""Joint low-rank factorisation of what is left of the keys, and of the values.

With z = [k; v] of a token, R the residual map (keys without their rotary slots), C the weighted
covariance of z and G the metric, the rank-r pair that minimises `tr G (R − B A) C (R − B A)ᵀ` is

    G^{1/2} R C Rᵀ G^{1/2} = U diag(sv²) Uᵀ,    A = U_rᵀ G^{1/2} R,    B = G^{-1/2} U_r.

The latent is centred, `c = A (z − μ)`: the mean of the unrotated keys shifts all scores of a query
alike and is dropped, the mean of the values passes through attention unchanged (its weights sum to
one) and becomes an output bias.

Axes: H query heads, K key/value heads, F frequencies, D head width, E = 2 K D, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """Encoder A (with R folded in) and decoder B of one layer."""

    encoder_RE: Tensor
    decoder_ER: Tensor
    energy_kept: float
    """Share of Σ sv² within the rank."""
    energies_Q: Tensor
    """All sv², largest first."""
    residual_RE: Tensor
    """The residual map R that the encoder contains, [E, E]."""
    metric_EE: Tensor
    """G."""

    def truncated(self, rank: int) -> LowRank:
        """The best pair of a smaller rank; a rank above what there is gets empty coordinates."""
        extra = max(0, rank - len(self.encoder_RE))
        pad = torch.nn.functional.pad
        return replace(
            self,
            encoder_RE=pad(self.encoder_RE[:rank], (0, 0, 0, extra)),
            decoder_ER=pad(self.decoder_ER[:, :rank], (0, extra)),
            energy_kept=float(self.energies_Q[:rank].sum() / self.energies_Q.sum()),
        )


def weigh_metric(metric_EE: Tensor, gain_HF: Tensor, ridge: float) -> Tensor:
    """G with its key rows scaled by the positional gain (rms over a group's query heads).

    A component that the gain silences needs no rank.
    """
    H, F = gain_HF.shape
    K = metric_EE.shape[0] // (4 * F)
    rms_KF = gain_HF.abs().square().unflatten(0, (K, H // K)).mean(1).sqrt()
    keys = rms_KF[:, None].expand(-1, 2, -1).reshape(-1)
    scale_E = torch.cat([keys, torch.ones_like(keys)])
    scaled = scale_E[:, None] * metric_EE * scale_E
    mean = scaled.diagonal().mean()
    if float(mean) == 0.0:
        return torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
    # Not divided by the mean: energies stay in units of the loss and compare across layers.
    return scaled + ridge * mean * torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)


def balanced_metric(covariance_EE: Tensor, residual_EE: Tensor) -> Tensor:
    """TransMLA's balance: diagonal, keys divided by the ratio of mean channel norms K / V."""
    left = residual_EE @ covariance_EE @ residual_EE.T
    norm_E = left.diagonal().clamp_min(0).sqrt()
    keys, values = norm_E.chunk(2)
    # Where slots carry all of the keys, what is left is rounding: it must not be made large.
    least = 1e-6 * values.mean().clamp_min(1e-12)
    ratio = keys.mean().clamp_min(least) / values.mean().clamp_min(1e-12)
    return torch.diag(torch.cat([torch.ones_like(keys) / ratio**2, torch.ones_like(values)]))


def separated(matrix_EE: Tensor) -> Tensor:
    """The matrix without what ties keys to values."""
    keys = len(matrix_EE) // 2
    apart_EE = matrix_EE.clone()
    apart_EE[:keys, keys:] = 0
    apart_EE[keys:, :keys] = 0
    return apart_EE


def factorise(covariance_EE: Tensor, metric_EE: Tensor, residual_EE: Tensor, rank: int) -> LowRank:
    """Best rank-`rank` encoder and decoder (equation at the head of this file)."""
    values, vectors = torch.linalg.eigh(metric_EE)
    root_EE = (vectors * values.sqrt()) @ vectors.T
    inverse_root_EE = (vectors / values.sqrt()) @ vectors.T
    weighted_EE = root_EE @ residual_EE
    u_EQ, energies = _principal_directions(weighted_EE, covariance_EE)
    whole = LowRank(
        encoder_RE=u_EQ.T @ weighted_EE,
        decoder_ER=inverse_root_EE @ u_EQ,
        energy_kept=1.0,
        energies_Q=energies.clamp_min(0),
        residual_RE=residual_EE,
        metric_EE=metric_EE,
    )
    return whole.truncated(rank)


def _principal_directions(weighted_EE: Tensor, covariance_EE: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors [E, Q] and eigenvalues of `W C Wᵀ`, largest first, within the range of W.

    Staying within the range makes a sufficient rank exact: outside it the eigenvalues are zero, and
    rounding would mix those directions with ones that carry little.
    """
    basis_EE, singular, _ = torch.linalg.svd(weighted_EE)
    basis_EQ = basis_EE[:, singular > 1e-9 * singular[0]]
    inside = basis_EQ.T @ weighted_EE @ covariance_EE @ weighted_EE.T @ basis_EQ
    energies, vectors = torch.linalg.eigh(inside)
    return basis_EQ @ vectors.flip(1), energies.flip(0)
