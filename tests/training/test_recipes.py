"""Recipes: strict, composable: `pytest tests/training/test_recipes.py`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from internvideo3.training.loop import rate_at
from internvideo3.training.recipe import (
    Gspo,
    Opd,
    Optimiser,
    RecipeError,
    Sft,
    load_recipe,
    recipe_names,
    stage_digest,
)


def written(folder: Path, text: str, name: str = "own.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads(name: str) -> None:
    assert load_recipe(name).stages


def test_the_presets_say_what_was_published() -> None:
    paper, official = load_recipe("paper"), load_recipe("official")
    short, long = paper.stages["sft_short"], paper.stages["sft_long"]
    assert isinstance(short, Sft) and isinstance(long, Sft)
    assert (short.fps, short.max_frames, short.pack_tokens) == (2.0, 512, 32768)
    assert (long.fps, long.max_frames, long.pack_tokens) == (4.0, 2048, 262144)
    assert official.stages["sft_short"].optimiser.learning_rate == 3e-5
    assert official.stages["sft_long"].documents == 8
    assert official.stages["sft_long"].steps is None


def test_a_recipe_extends_another_and_leaves_a_stage_out(tmp_path: Path) -> None:
    own = written(
        tmp_path,
        "extends: scale\nseed: 3\nstages:\n  sft_long: null\n  gspo: {group: 4}\n",
    )
    recipe, base = load_recipe(own), load_recipe("scale")
    assert list(recipe.stages) == ["convert", "cpt", "sft_short", "gspo", "opd"]
    gspo, whole = recipe.stages["gspo"], base.stages["gspo"]
    assert isinstance(gspo, Gspo) and isinstance(whole, Gspo)
    assert (recipe.seed, gspo.group, gspo.steps) == (3, 4, whole.steps)
    assert recipe.stages["sft_short"] == base.stages["sft_short"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: scale\nsede: 1\n", "sede: no such key; did you mean seed?"),
        ("extends: scale\nstages: {gspo: {groop: 4}}\n", "stages.gspo.groop: .*mean group?"),
        ("extends: scale\nstages: {opd: {optimiser: {warm_up: 0.1}}}\n", "did you mean warmup?"),
        ("extends: scale\nstages: {opd: {data: {length: {2: 1.0}}}}\n", "did you mean lengths?"),
        ("extends: scale\nstages: {gspo: {group: 1}}\n", "stages.gspo.group: .*got 1"),
        ("extends: scale\nstages: {gspo: {steps: '9'}}\n", "stages.gspo.steps: .*got '9'"),
        ("extends: scale\nstages: {sft_short: {optimiser: {learning_rate: 2e-5}}}\n", "2.0e-5"),
        ("extends: scael\n", "no recipe 'scael'. Did you mean scale?"),
        ("about: x\nstages: {a: {kind: sft}}\n", "stages.a.documents: is required"),
        ("about: x\nstages: {a: {kind: sfd}}\n", "sfd"),
        ("- a\n", "must be a mapping"),
        ("a: [\n", "is no YAML"),
        ("extends: own.yaml\n", "circle: own.yaml → own.yaml"),
    ],
)
def test_a_mistake_is_told_where_it_is(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError, match=said.replace("?", r"\?")):
        load_recipe(path)


def test_the_digest_sees_what_decides_the_weights() -> None:
    recipe = load_recipe("scale")
    digests = {
        stage_digest(stage, seed, start)
        for stage in recipe.stages.values()
        for seed in (0, 1)
        for start in ("a", "b")
    }
    assert len(digests) == 4 * len(recipe.stages)


def test_the_digest_sees_the_teachers_weights() -> None:
    stage = load_recipe("scale").stages["opd"]
    assert len({stage_digest(stage, 0, "a", teacher) for teacher in (None, "b", "c")}) == 3


def test_an_option_that_is_added_later_voids_no_finished_stage() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(Opd):
        added: int | None = None

    stage = load_recipe("scale").stages["opd"]
    told = {field.name: getattr(stage, field.name) for field in fields(stage)}
    assert stage_digest(Later(**told), 0, "a") == stage_digest(stage, 0, "a")
    assert stage_digest(Later(**told, added=1), 0, "a") != stage_digest(stage, 0, "a")


def test_the_rate_rises_then_falls_to_its_end() -> None:
    optimiser = Optimiser(learning_rate=1.0, final_learning_rate=0.1, warmup=0.1)
    rates = [rate_at(optimiser, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.001)
