"""From one layer's statistics to its converted attention.

The order: norm (`norms`), rotary slots and gain (`rotary`), latent (`lowrank`), adapters
(`adapters`). A plan is made at full rank and cut, since ranks may depend on all layers' energies
(`budget`).

Axes: K key/value heads, H query heads, D head width, F = D/2, S slots, E = 2 K D, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from internvideo3.model.attention import LatentAttention, RowAttention
from internvideo3.model.config import InternVideo3TextConfig
from internvideo3.model.conversion.adapters import Adapter, fit_adapter
from internvideo3.model.conversion.lowrank import (
    LowRank,
    balanced_metric,
    factorise,
    separated,
    weigh_metric,
)
from internvideo3.model.conversion.norms import LinearNorm
from internvideo3.model.conversion.options import ConversionOptions
from internvideo3.model.conversion.rotary import (
    RotarySlots,
    SlotRule,
    choose_slots,
    positional_gain,
    residual_map,
)
from internvideo3.model.conversion.statistics import LayerStatistics
from internvideo3.model.prerope import PreropeAttention


@dataclass(frozen=True)
class LayerPlan:
    """What one layer's parameters are made of."""

    mean_E: Tensor
    gain_HF: Tensor
    slots: RotarySlots
    low: LowRank
    adapters: list[Adapter]
    norm: LinearNorm | None

    def cut(self, rank: int, stats: LayerStatistics, options: ConversionOptions) -> LayerPlan:
        """The plan at a rank, with adapters if `options.adapters`."""
        low = self.low.truncated(rank)
        adapters: list[Adapter] = []
        if options.adapters:
            ridge = options.metric_ridge
            adapters = [fit_adapter(stats, low, self.gain_HF, ridge, t) for t in (0, 1)]
        return replace(self, low=low, adapters=adapters)


def plan_layer(
    stats: LayerStatistics, options: ConversionOptions, slot_count: int, norm: LinearNorm | None
) -> LayerPlan:
    """The plan of one layer at full rank, without adapters."""
    measured_HF = positional_gain(stats)
    kept = options.gain and options.row_form != "prerope"
    gain_HF = measured_HF if kept else torch.ones_like(measured_HF)
    rule = SlotRule(
        mixing=options.mixing,
        importance=options.importance,
        per_frequency=options.row_form == "released" or not options.importance,
        token_weights=options.token_weights,
    )
    # Without a gain nothing of a lost rotation is replaced: every component counts in full.
    replaced_HF = gain_HF if kept else torch.zeros_like(gain_HF)
    slots = choose_slots(stats, replaced_HF, slot_count, rule)
    residual_EE = residual_map(slots, stats.kv_heads, 2 * gain_HF.shape[1])
    mean_E = stats.mean() if options.centred else torch.zeros_like(stats.mean())
    covariance_EE = stats.covariance(mean_E, weighted=options.token_weights)
    if options.metric == "fisher":
        metric_EE = weigh_metric(stats.fisher_MEE.sum(0), gain_HF, options.metric_ridge)
    else:
        metric_EE = balanced_metric(covariance_EE, residual_EE)
    if not options.joint:
        covariance_EE, metric_EE = separated(covariance_EE), separated(metric_EE)
    low = factorise(covariance_EE, metric_EE, residual_EE, len(mean_E))
    return LayerPlan(mean_E, gain_HF, slots, low, [], norm)


@torch.no_grad()
def build_layer(
    plan: LayerPlan, config: InternVideo3TextConfig, layer: int, attention: Any
) -> RowAttention:
    """The converted attention of one layer; projections that do not change are the source's own.

    Args:
        plan: at its rank.
        config: of the converted model, or of this layer alone (then `layer` is 0).
        layer: index into the configuration.
        attention: the source's attention layer.
    """
    kinds: dict[str, type[LatentAttention | PreropeAttention]] = {
        "latent": LatentAttention,
        "prerope": PreropeAttention,
    }
    weight = attention.o_proj.weight
    with torch.device(weight.device):
        built = kinds[config.row_form](config, layer).to(weight.dtype)
    _fill_projections(built, plan.norm, attention)
    _fill_latent(built, plan, attention)
    if isinstance(built, LatentAttention):
        _fill_rotary(built, plan)
    if config.modality_adapters:
        for modality, adapter in enumerate(plan.adapters):
            built.adapter_weight[modality].copy_(adapter.weight_RR)
            built.adapter_bias[modality].copy_(adapter.bias_R)
    _freeze(built, attention)
    return built.eval()


def _freeze(built: RowAttention, attention: Any) -> None:
    """Freezes what was made here; the source's own parameters stay as trainable as they were."""
    shared = {id(parameter) for parameter in attention.parameters()}
    for parameter in built.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)


def _fill_projections(
    built: LatentAttention | PreropeAttention, norm: LinearNorm | None, attention: Any
) -> None:
    if norm is None:
        built.q_proj, built.k_proj = attention.q_proj, attention.k_proj
        built.v_proj = attention.v_proj
        if not isinstance(built.q_norm, nn.Identity):
            built.q_norm, built.k_norm = attention.q_norm, attention.k_norm
        return
    built.q_proj.weight.copy_(norm.q_weight)
    built.q_proj.bias.copy_(norm.q_bias)
    built.k_proj.weight.copy_(norm.k_weight)
    built.k_proj.bias.copy_(norm.k_bias)
    built.v_proj.weight.copy_(attention.v_proj.weight)
    if attention.v_proj.bias is None:
        built.v_proj.bias.zero_()
    else:
        built.v_proj.bias.copy_(attention.v_proj.bias)


def _fill_latent(
    built: LatentAttention | PreropeAttention, plan: LayerPlan, attention: Any
) -> None:
    K, D = built.num_kv_heads, built.head_dim
    G = built.num_heads // K
    encoder_RE, decoder_ER = plan.low.encoder_RE, plan.low.decoder_ER
    built.latent_proj.weight.copy_(encoder_RE)
    built.latent_proj.bias.copy_(-encoder_RE @ plan.mean_E)
    built.k_up.copy_(decoder_ER[: K * D].view(K, D, -1))
    built.v_up.copy_(decoder_ER[K * D :].view(K, D, -1))
    if isinstance(built, PreropeAttention):
        # Before rotation the keys' mean is not the same for all tokens' scores; it is added back.
        built.k_bias.copy_(plan.mean_E[: K * D].view(K, D))
    value_mean = plan.mean_E[K * D :].view(K, 1, D).expand(-1, G, -1).reshape(-1)
    bias = attention.o_proj.weight.double() @ value_mean
    if attention.o_proj.bias is not None:
        bias = bias + attention.o_proj.bias.double()
    built.o_proj.weight.copy_(attention.o_proj.weight)
    built.o_proj.bias.copy_(bias)


def _fill_rotary(built: LatentAttention, plan: LayerPlan) -> None:
    G = built.num_heads // built.num_kv_heads
    built.rope_write.copy_(torch.view_as_real(plan.slots.write_SK).permute(2, 0, 1))
    read_SH = plan.slots.rebuild_SK.conj().repeat_interleave(G, dim=1)
    built.rope_read.copy_(torch.view_as_real(read_SH.resolve_conj()).permute(2, 0, 1))
    gain_HF = plan.gain_HF.conj().resolve_conj()
    built.nope_gain.copy_(torch.view_as_real(gain_HF).permute(2, 0, 1))
