"""The baseline's FreqFold: groups of one are plain rotation, components are what they claim.

Run: .venv/bin/python -m pytest tests/harness/test_conversion_baseline.py -q
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from internvideo3.harness.conversion_baseline import (
    baseline_layer,
    folded_components,
    folded_residual,
)
from internvideo3.harness.conversion_report import plain_transmla
from internvideo3.model.conversion.convert import Built, Job
from internvideo3.model.conversion.converted import layer_config
from internvideo3.model.conversion.divergence import Agreement, Reference
from internvideo3.model.conversion.source import Source


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


def agreement(job: Job, layers: Any) -> Agreement:
    return Reference.of(job.source, job.calibration).agreement(layers)


def folded(job: Job, built: Built, fold: int) -> list[Any]:
    return [
        baseline_layer(
            job.statistics(index),
            layer.self_attn,
            layer_config(job.source, built.shape.of_layer(index)),
            fold,
        )
        for index, layer in enumerate(job.source.layers)
    ]


def test_groups_of_one_frequency_are_the_plain_rotation(job: Job, built: Built) -> None:
    plain, own = agreement(job, built.layers), agreement(job, folded(job, built, 1))
    assert plain.kl > 1e-3 and own.kl == pytest.approx(plain.kl, rel=1e-9)


def test_folding_is_another_model(job: Job, built: Built) -> None:
    plain, own = agreement(job, built.layers), agreement(job, folded(job, built, 4))
    assert abs(own.kl - plain.kl) > 1e-3


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_components_are_orthonormal_and_carry_more_when_folded(
    job: Job, built: Built, fold: int
) -> None:
    moment = job.statistics(0).second_moment(weighted=False)
    mix_gcKM = folded_components(moment, 2, 8, fold)
    assert mix_gcKM.shape == (8 // fold, fold, 2, fold)
    u_gcJ = mix_gcKM.flatten(2)
    assert torch.allclose(u_gcJ @ u_gcJ.mT, torch.eye(fold, dtype=u_gcJ.dtype), atol=1e-12)
    residual = folded_residual(mix_gcKM)
    assert torch.allclose(residual @ residual, residual, atol=1e-12)
    keys = len(moment) // 2
    left = (residual @ moment @ residual.T)[:keys, :keys].trace()
    plain = folded_residual(folded_components(moment, 2, 8, 1))
    assert left <= (plain @ moment @ plain.T)[:keys, :keys].trace() * (1 + 1e-12)


def test_groups_that_do_not_part_the_frequencies_are_refused(job: Job, built: Built) -> None:
    with pytest.raises(ValueError, match="8 frequencies have no groups of 3"):
        folded(job, built, 3)
