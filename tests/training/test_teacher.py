"""The deeper teacher: `pytest tests/training/test_teacher.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from internvideo3.model.checkpoint import (
    SCALE_FOLDER,
    SCALE_NAMES,
    inspect,
    load_model,
    weights_digest,
)
from internvideo3.training.documents import WorldDocuments
from internvideo3.training.recipe import Opd, WorldData, load_recipe
from internvideo3.training.rollouts import Sampler
from internvideo3.training.scale import language_stage, publish_teacher
from internvideo3.training.scale.grow import grow
from internvideo3.training.stages.opd import check_teacher

DATA = WorldData(lengths={4: 1.0}, videos=2, profiles={"main": 1.0})


def logits(model: Any, processor: Any) -> torch.Tensor:
    """What follows a real question about a real video."""
    prompt = WorldDocuments(DATA, processor, 0).prompt(1)
    session = Sampler(model, processor, (), 1).session()
    session.append_text(prompt.text, [prompt.frames])
    return session.logits_last


def test_a_grown_model_says_what_the_model_said_and_can_learn() -> None:
    model, processor = load_model("scale:control", "cpu", torch.float32)
    grown = grow(model)
    assert grown.config.text_config.num_hidden_layers == 8
    assert torch.allclose(logits(grown, processor), logits(model, processor), atol=1e-5)
    ids = torch.tensor([[1, 2, 30, 40]])
    grown(input_ids=ids, labels=ids).loss.backward()
    layers = grown.model.language_model.layers
    for new in (layers[1], layers[7]):
        assert new.self_attn.o_proj.weight.grad.abs().sum() > 0
        assert new.mlp.down_proj.weight.grad.abs().sum() > 0


def test_deepstack_after_several_layers_is_refused() -> None:
    model, _ = load_model("scale:control", "cpu", torch.float32)
    model.config.vision_config.deepstack_visual_indexes = [0, 1]
    with pytest.raises(ValueError, match="DeepStack's place after the first layer only"):
        grow(model)


def test_an_unfinished_teacher_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "options.json").write_text(json.dumps({"steps": 100}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 50, "answer": 0.2}\n')
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(FileNotFoundError, match="not trained to its 100 steps"):
        publish_teacher.publish_teacher(tmp_path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_time_is_that_of_all_processes() -> None:
    rows = [{"seconds": s} for s in (10.0, 20.0, 5.0, 15.0)]
    assert publish_teacher._seconds(rows) == 35.0


def test_the_commands_of_the_card_are_those_that_the_stage_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said of a recorded run makes the same options again."""
    taken: list[language_stage.Options] = []
    monkeypatch.setattr(language_stage, "run", lambda options, **pace: taken.append(options))
    given = ["--steps", "9", "--init", "grown", "--curriculum", "teacher", "--no-bfloat16"]
    language_stage.main(["--out", str(tmp_path / "run"), *given])
    said = publish_teacher._arguments(json.loads((tmp_path / "run/options.json").read_text()))
    language_stage.main(said.split())
    assert taken[0] == taken[1]


def test_the_card_is_of_the_weights_that_are_shipped() -> None:
    text = (SCALE_FOLDER / publish_teacher.CARD).read_text(encoding="utf-8")
    (told,) = re.findall(r"Weights digest `(\w+)`", text)
    assert weights_digest(SCALE_NAMES["scale:teacher"]).startswith(told)
    assert (SCALE_FOLDER / publish_teacher.CURVE).is_file()


def test_the_shipped_teacher_is_larger_than_the_student_and_has_its_ids() -> None:
    teacher, theirs = load_model("scale:teacher", "cpu", torch.float32)
    _, ours = load_model("scale:m2la", "cpu", torch.float32)
    check_teacher(ours, theirs)
    assert torch.isfinite(logits(teacher, theirs)).all()
    larger, student = inspect("scale:teacher"), inspect("scale:m2la")
    assert larger.layers == 2 * student.layers
    assert larger.parameters > 1.3 * student.parameters


def test_the_scale_recipe_distils_from_the_larger_teacher() -> None:
    stage = load_recipe("scale").stages["opd"]
    assert isinstance(stage, Opd)
    assert stage.teacher == "scale:teacher"
