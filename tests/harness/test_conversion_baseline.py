"""The baseline: groups of one are plain rotation, components and balance are what they claim.

Run: .venv/bin/python -m pytest tests/harness/test_conversion_baseline.py -q
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from internvideo3.harness.conversion_baseline import (
    balance,
    baseline_layers,
    components_of,
    folded_residual,
    moments_under,
    partial_rope,
)
from internvideo3.harness.conversion_report import plain_transmla
from internvideo3.model.attention import RowAttention
from internvideo3.model.conversion.convert import Built, Job
from internvideo3.model.conversion.divergence import Reference
from internvideo3.model.conversion.options import full
from internvideo3.model.conversion.source import Projections, Source

KV_HEADS, FREQUENCIES = 2, 8


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Calibrated on a random model of two layers, 4 query and 2 key/value heads of 16."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    source = Source.of(model.requires_grad_(False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    batch = {"input_ids": torch.randint(0, 97, (1, 48))}
    work = tmp_path_factory.mktemp("work")
    return Job.start(source, [batch], plain_transmla(source.text, 0.5), work)


@pytest.fixture(scope="module")
def built(job: Job) -> Built:
    return job.run()


def kl(job: Job, layers: Any) -> float:
    return Reference.of(job.source, job.calibration).agreement(layers).kl


def moment(job: Job, index: int = 0) -> Tensor:
    return job.statistics(index).second_moment(weighted=False)


def partial(job: Job, built: Built, fold: int) -> list[RowAttention]:
    found = [components_of(moment(job, index), KV_HEADS, FREQUENCIES, fold) for index in (0, 1)]
    return partial_rope(job, built, found)


def test_groups_of_one_frequency_are_the_plain_rotation(
    job: Job, built: Built, tmp_path: Any
) -> None:
    """Nothing compressed: the converter's own real mixing, one slot a frequency, no gain."""
    options = plain_transmla(job.source.text, 1.0)
    plain = Job.start(job.source, job.calibration, options, tmp_path).run()
    want = kl(job, plain.layers)
    assert want > 1e-3 and kl(job, partial(job, built, 1)) == pytest.approx(want, rel=1e-9)


def test_folding_is_another_model_and_a_rank_costs(job: Job, built: Built) -> None:
    found = {fold: kl(job, baseline_layers(job, built, fold)) for fold in (1, 4)}
    assert abs(found[1] - found[4]) > 1e-3
    for fold, cost in found.items():
        assert cost > kl(job, partial(job, built, fold)) > 1e-3


def test_the_second_step_sees_what_the_first_makes(job: Job, built: Built, tmp_path: Any) -> None:
    """Under layers that lose nothing, the source's own moments; else those of changed inputs."""
    whole = Job.start(job.source, job.calibration, full(job.source.text), tmp_path).run()
    same = moments_under(job, list(whole.layers))
    changed = moments_under(job, partial(job, built, 1))
    for index in (0, 1):
        own = moment(job, index)
        assert torch.allclose(same[index], own, rtol=1e-6, atol=1e-6)
    # The first layer's inputs are the embeddings, whatever stands in its place.
    assert torch.allclose(changed[0], moment(job, 0), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(changed[1], moment(job, 1), rtol=1e-3)


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_components_are_orthonormal_and_carry_more_when_folded(job: Job, fold: int) -> None:
    own = moment(job)
    components_gJKM = components_of(own, KV_HEADS, FREQUENCIES, fold)
    pairs = KV_HEADS * fold
    assert components_gJKM.shape == (FREQUENCIES // fold, pairs, KV_HEADS, fold)
    u_gJJ = components_gJKM.flatten(2)
    assert torch.allclose(u_gJJ @ u_gJJ.mT, torch.eye(pairs, dtype=u_gJJ.dtype), atol=1e-12)
    residual = folded_residual(components_gJKM[:, :fold])
    assert torch.allclose(residual @ residual, residual, atol=1e-12)
    keys = len(own) // 2
    left = (residual @ own @ residual.T)[:keys, :keys].trace()
    one = components_of(own, KV_HEADS, FREQUENCIES, 1)
    plain = folded_residual(one[:, :1])
    assert left <= (plain @ own @ plain.T)[:keys, :keys].trace() * (1 + 1e-12)


@pytest.mark.parametrize("fold", [1, 2])
def test_the_balance_is_of_unrotated_components_channel_by_channel(job: Job, fold: int) -> None:
    """Against the keys themselves, rotated as the components say."""
    call = next(job.recording.calls(0))
    _, k_BKTD, v_BKTD = Projections.of(job.source.layers[0].self_attn)(call.x_BTX)
    components_gJKM = components_of(moment(job), KV_HEADS, FREQUENCIES, fold)
    norms = []
    for part_KTF in k_BKTD[0].chunk(2, dim=-1):
        grouped = part_KTF.unflatten(-1, (-1, fold))
        channels_gJT = torch.einsum("ktgm,gjkm->gjt", grouped, components_gJKM)
        norms.append(channels_gJT[:, fold:].norm(dim=-1).flatten())
    of_values = v_BKTD[0].transpose(0, 1).flatten(1)[:, 2 * FREQUENCIES :].norm(dim=0).mean()
    ratio = float(torch.cat(norms).mean() / of_values)
    weight_E = balance(moment(job), components_gJKM)
    keys = len(weight_E) // 2
    assert torch.allclose(weight_E[:keys], torch.full((keys,), ratio**-2, dtype=weight_E.dtype))
    assert torch.equal(weight_E[keys:], torch.ones_like(weight_E[keys:]))


def test_groups_that_do_not_part_the_frequencies_are_refused(job: Job, built: Built) -> None:
    with pytest.raises(ValueError, match="8 frequencies have no groups of 3"):
        baseline_layers(job, built, 3)
