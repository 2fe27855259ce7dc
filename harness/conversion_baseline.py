"""The baseline of `make conversion-report`: TransMLA's choices, with its FreqFold.

TransMLA mixes the heads of a frequency by a real rotation and keeps one component for each
frequency. FreqFold takes M neighbouring frequencies for one: principal components are of the pairs
of K heads and M frequencies together, and the first M of them keep the M angles. That is not exact,
since the frequencies differ, but the components carry more; it has no meaning where neighbours have
different axes (interleaved MRoPE). The latent is an uncentred PCA of what is left, keys and values
brought to the same mean norm. Formulas: TransMLA (arXiv 2502.07864), its code at
MuLabPKU/TransMLA@cdd6f8e; the code here is our own.

Axes: B batch, T tokens, H query heads, K key/value heads, D head width, F = D/2, g group of
frequencies, M its frequencies, c its components (M of them), J = K M pairs of a group, S = F slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from internvideo3.model.attention import LatentAttention, RowAttention
from internvideo3.model.config import InternVideo3TextConfig
from internvideo3.model.conversion.lowrank import balanced_metric, factorise
from internvideo3.model.conversion.plan import LayerPlan, build_layer
from internvideo3.model.conversion.rotary import RotarySlots
from internvideo3.model.conversion.statistics import LayerStatistics
from internvideo3.model.folding import Folded

FOLDS = (1, 2, 4, 8)
"""Numbers of neighbouring frequencies that are tried; 1 folds nothing."""


class FoldedRotation(LatentAttention):
    """Latent attention whose slots read several frequencies of all heads."""

    def __init__(self, config: InternVideo3TextConfig, mix_gcKM: Tensor) -> None:
        super().__init__(config, 0)
        self.mix_gcKM = mix_gcKM

    def rotary_key(self, k_BTKD: Tensor) -> Tensor:
        """Shared rotary key before rotation, [B, T, 2 S]."""
        groups = (len(self.mix_gcKM), -1)
        parts = (x.unflatten(-1, groups) for x in k_BTKD.chunk(2, dim=-1))
        mixed = (torch.einsum("btkgm,gckm->btgc", x, self.mix_gcKM).flatten(2) for x in parts)
        return torch.cat([*mixed], dim=-1)

    def slot_query(self, q_BTHD: Tensor) -> Tensor:
        """What meets the shared rotary key, before rotation, [B, T, H, 2 S]."""
        groups = (len(self.mix_gcKM), -1)
        mix_gcHM = self.mix_gcKM.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
        parts = (x.unflatten(-1, groups) for x in q_BTHD.chunk(2, dim=-1))
        mixed = (torch.einsum("bthgm,gchm->bthgc", x, mix_gcHM).flatten(3) for x in parts)
        return torch.cat([*mixed], dim=-1)

    def _folded(self) -> Folded | None:
        return None  # slots are made here, not by the parameters that are multiplied out


def baseline_layer(
    stats: LayerStatistics, attention: Any, config: InternVideo3TextConfig, fold: int
) -> RowAttention:
    """One layer by the baseline.

    Args:
        stats: of the layer.
        attention: the source's layer.
        config: of this layer alone; one rotary slot for each frequency.
        fold: frequencies in a group, M.

    Raises:
        ValueError: the frequencies cannot be parted into such groups.
    """
    F, K = config.head_dim // 2, stats.kv_heads
    if F % fold:
        raise ValueError(f"{F} frequencies have no groups of {fold}; give a divisor.")
    moment_EE = stats.second_moment(weighted=False)
    mix_gcKM = folded_components(moment_EE, K, F, fold)
    residual_EE = folded_residual(mix_gcKM)
    metric_EE = balanced_metric(moment_EE, residual_EE)
    low = factorise(moment_EE, metric_EE, residual_EE, config.rank(0))
    nothing = torch.zeros(F, K, dtype=torch.complex128)
    gain_HF = torch.ones(config.num_attention_heads, F, dtype=torch.complex128)
    plan = LayerPlan(
        mean_E=torch.zeros_like(moment_EE[0]),
        gain_HF=gain_HF,
        slots=RotarySlots([*range(F)], nothing, nothing, 1.0),
        low=low,
        adapters=[],
        norm=None,
    )
    plain = build_layer(plan, config, 0, attention)
    kind = attention.o_proj.weight.dtype
    made = FoldedRotation(config, mix_gcKM.to(kind)).to(kind)
    made.load_state_dict(plain.state_dict())
    return made.requires_grad_(False).eval()


def folded_components(moment_EE: Tensor, kv_heads: int, frequencies: int, fold: int) -> Tensor:
    """First principal components of every group's pairs, largest first, orthonormal, [g, c, K, M].

    Real and imaginary parts are samples of one real vector, as the mixing is real.
    """
    keys = 2 * kv_heads * frequencies
    groups = frequencies // fold
    blocks = moment_EE[:keys, :keys].view(
        kv_heads, 2, groups, fold, kv_heads, 2, groups, fold
    )  # K, part, g, M twice
    same = blocks.diagonal(dim1=2, dim2=6).diagonal(dim1=1, dim2=4).sum(-1)  # [K, M, K, M, g]
    pairs = kv_heads * fold
    moment_gJJ = same.reshape(pairs, pairs, groups).permute(2, 0, 1)
    _, vectors_gJc = torch.linalg.eigh(moment_gJJ)
    largest_gcKM: Tensor = (
        vectors_gJc[..., -fold:].flip(-1).mT.unflatten(-1, (kv_heads, fold))
    )  # fmt: skip
    return largest_gcKM


def folded_residual(mix_gcKM: Tensor) -> Tensor:
    """Real matrix [E, E] that takes z = [k; v] to what the components leave of k, and v."""
    groups, _, kv_heads, fold = mix_gcKM.shape
    u_gcJ = mix_gcKM.flatten(2)
    kept_gJJ = u_gcJ.mT @ u_gcJ
    left_gJJ = torch.eye(kv_heads * fold, dtype=kept_gJJ.dtype) - kept_gJJ
    block = torch.zeros(
        kv_heads, 2, groups, fold, kv_heads, 2, groups, fold, dtype=left_gJJ.dtype
    )  # K, part, g, M twice
    for g in range(groups):
        left = left_gJJ[g].view(kv_heads, fold, kv_heads, fold)
        for part in (0, 1):
            block[:, part, g, :, :, part, g, :] = left
    keys = 2 * kv_heads * groups * fold
    residual = torch.eye(2 * keys, dtype=left_gJJ.dtype)
    residual[:keys, :keys] = block.reshape(keys, keys)
    return residual
