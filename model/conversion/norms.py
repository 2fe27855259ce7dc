"""A linear map in place of head-wise QK-norm (Global-Norm-Linear, paper section 3.2.3).

    RMSNorm(x_h) = γ ⊙ x_h / σ(x_h) ≈ γ ⊙ x_h / μ          (equations 6 and 7)

with σ the root mean square of a head and μ its mean over calibration tokens. The paper validates
the approximation and then uses "a learned linear substitute"; what is learned here is an affine map
per head, `x̂_h ≈ A_h x_h + b_h`, by weighted least squares. Both fold into the projection.

Errors of all layers add up and the logit scale is large, so a high R² per layer is not yet a good
model: on Gemma-3-270M eq. 7 multiplies perplexity by tens. The report says what it costs.

Axes: N tokens, h heads, D head width, X model width.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from internvideo3.model.conversion.source import Projections

FITS = ("constant", "affine")
RIDGE = 1e-4
"""Added to the normal equations, in units of their mean diagonal."""

SINK_SHARE = 0.3
"""Weight of first tokens together, in units of all other tokens': attention looks at them most."""

UNSAFE_CV = 0.1
"""Coefficient of variation from which eq. 7 explains less than 99 % of a head."""


@dataclass(frozen=True)
class Concentration:
    """How concentrated one layer's norms are (Figure 3, left); first tokens are left out."""

    key_cv: list[float]
    """Coefficient of variation of σ, per key/value head."""
    query_cv: list[float]
    key_r2: list[float]
    """R² of the linear substitute on normalised keys (uncentred), per head."""
    query_r2: list[float]
    key_r2_constant: list[float]
    """R² of eq. 7's constant."""
    query_r2_constant: list[float]


@dataclass(frozen=True)
class LinearHeads:
    """An affine map per head."""

    weight_hDD: Tensor
    bias_hD: Tensor

    def fold(self, projection: Any) -> tuple[Tensor, Tensor]:
        """Weight [h D, X] and bias [h D] of the projection followed by the map, float64."""
        h, D, _ = self.weight_hDD.shape
        weight = projection.weight.double().unflatten(0, (h, D))
        bias = self.bias_hD
        if projection.bias is not None:
            own_hD = projection.bias.double().view(h, D)
            bias = bias + (self.weight_hDD @ own_hD[..., None])[..., 0]
        return (self.weight_hDD @ weight).flatten(0, 1), bias.flatten()


@dataclass(frozen=True)
class LinearNorm:
    """Projections without norms, and how well they do."""

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    concentration: Concentration

    @classmethod
    def load(cls, file: Path, device: torch.device) -> LinearNorm:
        """Reads what `save` wrote."""
        with safe_open(file, framework="pt", device=str(device)) as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            words = stored.metadata()["concentration"]
        return cls(**found, concentration=Concentration(**json.loads(words)))

    def save(self, file: Path) -> None:
        """Writes a file that exists only when it is whole."""
        partial = file.with_suffix(".partial")
        names = ("q_weight", "q_bias", "k_weight", "k_bias")
        tensors = {name: getattr(self, name).contiguous() for name in names}
        words = json.dumps(asdict(self.concentration))
        save_file(tensors, partial, metadata={"concentration": words})
        partial.rename(file)

    def projections(self, attention: Any) -> Projections:
        """The layer's projections with the substitute folded in."""
        kind = attention.q_proj.weight.dtype

        def linear(weight: Tensor, bias: Tensor) -> Any:
            return lambda x: functional.linear(x, weight.to(kind), bias.to(kind))

        same = nn.Identity()
        q, k = linear(self.q_weight, self.q_bias), linear(self.k_weight, self.k_bias)
        return Projections(q, k, attention.v_proj, same, same, attention.head_dim)


@torch.no_grad()
def linear_norm(attention: Any, inputs: Iterable[tuple[Tensor, Tensor]], fit: str) -> LinearNorm:
    """Fits the substitute of one layer on its inputs.

    Args:
        attention: the source's layer, with `q_norm` and `k_norm`.
        inputs: per batch the layer's input [B, T, X], and which tokens are no padding [B, T].
        fit: "constant" (eq. 7) or "affine" (learned).

    Raises:
        ValueError: no such fit.
    """
    if fit not in FITS:
        raise ValueError(f"no fit {fit!r} of the norm; choose one of {', '.join(FITS)}.")
    sums: dict[str, _HeadSums] = {}
    for x_BTX, valid_BT in inputs:
        first_BT = valid_BT & (valid_BT.cumsum(1) == 1)
        for name in ("q", "k"):
            projection = getattr(attention, f"{name}_proj")
            raw = projection(x_BTX).unflatten(-1, (-1, attention.head_dim))
            normed = getattr(attention, f"{name}_norm")(raw)
            own = sums.setdefault(name, _HeadSums.zeros(raw.shape[2], raw.shape[3], raw.device))
            own.add(raw, normed, first_BT, valid_BT)
    q, k = sums["q"], sums["k"]
    gain = {name: _gain(getattr(attention, f"{name}_norm"), attention) for name in ("q", "k")}
    constant = {"q": q.constant(gain["q"]), "k": k.constant(gain["k"])}
    chosen = constant if fit == "constant" else {"q": q.affine(), "k": k.affine()}
    found = Concentration(
        k.cv(),
        q.cv(),
        k.r2(chosen["k"]),
        q.r2(chosen["q"]),
        k.r2(constant["k"]),
        q.r2(constant["q"]),
    )
    q_weight, q_bias = chosen["q"].fold(attention.q_proj)
    k_weight, k_bias = chosen["k"].fold(attention.k_proj)
    return LinearNorm(q_weight, q_bias, k_weight, k_bias, found)


def _gain(norm: Any, attention: Any) -> Tensor:
    """γ, whether the module keeps γ or, as Gemma's, γ − 1: the norm of ones, whose rms is 1."""
    weight = attention.q_proj.weight
    ones = torch.ones(attention.head_dim, dtype=weight.dtype, device=weight.device)
    gain: Tensor = norm(ones)
    return gain.double()


@dataclass
class _HeadSums:
    """Sums of [x; 1] and x̂ over tokens per head, float64; index 0: first tokens, 1: the rest."""

    gram_2hEE: Tensor
    cross_2hED: Tensor
    energy_2h: Tensor
    """Σ |x̂|²."""
    rms_2h: Tensor
    """Σ σ."""
    count_2: Tensor

    @classmethod
    def zeros(cls, h: int, D: int, device: torch.device) -> _HeadSums:
        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            empty(2, h, D + 1, D + 1),
            empty(2, h, D + 1, D),
            empty(2, h),
            empty(2, h),
            empty(2),
        )

    def add(self, raw: Tensor, normed: Tensor, first_BT: Tensor, valid_BT: Tensor) -> None:
        for kind, chosen in enumerate((first_BT, valid_BT & ~first_BT)):
            x_hND = raw[chosen].double().transpose(0, 1)
            y_hND = normed[chosen].double().transpose(0, 1)
            x1_hNE = functional.pad(x_hND, (0, 1), value=1.0)
            self.gram_2hEE[kind] += x1_hNE.mT @ x1_hNE
            self.cross_2hED[kind] += x1_hNE.mT @ y_hND
            self.energy_2h[kind] += y_hND.square().sum((1, 2))
            self.rms_2h[kind] += x_hND.square().mean(-1).sqrt().sum(-1)
            self.count_2[kind] += x_hND.shape[1]

    def cv(self) -> list[float]:
        """std(σ)/mean(σ); E[σ²] is the mean of the Gram matrix' diagonal."""
        mean_h = self.rms_2h[1] / self.count_2[1]
        D = self.cross_2hED.shape[-1]
        square_h = self.gram_2hEE[1, :, :D, :D].diagonal(dim1=1, dim2=2).mean(-1) / self.count_2[1]
        return ((square_h - mean_h**2).clamp_min(0).sqrt() / mean_h).tolist()

    def constant(self, gain_D: Tensor) -> LinearHeads:
        """Eq. 7: γ/μ."""
        mean_h = self.rms_2h[1] / self.count_2[1]
        weight = torch.diag(gain_D)[None] / mean_h[:, None, None]
        return LinearHeads(weight, torch.zeros_like(weight[..., 0]))

    def affine(self) -> LinearHeads:
        """Weighted least squares per head."""
        weight = SINK_SHARE * self.count_2[1] / self.count_2[0].clamp_min(1)
        gram = self.gram_2hEE[1] + weight * self.gram_2hEE[0]
        cross = self.cross_2hED[1] + weight * self.cross_2hED[0]
        mean_h11 = gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        found_hED = torch.linalg.solve(gram + RIDGE * mean_h11 * eye, cross)
        return LinearHeads(found_hED[:, :-1].mT.contiguous(), found_hED[:, -1].contiguous())

    def r2(self, heads: LinearHeads) -> list[float]:
        """1 − |x̂ − A x − b|² / |x̂|² over all tokens but the first."""
        map_hED = torch.cat([heads.weight_hDD.mT, heads.bias_hD[:, None]], dim=1)
        gram, cross = self.gram_2hEE[1], self.cross_2hED[1]
        quadratic = (map_hED * (gram @ map_hED)).sum((1, 2))
        error_h = self.energy_2h[1] - 2 * (map_hED * cross).sum((1, 2)) + quadratic
        return (1 - error_h / self.energy_2h[1]).tolist()
