"""GQA Qwen3-VL to M²LA: the order of the steps, and what they report.

1. `statistics.collect`: one forward and backward pass over the calibration batches;
2. per layer `rotary` (slots and gain), `lowrank` (latent), `adapters` (modalities); the number of
   rotary slots and the use of adapters are chosen by `divergence` from the source;
3. `refit`: output projections, on the source's layer inputs.

Keys are normalised (QK-norm) before they are compressed, so the norm stays exact: what is cached
need not be linear in the layer input (paper section 3.2.3 puts a constant in place of the norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextAttention

from internvideo3.model.attention import LatentAttention
from internvideo3.model.config import InternVideo3Config
from internvideo3.model.conversion.adapters import Adapter, fit_adapter
from internvideo3.model.conversion.divergence import Reference
from internvideo3.model.conversion.lowrank import LowRank, factorise, weigh_metric
from internvideo3.model.conversion.options import PRESETS, ConversionOptions, key_width
from internvideo3.model.conversion.refit import refit_outputs
from internvideo3.model.conversion.rotary import (
    RotarySlots,
    choose_slots,
    positional_gain,
    residual_map,
)
from internvideo3.model.conversion.statistics import (
    Batch,
    LayerStatistics,
    collect,
    text_config,
)
from internvideo3.model.modeling import InternVideo3ForConditionalGeneration


@dataclass(frozen=True)
class LayerReport:
    """What the conversion of one layer kept."""

    layer: int
    rank: int
    rope_slots: int
    rotary_energy: float
    """Share of the rotary importance that the slots carry."""
    latent_energy: float
    """Share of the weighted energy of [k_rest; v] within the rank."""
    adapter_gain: float
    """Share of the latent's calibrated error that modality adapters save; 0 without adapters."""
    output_error: float | None
    """Share of the attention output's error left after the refit; None without a refit."""


@dataclass(frozen=True)
class Conversion:
    """A converted model and how it came about."""

    model: InternVideo3ForConditionalGeneration
    layers: list[LayerReport]
    cache_share: float
    """Cached numbers per token over the source's."""
    divergence: float
    """Mean KL(source || converted) per supervised calibration token, in nats."""


@dataclass(frozen=True)
class _LayerPlan:
    stats: LayerStatistics
    gain_HF: Tensor
    slots: RotarySlots
    low: LowRank
    adapters: list[Adapter]


def convert(
    model: Qwen3VLForConditionalGeneration,
    calibration: Sequence[Batch],
    options: ConversionOptions | str = "half",
) -> InternVideo3ForConditionalGeneration:
    """Converts a GQA Qwen3-VL to M²LA; see `convert_with_report`."""
    return convert_with_report(model, calibration, options).model


def convert_with_report(
    model: Qwen3VLForConditionalGeneration,
    calibration: Sequence[Batch],
    options: ConversionOptions | str = "half",
) -> Conversion:
    """Converts a GQA Qwen3-VL to M²LA on calibration batches.

    Args:
        model: the source; it is not changed.
        calibration: dicts of model inputs (as the processor returns them). Sequences must begin at
            their true start, since the first token is an attention sink.
        options: options, or the name of a preset ("half", "full").

    Raises:
        ValueError: the model is not a GQA Qwen3-VL, a preset is unknown, or there is no batch.
    """
    options = _options(model, options)
    training = model.training
    model.eval()
    try:
        stats = collect(model, calibration, seed=options.seed, token_floor=options.token_floor)
        job = _Job(model, calibration, options, stats, Reference.of(model, calibration))
        slots = job.best_slots()
        built = job.with_best_adapters(slots)
    finally:
        model.train(training)
    return built.conversion(options, 2 * key_width(text_config(model)), training)


@dataclass(frozen=True)
class _Built:
    """One candidate."""

    model: InternVideo3ForConditionalGeneration
    plans: list[_LayerPlan]
    output_errors: Sequence[float | None]
    divergence: float

    def conversion(
        self, options: ConversionOptions, source_width: int, training: bool
    ) -> Conversion:
        """The candidate as the result."""
        pairs = zip(self.plans, self.output_errors, strict=True)
        reports = [_report(index, plan, left) for index, (plan, left) in enumerate(pairs)]
        share = options.row_width / source_width
        return Conversion(self.model.train(training), reports, share, self.divergence)


@dataclass(frozen=True)
class _Job:
    """What all candidates share."""

    source: Qwen3VLForConditionalGeneration
    calibration: Sequence[Batch]
    options: ConversionOptions
    stats: list[LayerStatistics]
    reference: Reference

    def best_slots(self) -> int:
        """Number of rotary slots with the least divergence, before any refit."""
        choices = self.options.slot_choices()
        if len(choices) == 1:
            return choices[0]
        return min(choices, key=lambda slots: self.build(slots, False, False).divergence)

    def with_best_adapters(self, slots: int) -> _Built:
        """The converted model, with adapters if they are wanted or lower the divergence."""
        tried = (False, True) if self.options.adapters is None else (self.options.adapters,)
        built = [self.build(slots, adapters, self.options.refit_output) for adapters in tried]
        return min(built, key=lambda candidate: candidate.divergence)

    def build(self, slots: int, adapters: bool, refit: bool) -> _Built:
        """One candidate."""
        plans = [_plan(layer, self.options, slots, adapters) for layer in self.stats]
        converted = _empty_model(self.source, plans, adapters)
        layers = [layer.self_attn for layer in converted.model.language_model.layers]
        with torch.no_grad():
            for layer, plan, source in zip(layers, plans, _attentions(self.source), strict=True):
                _fill(layer, plan, source)
        left: Sequence[float | None] = [None] * len(layers)
        if refit:
            left = refit_outputs(self.source, layers, self.calibration, self.options.refit_ridge)
        converted.train(False)
        return _Built(converted, plans, left, self.reference.divergence(converted))


def _options(
    model: Qwen3VLForConditionalGeneration, options: ConversionOptions | str
) -> ConversionOptions:
    if not all(isinstance(a, Qwen3VLTextAttention) for a in _attentions(model)):
        raise ValueError(
            f"{type(model).__name__} has no grouped-query attention to convert; "
            "give a Qwen3VLForConditionalGeneration."
        )
    if isinstance(options, str):
        if options not in PRESETS:
            raise ValueError(f"no preset {options!r}; choose one of {', '.join(PRESETS)}.")
        options = PRESETS[options](text_config(model))
    return options


def _attentions(model: Qwen3VLForConditionalGeneration) -> list[Qwen3VLTextAttention]:
    return [layer.self_attn for layer in model.model.language_model.layers]


def _plan(
    stats: LayerStatistics, options: ConversionOptions, slot_count: int, use_adapters: bool
) -> _LayerPlan:
    gain_HF = positional_gain(stats)
    slots = choose_slots(stats, gain_HF, slot_count)
    F = gain_HF.shape[1]
    residual_EE = residual_map(slots, slots.write_SK.shape[1], 2 * F)
    metric_EE = weigh_metric(stats.fisher_MEE.sum(0), gain_HF, options.metric_ridge)
    covariance_EE = stats.covariance(stats.mean())
    low = factorise(covariance_EE, metric_EE, residual_EE, options.latent_rank(slot_count))
    adapters: list[Adapter] = []
    if use_adapters:
        adapters = [fit_adapter(stats, low, gain_HF, options.metric_ridge, t) for t in (0, 1)]
    return _LayerPlan(stats, gain_HF, slots, low, adapters)


def _empty_model(
    source: Qwen3VLForConditionalGeneration, plans: list[_LayerPlan], use_adapters: bool
) -> InternVideo3ForConditionalGeneration:
    """The M²LA architecture with everything outside the new attention parts copied."""
    config = source.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        config.pop(name, None)
        config["text_config"].pop(name, None)
    config["text_config"] |= {
        "latent_rank": len(plans[0].low.encoder_RE),
        "rope_slots": len(plans[0].slots.frequencies),
        "rope_slot_frequencies": [plan.slots.frequencies for plan in plans],
        "modality_adapters": use_adapters,
    }
    converted: InternVideo3ForConditionalGeneration
    converted = InternVideo3ForConditionalGeneration._from_config(  # type: ignore[no-untyped-call]
        InternVideo3Config(**config), dtype=source.dtype
    ).to(source.device)
    converted.load_state_dict(source.state_dict(), strict=False)
    converted.generation_config = source.generation_config
    return converted


def _fill(layer: LatentAttention, plan: _LayerPlan, source: Qwen3VLTextAttention) -> None:
    """Writes one layer's plan into its parameters."""
    K, D, G = layer.num_kv_heads, layer.head_dim, layer.num_heads // layer.num_kv_heads
    mean_E = plan.stats.mean()
    encoder_RE, decoder_ER = plan.low.encoder_RE, plan.low.decoder_ER
    layer.latent_proj.weight.copy_(encoder_RE)
    layer.latent_proj.bias.copy_(-encoder_RE @ mean_E)
    layer.k_up.copy_(decoder_ER[: K * D].view(K, D, -1))
    layer.v_up.copy_(decoder_ER[K * D :].view(K, D, -1))
    layer.rope_write.copy_(torch.view_as_real(plan.slots.write_SK).permute(2, 0, 1))
    read_SH = plan.slots.rebuild_SK.conj().repeat_interleave(G, dim=1)
    layer.rope_read.copy_(torch.view_as_real(read_SH.resolve_conj()).permute(2, 0, 1))
    gain_HF = plan.gain_HF.conj().resolve_conj()
    layer.nope_gain.copy_(torch.view_as_real(gain_HF).permute(2, 0, 1))
    value_mean = mean_E[K * D :].view(K, 1, D).expand(-1, G, -1).reshape(-1)
    bias = source.o_proj.weight.double() @ value_mean
    if source.o_proj.bias is not None:
        bias = bias + source.o_proj.bias.double()
    layer.o_proj.bias.copy_(bias)
    if layer.config.modality_adapters:
        for modality, adapter in enumerate(plan.adapters):
            layer.adapter_weight[modality].copy_(adapter.weight_RR)
            layer.adapter_bias[modality].copy_(adapter.bias_R)


def _report(index: int, plan: _LayerPlan, left: float | None) -> LayerReport:
    before = sum(a.error_before for a in plan.adapters)
    after = sum(a.error_after for a in plan.adapters)
    return LayerReport(
        layer=index,
        rank=len(plan.low.encoder_RE),
        rope_slots=len(plan.slots.frequencies),
        rotary_energy=plan.slots.energy_kept,
        latent_energy=plan.low.energy_kept,
        adapter_gain=1 - after / before if before > 0 else 0.0,
        output_error=left,
    )
