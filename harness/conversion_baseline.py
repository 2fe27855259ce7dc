"""The baseline of `make conversion-report`: TransMLA's two steps, with its FreqFold.

1. Partial RoPE. Heads of a frequency are mixed by a real rotation, the principal components of the
   keys that the source makes; one component keeps its rotation, all others lose it. FreqFold takes
   M neighbouring frequencies for one: components are of the pairs of K heads and M frequencies
   together, and the first M of them keep the M angles. That is not exact, since the frequencies
   differ, but the components carry more; it has no meaning where neighbours have different axes
   (interleaved MRoPE).
2. Low rank. The calibration set is run through the model of step 1, whose layers see what that
   model makes of it. The latent is an uncentred PCA of its unrotated key components and its values,
   the former divided by the quotient of mean channel norms.

What TransMLA has not is not here: weights of tokens, a loss metric, means, gains, a refit, ranks by
layer. The calibration set, the row's width and the number of rotary slots are those of our own
rows. Facts are of the paper (arXiv 2502.07864) and of its code, `transmla/partial_rope.py`,
`lora_qkv.py` and `converter.py` of fxmeng/TransMLA@0cdde00; the code here is our own.

Axes: B batch, T tokens, N valid tokens, H query heads, K key/value heads, D head width, F = D/2,
E = 2 K D, g group of frequencies, M its frequencies, J = K M its pairs (and components, largest
first), c the components that are rotated (M of them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from internvideo3.model.attention import LatentAttention, RowAttention
from internvideo3.model.config import InternVideo3TextConfig
from internvideo3.model.conversion.convert import Built, Job
from internvideo3.model.conversion.converted import layer_config
from internvideo3.model.conversion.divergence import attending
from internvideo3.model.conversion.lowrank import factorise
from internvideo3.model.conversion.plan import LayerPlan, build_layer
from internvideo3.model.conversion.rotary import RotarySlots
from internvideo3.model.conversion.source import Projections, valid_tokens
from internvideo3.model.folding import Folded

FOLDS = (1, 2, 4, 8)
"""Numbers of neighbouring frequencies that are tried; 1 folds nothing."""


class FoldedRotation(LatentAttention):
    """Latent attention whose slots read several frequencies of all heads."""

    def __init__(self, config: InternVideo3TextConfig, mix_gcKM: Tensor) -> None:
        super().__init__(config, 0)
        self.mix_gcKM = mix_gcKM

    def rotary_key(self, k_BTKD: Tensor) -> Tensor:
        """Shared rotary key before rotation, [B, T, 2 F]."""
        groups = (len(self.mix_gcKM), -1)
        parts = (x.unflatten(-1, groups) for x in k_BTKD.chunk(2, dim=-1))
        mixed = (torch.einsum("btkgm,gckm->btgc", x, self.mix_gcKM).flatten(2) for x in parts)
        return torch.cat([*mixed], dim=-1)

    def slot_query(self, q_BTHD: Tensor) -> Tensor:
        """What meets the shared rotary key, before rotation, [B, T, H, 2 F]."""
        groups = (len(self.mix_gcKM), -1)
        mix_gcHM = self.mix_gcKM.repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)
        parts = (x.unflatten(-1, groups) for x in q_BTHD.chunk(2, dim=-1))
        mixed = (torch.einsum("bthgm,gchm->bthgc", x, mix_gcHM).flatten(3) for x in parts)
        return torch.cat([*mixed], dim=-1)

    def _folded(self) -> Folded | None:
        return None  # slots are made here, not by the parameters that are multiplied out


def baseline_layers(job: Job, built: Built, fold: int) -> list[RowAttention]:
    """All layers by the baseline.

    Args:
        job: any conversion of the source that is done, with one rotary slot for each frequency:
            its calibration set and the moments of the source's keys are used.
        built: what it made; the ranks are used.
        fold: frequencies in a group, M.

    Raises:
        ValueError: the frequencies cannot be parted into such groups.
    """
    text = job.source.text
    F, K = text.head_dim // 2, text.num_key_value_heads
    if F % fold:
        raise ValueError(f"{F} frequencies have no groups of {fold}; give a divisor.")
    layers = range(job.layer_count)
    components = [
        components_of(job.statistics(index).second_moment(weighted=False), K, F, fold)
        for index in layers
    ]
    partial = partial_rope(job, built, components)
    moments = moments_under(job, partial)
    return [
        _build(job, built, index, components[index], moments[index], built.shape.ranks[index])
        for index in layers
    ]


def partial_rope(job: Job, built: Built, components: Sequence[Tensor]) -> list[RowAttention]:
    """Step 1 alone: rotation is lost, and nothing is compressed."""
    text = job.source.text
    E = 2 * text.num_key_value_heads * text.head_dim
    whole = E - text.head_dim
    anything_EE = torch.eye(E, dtype=torch.float64)
    return [
        _build(job, built, index, components_gJKM, anything_EE, whole)
        for index, components_gJKM in enumerate(components)
    ]


def _build(
    job: Job, built: Built, index: int, components_gJKM: Tensor, moment_EE: Tensor, rank: int
) -> RowAttention:
    """One layer of a rank, for keys and values of this moment."""
    fold = components_gJKM.shape[-1]
    mix_gcKM = components_gJKM[:, :fold]
    residual_EE = folded_residual(mix_gcKM)
    balance_EE = torch.diag(balance(moment_EE, components_gJKM))
    shape = replace(built.shape.of_layer(index), ranks=[rank], vision_ranks=[rank])
    config = layer_config(job.source, shape)
    attention: Any = job.source.layers[index].self_attn
    F, K = config.head_dim // 2, components_gJKM.shape[2]
    nothing = torch.zeros(F, K, dtype=torch.complex128)
    plan = LayerPlan(
        mean_E=torch.zeros_like(moment_EE[0]),
        gain_HF=torch.ones(config.num_attention_heads, F, dtype=torch.complex128),
        slots=RotarySlots([*range(F)], nothing, nothing, 1.0),
        low=factorise(moment_EE, balance_EE, residual_EE, rank),
        adapters=[],
        norm=None,
    )
    plain = build_layer(plan, config, 0, attention)
    kind = attention.o_proj.weight.dtype
    made = FoldedRotation(config, mix_gcKM.to(kind)).to(kind)
    made.load_state_dict(plain.state_dict())
    return made.requires_grad_(False).eval()


@torch.no_grad()
def moments_under(job: Job, layers: Sequence[RowAttention]) -> list[Tensor]:
    """Mean of z zᵀ, z = [k; v], of each layer's calls when these layers stand in the source's."""
    source = job.source
    attentions = [layer.self_attn for layer in source.layers]
    sums: list[Tensor] = [torch.zeros((), dtype=torch.float64)] * len(layers)
    tokens = 0
    for batch in job.calibration:
        valid_BT = valid_tokens(batch).to(source.device)
        with attending(source, layers, batch), _inputs(layers) as inputs:
            source.hidden(batch)
        for index, x_BTX in enumerate(inputs):
            _, k, v = Projections.of(attentions[index])(x_BTX)
            z_NE = torch.cat([k, v], dim=1).transpose(1, 2).flatten(2)[valid_BT].double()
            sums[index] = sums[index] + z_NE.T @ z_NE
        tokens += int(valid_BT.sum())
    return [total / tokens for total in sums]


@contextmanager
def _inputs(layers: Sequence[RowAttention]) -> Iterator[list[Tensor]]:
    """The layers' inputs [B, T, X], in the order in which they are called."""
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, _args, kwargs: found.append(kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _group_moments(moment_EE: Tensor, kv_heads: int, frequencies: int, fold: int) -> Tensor:
    """Second moments of every group's pairs, real and imaginary parts apart, [g, 2, J, J]."""
    keys = 2 * kv_heads * frequencies
    groups = frequencies // fold
    blocks = moment_EE[:keys, :keys].view(
        kv_heads, 2, groups, fold, kv_heads, 2, groups, fold
    )  # K, part, g, M twice
    same = blocks.diagonal(dim1=2, dim2=6).diagonal(dim1=1, dim2=4)  # [K, M, K, M, g, part]
    pairs = kv_heads * fold
    return same.permute(4, 5, 0, 1, 2, 3).reshape(groups, 2, pairs, pairs)


def components_of(moment_EE: Tensor, kv_heads: int, frequencies: int, fold: int) -> Tensor:
    """Principal components of every group's pairs, largest first, orthonormal, [g, J, K, M].

    Real and imaginary parts are samples of one real vector, as the mixing is real.
    """
    moment_gJJ = _group_moments(moment_EE, kv_heads, frequencies, fold).sum(1)
    _, vectors_gJJ = torch.linalg.eigh(moment_gJJ)
    components: Tensor = vectors_gJJ.flip(-1).mT.unflatten(-1, (kv_heads, fold))
    return components


def balance(moment_EE: Tensor, components_gJKM: Tensor) -> Tensor:
    """Weights [E] of squared errors: keys by the quotient of mean channel norms, values by 1.

    Norms of keys are of the components that are not rotated. Those of values leave the first D
    channels out, as the code does with both.
    """
    _, _, K, M = components_gJKM.shape
    D = 2 * M * len(components_gJKM)
    u_gJJ = components_gJKM.flatten(2)
    apart_g2JJ = _group_moments(moment_EE, K, D // 2, M)
    energy_g2J = (u_gJJ[:, None] @ apart_g2JJ * u_gJJ[:, None]).sum(-1)
    of_keys = energy_g2J[..., M:].clamp_min(0).sqrt().mean()
    of_values = moment_EE.diagonal()[K * D + D :].sqrt().mean()
    weight_E = torch.ones_like(moment_EE[0])
    weight_E[: K * D] = (of_values / of_keys) ** 2
    return weight_E


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
