"""GQA to M²LA: statistics against autograd, exactness at full rank, error falling with the rank.

Run: .venv/bin/python -m pytest tests/model/test_conversion.py -q
"""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from internvideo3.model.attention import RowAttention, break_even
from internvideo3.model.cache import LatentCache
from internvideo3.model.conversion.adapters import fit_adapter
from internvideo3.model.conversion.convert import Job, convert, convert_with_report
from internvideo3.model.conversion.converted import converted_model, save_converted
from internvideo3.model.conversion.divergence import Reference
from internvideo3.model.conversion.finished import FinishedLayers
from internvideo3.model.conversion.lowrank import factorise, weigh_metric
from internvideo3.model.conversion.norm_alone import uncompressed
from internvideo3.model.conversion.norms import linear_norm
from internvideo3.model.conversion.options import (
    PRESETS,
    ROPE_SHARES,
    VISION_SHARES,
    ConversionOptions,
    key_width,
)
from internvideo3.model.conversion.options import share as cache_share
from internvideo3.model.conversion.plan import plan_layer
from internvideo3.model.conversion.recording import LayerCall, record
from internvideo3.model.conversion.recovery import RecoveryError, Scale
from internvideo3.model.conversion.rotary import (
    SlotRule,
    choose_slots,
    positional_gain,
    residual_map,
)
from internvideo3.model.conversion.source import Projections, Source
from internvideo3.model.conversion.statistics import (
    LayerStatistics,
    _attention_gradients,
    collect,
)


def measured(
    model: Any, batches: Any, folder: Path, floor: float = 0.05
) -> tuple[list[LayerStatistics], list[list[LayerCall]]]:
    """Statistics and recorded calls of every layer."""
    seen = Source.of(model)
    recording = record(seen, batches, folder, seed=0)
    attentions = [layer.self_attn for layer in seen.layers]
    calls = [list(recording.calls(index)) for index in range(len(attentions))]
    sums = [
        collect(Projections.of(a), c, scale=a.scaling, token_floor=floor)
        for a, c in zip(attentions, calls, strict=True)
    ]
    return sums, calls


@pytest.fixture(scope="module")
def stats(
    source: Any, calibration: Any, tmp_path_factory: pytest.TempPathFactory
) -> list[LayerStatistics]:
    return measured(source, calibration, tmp_path_factory.mktemp("calls"))[0]


def error(source: Any, converted: Any, case: dict[str, Any]) -> float:
    return float((source(**case).logits - converted(**case).logits).square().mean())


def test_closed_form_gradients_are_autograds() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v, out_grad = draw(2, 2, 3, 5, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 4), draw(2, 2, 3, 5, 4)
    bias = torch.zeros(1, 1, 5, 5).masked_fill(~torch.ones(5, 5).tril().bool(), -1e30)
    with torch.enable_grad():
        k.requires_grad_(), v.requires_grad_()
        scores = 0.5 * q @ k[:, :, None].mT + bias[:, :, None]
        scores.retain_grad()
        ((scores.softmax(-1) @ v[:, :, None]) * out_grad).sum().backward()
    found = _attention_gradients(q, k.detach(), v.detach(), out_grad, bias, 0.5)
    for got, want in zip(found, (scores.grad, k.grad, v.grad), strict=True):
        assert float((got - want).abs().max()) <= 1e-12


def test_statistics_are_those_of_the_layers_calls(
    source: Any, calibration: Any, stats: list[LayerStatistics], tmp_path: Path
) -> None:
    alone, calls = measured(source, calibration[2:], tmp_path)
    projections = Projections.of(Source.of(source).layers[1].self_attn)
    _, k, v = projections(calls[1][0].x_BTX)
    z = torch.cat([k, v], dim=1).transpose(1, 2).flatten(2)[0].double()
    assert float((alone[1].mean() - z[1:].mean(0)).abs().max()) <= 1e-6
    # Text only: nothing for vision; the videos of the whole set do count.
    assert float(alone[1].weight_M[1]) == 0.0 < float(stats[1].weight_M[1])
    moments = stats[0].second_moment()
    assert float(torch.linalg.eigvalsh(moments)[0]) >= -1e-9 * float(moments.trace())


def test_gain_is_a_mean_of_unit_numbers(stats: list[LayerStatistics]) -> None:
    for layer in stats:
        assert float(positional_gain(layer).abs().max()) <= 1 + 1e-6


def test_all_slots_leave_no_key(stats: list[LayerStatistics]) -> None:
    gain_HF = positional_gain(stats[0])
    keys = len(stats[0].mean()) // 2
    slots = choose_slots(stats[0], gain_HF, keys // 2)
    kv_heads = slots.write_SK.shape[1]
    left = residual_map(slots, kv_heads, keys // kv_heads)
    assert float(left[:keys].abs().max()) <= 1e-9
    assert torch.equal(left[keys:, keys:], torch.eye(keys, dtype=left.dtype))
    assert slots.energy_kept == pytest.approx(1.0)


def test_heads_that_are_not_mixed_give_their_mean_first(stats: list[LayerStatistics]) -> None:
    gain_HF = positional_gain(stats[0])
    F = gain_HF.shape[1]
    rule = SlotRule(mixing="mean", importance=False, per_frequency=True)
    slots = choose_slots(stats[0], gain_HF, F, rule)
    kv_heads = slots.write_SK.shape[1]
    assert slots.frequencies == list(range(F))
    mean = torch.full_like(slots.write_SK, kv_heads**-0.5)
    assert torch.allclose(slots.write_SK, mean)


def test_keys_and_values_apart_have_directions_of_their_own(
    stats: list[LayerStatistics], source: Any
) -> None:
    options = cache_share(source.config.text_config, 0.5).with_(joint=False)
    encoder = plan_layer(stats[0], options, 8, None).low.encoder_RE
    keys, values = (part.norm(dim=1) for part in encoder.chunk(2, dim=1))
    of_keys = keys > 1e-9 * encoder.norm()
    assert of_keys.any() and not of_keys.all()
    assert float(values[of_keys].max()) <= 1e-9 * float(encoder.norm())


def test_the_factorisation_is_the_best_of_its_rank(stats: list[LayerStatistics]) -> None:
    """No other encoder and decoder, here by gradient descent from the optimum, does better."""
    layer = stats[1]
    gain_HF = positional_gain(layer)
    metric = weigh_metric(layer.fisher_MEE.sum(0), gain_HF, 1e-3)
    slots = choose_slots(layer, gain_HF, 8)
    kv_heads = slots.write_SK.shape[1]
    residual = residual_map(slots, kv_heads, 2 * gain_HF.shape[1])
    covariance = layer.covariance(layer.mean())
    low = factorise(covariance, metric, residual, 24)
    assert 0 < low.energy_kept < 1

    def loss(decoder: Tensor, encoder: Tensor) -> Tensor:
        left = residual - decoder @ encoder
        return (metric * (left @ covariance @ left.T)).sum()

    with torch.enable_grad():
        decoder = low.decoder_ER.clone().requires_grad_()
        encoder = low.encoder_RE.clone().requires_grad_()
        value = loss(decoder, encoder)
        grads = torch.autograd.grad(value, (decoder, encoder))
    total = float(loss(torch.zeros_like(decoder), encoder))
    assert float(value) == pytest.approx((1 - low.energy_kept) * total, rel=1e-6)
    assert max(float(g.abs().max()) for g in grads) <= 1e-6 * total


def test_an_adapter_under_one_metric_is_the_identity(stats: list[LayerStatistics]) -> None:
    layer = stats[1]
    layer_one_metric = LayerStatistics(
        **{**vars(layer), "fisher_MEE": layer.fisher_MEE.sum(0).expand(2, -1, -1)}
    )
    gain_HF = positional_gain(layer)
    slots = choose_slots(layer, gain_HF, 8)
    residual = residual_map(slots, slots.write_SK.shape[1], 2 * gain_HF.shape[1])
    metric = weigh_metric(layer.fisher_MEE.sum(0), gain_HF, 1e-3)
    low = factorise(layer.covariance(layer.mean()), metric, residual, 24)
    for modality in (0, 1):
        same = fit_adapter(layer_one_metric, low, gain_HF, 1e-3, modality)
        assert same.error_after == pytest.approx(same.error_before, rel=1e-3)
        own = fit_adapter(layer, low, gain_HF, 1e-3, modality)
        assert own.error_after <= own.error_before * (1 + 1e-9)


def test_more_rank_is_less_error(source: Any, calibration: Any) -> None:
    case = calibration[0]
    errors = []
    for share in (0.25, 0.5, 0.75):
        options = cache_share(source.config.text_config, share)
        quarter = options.slot_choices()[1]
        options = options.with_(rope_slots=quarter, adapters=False)
        found = convert_with_report(source, calibration, options)
        assert found.cache_share == pytest.approx(share, abs=0.01)
        assert all(0 < x.latent_energy <= 1 for x in found.layers)
        assert all(x.output_error is not None and x.output_error < 1 for x in found.layers)
        errors.append(error(source, found.model, case))
    full = convert(source, calibration, "full")
    assert errors[0] > errors[1] > errors[2] > error(source, full, case)
    assert error(source, full, case) <= 1e-18


def test_the_refit_lowers_the_error(source: Any, calibration: Any) -> None:
    options = PRESETS["half"](source.config.text_config).with_(adapters=False, rope_slots=8)
    with_refit = convert(source, calibration, options)
    without = convert(source, calibration, options.with_(refit_output=False))
    assert error(source, with_refit, calibration[0]) < error(source, without, calibration[0])


def test_both_forms_agree_below_full_rank(half: Any, calibration: Any) -> None:
    text = half.config.text_config
    assert text.modality_adapters
    logits = {}
    for form in ("reconstruct", "absorbed"):
        text.attention_form = form
        logits[form] = half(**calibration[0]).logits
    text.attention_form = "auto"
    assert float((logits["reconstruct"] - logits["absorbed"]).abs().max()) <= 1e-9
    layer = half.model.language_model.layers[0].self_attn
    assert break_even(layer) > 1


def test_adapters_before_the_cache_equal_adapters_at_reconstruction(
    half: Any, calibration: Any, bar: Any
) -> None:
    """`B (M c + δ)` from a cached c equals B on the cached `M c + δ` (notation of adapters.py)."""
    layer = half.model.language_model.layers[1].self_attn
    ids = calibration[0]["input_ids"]
    vision = ids == half.config.video_token_id
    assert vision.any() and not vision.all()
    c = torch.randn(1, ids.shape[1], layer.rank, dtype=torch.float64)
    rope = torch.zeros(1, ids.shape[1], 2 * len(layer.slot_frequencies), dtype=torch.float64)
    keys, values = layer.rebuild(torch.cat([layer.adapt(c, vision), rope], dim=-1))
    for modality, chosen in enumerate((~vision[0], vision[0])):
        weight, bias = layer.adapter_weight[modality], layer.adapter_bias[modality]
        for up, rebuilt in ((layer.k_up, keys), (layer.v_up, values)):
            late = torch.einsum("kdr,rs,ns->knd", up, weight, c[0])
            late = late + torch.einsum("kdr,r->kd", up, bias)[:, None]
            got = rebuilt[0, ..., : layer.head_dim]
            apart = float((got - late)[:, chosen].abs().max())
            bar("adapter before the cache = at reconstruction", apart, 1e-9)


def test_folded_weights_follow_their_parameters(half: Any, calibration: Any) -> None:
    """Decoding multiplies weights out once; a training step must not leave it with old products."""
    layer = copy.deepcopy(half.model.language_model.layers[0].self_attn)
    x = torch.randn(1, 3, layer.q_proj.in_features, dtype=torch.float64)
    turn = torch.ones(2, 1, 3, len(layer.slot_frequencies), dtype=torch.float64)
    vision = torch.tensor([[True, False, True]])
    for _ in range(2):
        folded = layer.write(x, *turn, vision), layer.absorbed_queries(x, *turn)
        with torch.enable_grad():
            plain = layer.write(x, *turn, vision), layer.absorbed_queries(x, *turn)
        for got, want in zip(folded, plain, strict=True):
            assert want.requires_grad and not got.requires_grad
            assert float((got - want).abs().max()) <= 1e-12
        for parameter in layer.parameters():
            parameter.mul_(1.1)


def test_a_row_is_the_latent_and_the_rotary_key(half: Any, calibration: Any) -> None:
    cache = LatentCache(half.config.text_config.num_hidden_layers)
    half(**calibration[0], past_key_values=cache)
    text = half.config.text_config
    (rows,) = cache.segmented(0).joined()
    assert rows.shape[-1] == text.rank(0) + 2 * text.slots(0) == key_width(text)


def test_the_least_divergent_choice_is_taken(source: Any, calibration: Any) -> None:
    words = calibration[1:]
    half = cache_share(source.config.text_config, 0.5)
    assert len(half.slot_choices()) == len(ROPE_SHARES)
    plain = {"adapters": False, "refit_output": False}
    tried = {
        slots: convert_with_report(source, words, half.with_(rope_slots=slots, **plain)).divergence
        for slots in half.slot_choices()
    }
    best = min(tried, key=lambda slots: tried[slots])
    found = convert_with_report(source, words, half.with_(refit_output=False))
    assert found.layers[0].rope_slots == best
    fixed = half.with_(rope_slots=best, refit_output=False)
    either = [
        convert_with_report(source, words, fixed.with_(adapters=adapters)).divergence
        for adapters in (False, True)
    ]
    assert found.divergence == pytest.approx(min(either))
    assert found.model.config.text_config.modality_adapters == (either[1] < either[0])


def test_divergence_is_the_mean_kl(source: Any, half: Any, calibration: Any) -> None:
    case = calibration[2]
    want, got = (m(**case).logits[0, :-1].log_softmax(-1) for m in (source, half))
    text = case["input_ids"][0, 1:] != source.config.video_token_id
    kl = (want.exp() * (want - got)).sum(-1)[text].mean()
    reference = Reference.of(Source.of(source), [case])
    converted = [layer.self_attn for layer in half.model.language_model.layers]
    found = reference.agreement(converted)
    assert found.kl == pytest.approx(float(kl))
    next_ids = case["input_ids"][0, 1:][text, None]
    loss = -got[text].gather(1, next_ids).mean()
    assert found.perplexity == pytest.approx(float(loss.exp()))
    same = (want.argmax(-1) == got.argmax(-1))[text].double().mean()
    assert found.top1 == pytest.approx(float(same)) and found.tokens == int(text.sum())


def test_without_compression_only_the_norm_can_cost(
    source: Any, calibration: Any, tmp_path: Path
) -> None:
    seen = Source.of(source)
    recording = record(seen, calibration, tmp_path, seed=0)
    attentions = [layer.self_attn for layer in seen.layers]
    reference = Reference.of(seen, calibration)

    def kl(fit: str | None) -> float:
        layers = []
        for index, attention in enumerate(attentions):
            inputs = ((call.x_BTX, call.valid_BT) for call in recording.calls(index))
            norm = linear_norm(attention, inputs, fit) if fit else None
            layers.append(uncompressed(attention, norm))
        return reference.agreement(layers).kl

    assert abs(kl(None)) <= 1e-12
    assert 1e-9 < kl("affine") < kl("constant")


def test_the_source_is_not_changed(source: Any, calibration: Any) -> None:
    before = {name: value.clone() for name, value in source.state_dict().items()}
    converted = convert(source, calibration[2:], "half")
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[n], value) for n, value in source.state_dict().items())


def test_a_conversion_can_be_repeated(source: Any, calibration: Any) -> None:
    one, two = (convert(source, calibration[2:], "half") for _ in range(2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_labels_and_masks_of_packed_batches_are_used(
    source: Any, calibration: Any, tmp_path: Path
) -> None:
    case = {k: v for k, v in calibration[0].items() if k != "attention_mask"}
    length = case["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    # With a four-dimensional mask transformers cannot count positions by itself.
    positions, _ = source.model.get_rope_index(
        case["input_ids"],
        mm_token_type_ids=torch.as_tensor(case["mm_token_type_ids"]),
        video_grid_thw=case["video_grid_thw"],
    )
    case["position_ids"] = positions
    labels = torch.full_like(case["input_ids"], -100)
    labels[:, -3:] = case["input_ids"][:, -3:]
    plain, _ = measured(source, [case], tmp_path / "plain")
    packed, _ = measured(source, [case | {"attention_mask": mask}], tmp_path / "packed")
    answers, _ = measured(source, [case | {"labels": labels}], tmp_path / "answers")
    assert torch.allclose(plain[0].fisher_MEE, packed[0].fisher_MEE)
    assert not torch.allclose(plain[0].fisher_MEE, answers[0].fisher_MEE)


def test_mistakes_are_explained(source: Any, identity: Any, calibration: Any) -> None:
    with pytest.raises(ValueError, match="no preset 'hlf'; choose one of half, best"):
        convert(source, calibration, "hlf")
    with pytest.raises(ValueError, match="latent already"):
        convert(identity, calibration, "half")
    with pytest.raises(ValueError, match="no room for 8 rotary slots"):
        ConversionOptions(row_width=16, rope_slots=8)
    with pytest.raises(ValueError, match="no calibration batch"):
        convert(source, [], "half")
    text = source.config.text_config
    with pytest.raises(ValueError, match="metric is 'fish'; choose one of fisher, balanced"):
        cache_share(text, 0.5).with_(metric="fish")
    with pytest.raises(ValueError, match="wider than the"):
        convert(source, calibration, cache_share(text, 1.5))
    with pytest.raises(ValueError, match="below the feasible minimum"):
        convert(
            source, calibration, cache_share(text, 1).with_(rope_slots=key_width(text) // 2 + 1)
        )
    shared = cache_share(text, 0.5).with_(rope_slots=8, vision_rank_share=0.5)
    with pytest.raises(ValueError, match="the calibration set shows no vision tokens"):
        convert(source, calibration[2:], shared)
    with pytest.raises(ValueError, match="the released layout: norm must be `linear`"):
        convert(source, calibration, PRESETS["official"](text).with_(norm="exact"))


@pytest.mark.parametrize("preset", ["half", "official"])
def test_a_written_conversion_is_the_one_in_memory_shard_by_shard(
    preset: str, source: Any, calibration: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internvideo3.model.conversion.converted.SHARD_BYTES", 200_000)
    seen = Source.of(source)
    options = PRESETS[preset](source.config.text_config)
    job = Job.start(seen, calibration[2:], options, tmp_path / "work")
    built = job.run()
    save_converted(seen, built.layers, built.shape, tmp_path / "written")
    whole = converted_model(seen, built.layers, built.shape)
    whole.save_pretrained(tmp_path / "whole", max_shard_size=200_000)
    assert len(list((tmp_path / "written").glob("*.safetensors"))) > 3
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {file.name for file in (tmp_path / "written").iterdir()} == names
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "written" / name).read_text() == (tmp_path / "whole" / name).read_text()
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "written", dtype=torch.float64)
    for name, value in whole.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_converted_layers_are_in_memory_one_at_a_time(
    source: Any, calibration: Any, tmp_path: Path
) -> None:
    seen = Source.of(source)
    own = [layer.self_attn for layer in seen.layers]
    options = PRESETS["half"](source.config.text_config)
    built = Job.start(seen, calibration[2:], options, tmp_path).run()
    alive: weakref.WeakSet[RowAttention] = weakref.WeakSet()
    most = 0

    def load(index: int) -> RowAttention:
        nonlocal most
        layer = built.layers[index]
        alive.add(layer)
        most = max(most, len(alive))
        return layer

    watched = FinishedLayers(load, len(own))
    reference = Reference.of(seen, calibration[2:])
    found = reference.agreement(watched)
    assert most == 1 and found == reference.agreement(list(built.layers))
    # What a conversion does not change is the source's own, in memory and not in the file.
    layer = built.layers[1]
    assert layer.q_proj is own[1].q_proj and layer.k_norm is own[1].k_norm
    stored = load_file(next(tmp_path.glob("result-*/001.safetensors")))
    assert "o_proj.weight" in stored and "q_proj.weight" not in stored


def test_a_fitted_norm_is_read_again(source: Any, calibration: Any, tmp_path: Path) -> None:
    seen = Source.of(source)
    options = PRESETS["official"](source.config.text_config)
    job = Job.start(seen, calibration[2:], options, tmp_path)
    first, again = job.norm(1), job.norm(1)
    assert first is not None and again is not None
    assert torch.equal(first.k_weight, again.k_weight) and again.k_weight.dtype == torch.float64
    assert first.concentration == again.concentration
    assert len(list(tmp_path.glob("norms-*/*.safetensors"))) == 1


EXACT = {
    "preset full": {},
    "real mixing": {"mixing": "real"},
    "mean mixing": {"mixing": "mean"},
    "no importance": {"importance": False},
    "no gain": {"gain": False},
    "balanced metric": {"metric": "balanced"},
    "no token weights": {"token_weights": False},
    "uncentred": {"centred": False},
    "keys and values apart": {"joint": False},
    "refitted": {"refit_output": True},
}
"""Changes to the full rank that lose nothing by construction. Not `prerope`: its row also holds a
token's angles, so within the source's width its rank is never full."""


@pytest.mark.parametrize("change", EXACT)
def test_full_rank_is_the_source_in_float32(
    source: Any, calibration: Any, change: str, bar: Any
) -> None:
    """At most 1e-5 relative on logits, for a video and for text."""
    options = PRESETS["full"](source.config.text_config).with_(**EXACT[change])
    model = copy.deepcopy(source).float()
    converted = convert(model, calibration[1:], options)
    for case in (calibration[0], calibration[2]):
        want, got = model(**case).logits, converted(**case).logits
        relative = float((got - want).abs().max() / want.abs().max())
        bar("full rank = source, float32, every exact choice", relative, 1e-5)


def test_absorbed_is_reconstructed_in_float32(half: Any, calibration: Any, bar: Any) -> None:
    model = copy.deepcopy(half).float()
    logits = {}
    for form in ("reconstruct", "absorbed"):
        model.config.text_config.attention_form = form
        logits[form] = model(**calibration[0]).logits
    want = logits["reconstruct"]
    relative = float((logits["absorbed"] - want).abs().max() / want.abs().max())
    bar("absorbed = reconstructed, float32", relative, 1e-5)


def test_a_nested_vision_rank_is_full_rank_masked(half: Any, calibration: Any, bar: Any) -> None:
    """Vision rows of a smaller rank are full rows with the coordinates beyond it set to zero."""
    layer = copy.deepcopy(half.model.language_model.layers[1].self_attn)
    ids = calibration[0]["input_ids"]
    vision = ids == half.config.video_token_id
    x = torch.randn(1, ids.shape[1], layer.q_proj.in_features, dtype=torch.float64)
    turn = torch.rand(2, 1, ids.shape[1], len(layer.slot_frequencies), dtype=torch.float64)
    whole = layer.write(x, *turn, vision)
    layer.vision_rank = layer.rank // 2
    nested = layer.write(x, *turn, vision)
    masked = whole.clone()
    masked[..., layer.vision_rank : layer.rank][vision] = 0
    bar("nested vision rank = masked full rank", float((nested - masked).abs().max()), 0.0)
    assert not torch.equal(nested, whole)
    # Only the first coordinates of a vision row are read.
    up = layer.k_up[..., : layer.vision_rank]
    keys = layer.rebuild(nested)[0][..., : layer.head_dim]
    short = torch.einsum("kdr,nr->knd", up, nested[0, :, : layer.vision_rank])
    apart = float((keys[0] - short)[:, vision[0]].abs().max())
    bar("nested vision rank: only its prefix is read", apart, 1e-9)


def test_the_rank_of_vision_tokens_can_be_left_to_the_divergence(
    source: Any, calibration: Any, tmp_path: Path
) -> None:
    """The ratio that is taken is the best of those that are tried, all within one budget."""
    text = source.config.text_config
    options = cache_share(text, 0.5).with_(rope_slots=8, adapters=False, refit_output=False)
    found = {}
    for share in (None, *VISION_SHARES):
        job = Job.start(
            Source.of(source), calibration, options.with_(vision_rank_share=share), tmp_path / "w"
        )
        built = job.run()
        ranks = [(layer.rank, layer.vision_rank) for layer in built.reports]
        seen = job.vision_tokens
        mean = sum((1 - seen) * rank + seen * nested for rank, nested in ranks) / len(ranks)
        assert options.row_width - 2 * 8 - 1 <= mean <= options.row_width - 2 * 8 + 0.5
        found[share] = ranks, job.divergence(built)
    best = min(VISION_SHARES, key=lambda share: found[share][1])
    assert found[None] == found[best]
    # Fewer coordinates for vision, more for text.
    assert [found[share][0][0][0] for share in VISION_SHARES] == sorted(
        found[share][0][0][0] for share in VISION_SHARES
    )


def test_positions_that_differ_by_axis_are_exact(
    source: Any, identity: Any, calibration: Any, bar: Any
) -> None:
    """Time, height and width of any token, in any order: the rotary part loses nothing."""
    case = {k: v for k, v in calibration[2].items() if k != "mm_token_type_ids"}
    length = case["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 500, (3, 1, length), generator=generator)
    want = source(**case, position_ids=positions).logits
    assert float((source(**case).logits - want).abs().max()) > 1e-3
    apart = float((identity(**case, position_ids=positions).logits - want).abs().max())
    bar("MRoPE exact for any time, height and width", apart, 1e-9)


def test_gradients_that_are_too_large_are_tried_smaller_and_none_is_kept() -> None:
    """As float16 has them; what a batch does not reach has no gradient, not an earlier one."""
    owned = [torch.nn.Parameter(torch.ones(2, dtype=torch.float16)) for _ in "ab"]
    masters, scale = [one.detach().float() for one in owned], Scale(4.0)
    owned[0].grad = torch.tensor([8.0, 4.0], dtype=torch.float16)
    assert scale.hand_over(owned, masters) and owned[0].grad is None
    assert masters[0].grad is not None and masters[0].grad.tolist() == [2.0, 1.0]
    owned[1].grad = torch.tensor([float("inf"), 4.0], dtype=torch.float16)
    assert not scale.hand_over(owned, masters)
    assert scale.value == 2.0 and masters[0].grad is None
    owned[1].grad = torch.tensor([float("nan"), 4.0], dtype=torch.float16)
    assert not scale.hand_over(owned, masters) and scale.value == 1.0
    owned[1].grad = torch.tensor([float("nan"), 4.0], dtype=torch.float16)
    with pytest.raises(RecoveryError, match="not finite"):
        scale.hand_over(owned, masters)
