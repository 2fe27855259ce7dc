"""Recipes: strict, composable: `pytest tests/training/test_recipes.py`."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from internvideo3.harness.ablate_jobs import graph
from internvideo3.model.checkpoint import load_model, resolve_checkpoint, weights_digest
from internvideo3.training.documents import WorldDocuments
from internvideo3.training.loop import rate_at
from internvideo3.training.recipe import (
    ChatData,
    Cpt,
    Gspo,
    Opd,
    Open,
    Optimiser,
    RecipeError,
    Sft,
    WorldData,
    complete,
    load_recipe,
    load_variant,
    recipe_names,
    stage_digest,
)
from internvideo3.training.train import start_digest


def written(folder: Path, text: str, name: str = "own.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_loads(name: str) -> None:
    assert load_recipe(name).stages


TOKEN_PIXELS = 2 * 32 * 32
"""Two frames of a merged patch."""
RELEASED = {
    # OpenGVLab/InternVideo@3965eef:InternVideo3_sft/configs/internvideo3_*.py
    "cpt": (65536, 2e-5, 1e-6, 0.05, 0.03, 1, 2.0, 768, 65536 * TOKEN_PIXELS),
    "sft_short": (65536, 3e-5, 1e-6, 0.05, 0.1, 1, 2.0, 768, 65536 * TOKEN_PIXELS),
    "sft_long": (262144, 1e-5, 1e-6, 0.05, 0.1, 4, 4.0, 2048, 262144 * TOKEN_PIXELS),
}


def given(stage: Any) -> dict[str, Any]:
    return dict(stage.options) if isinstance(stage, Open) else asdict(stage)


@pytest.mark.parametrize("name", RELEASED)
def test_the_official_preset_has_the_released_values(name: str) -> None:
    stage = given(load_recipe("official").stages[name])
    optimiser, data = stage["optimiser"], stage["data"]
    assert (
        stage["pack_tokens"], optimiser["learning_rate"], optimiser["final_learning_rate"],
        optimiser["weight_decay"], optimiser["warmup"], stage.get("sequence_parallel", 1),
        data["fps"], data["max_frames"], data["total_pixels"],
    ) == RELEASED[name]  # fmt: skip
    assert (data["min_pixels"], data["max_pixels"]) == (4 * 32 * 32, 16384 * 4 * 32 * 32)
    assert stage["train_vision"] and stage["recompute"] and stage["bfloat16"]


def test_the_paper_preset_has_the_papers_curriculum() -> None:
    """Section 3.3.2; its other values are the released ones."""
    paper, official = load_recipe("paper"), load_recipe("official")
    short, long = (given(paper.stages[name]) for name in ("sft_short", "sft_long"))
    told = [(s["data"]["fps"], s["data"]["max_frames"], s["pack_tokens"]) for s in (short, long)]
    assert told == [(2.0, 512, 32768), (4.0, 2048, 262144)]
    assert short["data"]["total_pixels"] == 32768 * TOKEN_PIXELS
    assert short["optimiser"] == given(official.stages["sft_short"])["optimiser"]
    assert paper.stages["cpt"] == official.stages["cpt"]


@pytest.mark.parametrize("name", ["paper", "official"])
def test_what_nobody_published_is_open_and_told_at_once(name: str) -> None:
    with pytest.raises(RecipeError, match="not set. .*nobody published") as told:
        complete(load_recipe(name))
    for path in ("start", "stages.convert.data", "stages.sft_short.documents",
                 "stages.sft_long.documents",
                 "stages.sft_long.steps", "stages.gspo.group", "stages.opd.teacher",
                 "stages.gspo.optimiser.learning_rate"):  # fmt: skip
        assert path in str(told.value)
    assert "stages.cpt" not in str(told.value) and "stages.opd.data" not in str(told.value)


def test_a_recipe_that_fills_what_is_open_can_be_trained(tmp_path: Path) -> None:
    post = "{steps: 9, documents: 4, max_new_tokens: 64, optimiser: {learning_rate: 1.0e-6}"
    own = written(
        tmp_path,
        f"""
extends: paper
start: path/to/qwen
stages:
  convert: {{data: {{files: {{c.jsonl: 1.0}}}}}}
  sft_short: {{steps: 10, documents: 64, data: {{files: {{own.jsonl: 1.0}}}}}}
  sft_long: {{steps: 10, documents: 64}}
  gspo: {post}, group: 8}}
  opd: {post}, teacher: "http://127.0.0.1:1/v1"}}
""",
    )
    stages = complete(load_recipe(own))
    short, gspo = stages["sft_short"], stages["gspo"]
    assert isinstance(short, Sft) and isinstance(short.data, ChatData)
    # Files are one value; how videos are seen stays the preset's.
    assert short.data.files == {"own.jsonl": 1.0} and short.data.max_frames == 512
    assert isinstance(gspo, Gspo) and gspo.optimiser.learning_rate == 1e-6
    assert list(stages) == ["convert", "cpt", "sft_short", "sft_long", "gspo", "opd"]


def test_the_readmes_recipes_are_whole(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "training" / "README.md").read_text()
    recipes = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    assert len(recipes) == 3
    for block in recipes:
        own = written(tmp_path, block)
        assert complete(load_recipe(own))
    assert "variants:" in recipes[1]
    changed = load_variant(str(written(tmp_path, recipes[1])), "no_long_video_data")
    assert given(changed.stages["sft_long"])["data"]["files"] == {"data/short_videos.jsonl": 1.0}


def test_the_frame_rate_may_rise_with_the_length_in_the_world_too(tmp_path: Path) -> None:
    """A curriculum as the paper's, of the scale model."""
    own = written(tmp_path, "extends: scale\nstages: {sft_long: {data: {fps: 4}}}\n")
    _, processor = load_model("scale:m2la", "cpu", torch.float32)
    counts = []
    for name in ("sft_short", "sft_long"):
        stage = complete(load_recipe(own))[name]
        assert isinstance(stage, Sft) and isinstance(stage.data, WorldData)
        data = replace(stage.data, lengths={4: 1.0})
        frames = WorldDocuments(data, processor, 0).prompt(0).frames
        assert frames.source_fps == 8 and frames.indices[0] == 0 and frames.indices[-1] == 31
        counts.append(len(frames.indices))
    assert counts == [8, 16]


def test_a_recipe_says_what_a_variant_is_of_it(tmp_path: Path) -> None:
    own = written(
        tmp_path,
        """
extends: paper
variants:
  no_long_video_data: {stages: {sft_long: {data: {files: {clips.jsonl: 1.0}}}}}
""",
    )
    full, made = (
        given(load_variant(str(own), name).stages["sft_long"])
        for name in ("full", "no_long_video_data")
    )
    assert made["data"]["files"] == {"clips.jsonl": 1.0} != full["data"]["files"]
    assert made | {"data": full["data"]} == full


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        ("{no_ctp: {}}", "no variant 'no_ctp'. Did you mean no_cpt"),
        ("{no_cpt: 3}", "variants.no_cpt must be a mapping, got 3"),
        ("{no_cpt: {stages: {sft_lnog: null}}}", "stages.sft_lnog: there is no such stage"),
    ],
)
def test_a_mistake_in_a_variant_is_told(tmp_path: Path, variants: str, said: str) -> None:
    own = written(tmp_path, f"extends: scale\nvariants: {variants}\n")
    with pytest.raises(RecipeError, match=said):
        load_variant(str(own), "no_cpt")


def test_a_recipe_gives_a_stage_of_the_world_files(tmp_path: Path) -> None:
    """And one with files the world: data of another kind are another value."""
    own = written(tmp_path, "extends: scale\nstages: {sft_short: {data: {files: {a: 1.0}}}}\n")
    stages = complete(load_recipe(own))
    assert stages["sft_short"].data == ChatData(files={"a": 1.0})
    world = "{lengths: {2: 1.0}, videos: 3}"
    back = written(
        tmp_path, f"extends: own.yaml\nstages: {{sft_short: {{data: {world}}}}}\n", "b.yaml"
    )
    data = complete(load_recipe(back))["sft_short"].data
    assert data == WorldData(lengths={2: 1.0}, videos=3)


def test_a_recipes_own_variant_is_in_the_place_of_the_presets(tmp_path: Path) -> None:
    own = written(tmp_path, "extends: scale\nvariants: {no_cpt: {stages: {cpt: {steps: 1}}}}\n")
    stage = complete(load_variant(str(own), "no_cpt"))["cpt"]
    assert isinstance(stage, Cpt) and stage.steps == 1


def test_a_file_that_is_not_there_is_no_variant(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe '.*mine.yaml'"):
        load_recipe(tmp_path / "recipes" / "mine.yaml")


def test_what_is_measured_decides_no_weights() -> None:
    stage = complete(load_recipe("scale"))["cpt"]
    assert isinstance(stage, Cpt)
    told = replace(stage, held_out=("a.jsonl",))
    assert stage_digest(told, 0, "a") == stage_digest(stage, 0, "a")


def test_a_variant_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    own = written(tmp_path, "extends: scale\nstages: {gspo: null, sft_long: null}\n")
    for name in ("no_rl", "no_long_context", "no_long_video_data"):
        with pytest.raises(RecipeError, match=f"{name} changes nothing of .*repeat that of full"):
            load_variant(str(own), name)


def test_a_variant_that_nothing_says_is_refused(tmp_path: Path) -> None:
    stage = "{kind: convert, data: {files: {a.jsonl: 1.0}}}"
    own = written(tmp_path, f"about: x\nstart: y\nstages: {{a: {stage}}}\n")
    with pytest.raises(RecipeError, match="nothing says what the variant no_long_context"):
        load_variant(str(own), "no_long_context")


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
        ("extends: scale\nstages: {sft_lnog: null}\n", "no such stage.*Did you mean sft_long?"),
        ("extends: scale\nstages: {sft_lnog: {steps: 3}}\n", "says its `kind`.*mean sft_long?"),
        ("extends: scale\nstages:\n  gspo: {group: 4}\n  gspo: {group: 16}\n", "gspo twice .*3"),
        ("extends: scale\nstages: {gspo: {group: null, groop: 1}}\n", "stages.gspo.groop"),
        ("extends: scale\nstages: {opd: {data: null, kind: null}}\n", "stages.opd: .*kind"),
        ("extends: scale\nstages: {opd: {stpes: null}}\n", "opd.stpes: no such key.*mean steps?"),
        ("extends: scale\nvariants: {no_ctp: {}}\n", "no variant 'no_ctp'. Did you mean no_cpt?"),
        ("extends: scale\nvariants: {no_cpt: {stages: [1]}}\n", "no_cpt.stages must be a mapp"),
    ],
)
def test_a_mistake_is_told_where_it_is(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(RecipeError, match=said.replace("?", r"\?")):
        load_recipe(path)


def test_the_digest_sees_what_decides_the_weights() -> None:
    stages = complete(load_recipe("scale"))
    digests = {
        stage_digest(stage, seed, start)
        for stage in stages.values()
        for seed in (0, 1)
        for start in ("a", "b")
    }
    assert len(digests) == 4 * len(stages)


def test_a_stage_goes_on_when_it_trades_memory_for_time() -> None:
    """After it ran out of memory, say."""
    stage = complete(load_recipe("scale"))["sft_long"]
    assert isinstance(stage, Sft)
    for changed in (replace(stage, recompute=True), replace(stage, attention="flex")):
        assert stage_digest(changed, 0, "a") == stage_digest(stage, 0, "a")
    assert stage_digest(replace(stage, documents=9), 0, "a") != stage_digest(stage, 0, "a")


def test_the_digest_sees_the_teachers_weights() -> None:
    stage = complete(load_recipe("scale"))["opd"]
    assert len({stage_digest(stage, 0, "a", teacher) for teacher in (None, "b", "c")}) == 3


def test_an_option_that_is_added_later_voids_no_finished_stage() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Later(Opd):
        added: int | None = None

    stage = complete(load_recipe("scale"))["opd"]
    told = {field.name: getattr(stage, field.name) for field in fields(stage)}
    assert stage_digest(Later(**told), 0, "a") == stage_digest(stage, 0, "a")
    assert stage_digest(Later(**told, added=1), 0, "a") != stage_digest(stage, 0, "a")


def test_a_warm_up_is_no_step_longer_for_rounding() -> None:
    rates = [rate_at(Optimiser(learning_rate=1.0, warmup=0.07), step, 100) for step in range(9)]
    assert rates[:8] == pytest.approx([*(n / 7 for n in range(1, 8)), 1.0])
    assert rates[7] == 1.0


def test_the_rate_rises_then_falls_to_its_end() -> None:
    optimiser = Optimiser(learning_rate=1.0, final_learning_rate=0.1, warmup=0.1)
    rates = [rate_at(optimiser, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == 1.0 and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.001)


def test_a_mapping_in_another_order_trains_the_same() -> None:
    """As its digest says."""
    _, processor = load_model("scale:m2la", "cpu", torch.float32)
    lengths, profiles = [(2, 0.5), (4, 0.3), (8, 0.2)], [("ego", 0.5), ("main", 0.5)]
    seen = []
    for turn in (1, -1):
        told: dict[str, Any] = {
            "lengths": dict(lengths[::turn]),
            "profiles": dict(profiles[::turn]),
        }
        world = WorldDocuments(WorldData(**told, videos=30), processor, 0)
        seen.append([(one.length_s, one.profile) for one in map(world.video, range(30))])
    assert seen[0] == seen[1] and len(set(seen[0])) > 3


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_say_lengths_in_order(name: str) -> None:
    """So that what was trained by them before orders meant nothing is what they train."""
    for stage in load_recipe(name).stages.values():
        data = given(stage).get("data") or {}
        for shares in (data.get("lengths") or {}, data.get("profiles") or {}):
            assert list(shares) == sorted(shares)


def test_where_a_teacher_is_and_when_states_are_kept_decide_no_weights() -> None:
    stage = complete(load_recipe("scale"))["opd"]
    assert isinstance(stage, Opd)
    stage = replace(stage, teacher_model="deep")
    here, there = (replace(stage, teacher=f"http://{host}:1/v1") for host in "ab")
    assert stage_digest(here, 0, "a") == stage_digest(there, 0, "a")
    assert stage_digest(replace(here, teacher_model="x"), 0, "a") != stage_digest(here, 0, "a")
    assert stage_digest(here, 0, "a") != stage_digest(stage, 0, "a")
    assert stage_digest(replace(stage, save_every=7), 0, "a") == stage_digest(stage, 0, "a")


def test_teachers_that_nobody_named_are_told_apart_by_their_addresses() -> None:
    """Both are called `teacher`; an ablation trained once for the two."""
    stage = complete(load_recipe("scale"))["opd"]
    assert isinstance(stage, Opd)
    small, large = (replace(stage, teacher=f"http://{host}:1/v1") for host in ("small", "large"))
    assert stage_digest(small, 0, "a") != stage_digest(large, 0, "a")
    slashed = replace(small, teacher=f"{small.teacher}/")
    assert stage_digest(slashed, 0, "a") == stage_digest(small, 0, "a")
    base = load_recipe("scale")
    rows = {one.teacher: replace(base, stages={"opd": one}) for one in (small, large)}
    assert sum(not work.evaluates for work in graph(rows, (0,))) == 2


def test_a_named_teachers_stage_keeps_its_digest() -> None:
    """Of what was trained before unnamed ones were told apart."""
    data = WorldData(lengths={2: 1.0}, videos=4)
    stage = Opd(
        kind="opd", teacher="http://a:1/v1", teacher_model="deep", steps=2, documents=2, data=data,
        pack_tokens=2048, max_new_tokens=4, optimiser=Optimiser(learning_rate=1e-5),
    )  # fmt: skip
    assert stage_digest(stage, 0, "a").startswith("9a2d8b418666")
    local = replace(stage, teacher="scale:teacher", teacher_model="teacher")
    assert stage_digest(local, 0, "a").startswith("5f97873cd07e")


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "processor_config.json"])
def test_the_start_is_its_processor_too(tmp_path: Path, name: str) -> None:
    start = tmp_path / "start"
    shutil.copytree(resolve_checkpoint("scale:m2la"), start)
    weights, before = weights_digest(start), start_digest(start)
    assert before == start_digest("scale:m2la")
    (start / name).write_text((start / name).read_text() + " ")
    assert start_digest(start) != before and weights_digest(start) == weights
