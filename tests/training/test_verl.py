"""A GSPO stage written for verl: `pytest tests/training/test_verl.py`."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from internvideo3.training.curation.records import DataError, write_rows
from internvideo3.training.recipe import ChatData, Gspo, Recipe, RecipeError, load_recipe
from internvideo3.training.verl import export
from internvideo3.training.verl_reward import compute_score


def row(key: str, url: str, text: str = "<VIDEO_CONTEXT>Which shape is red?") -> dict[str, Any]:
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": text}]
    return {
        "id": key, "answer": "circle", "options": ["square", "circle", "cross"], "category": "x",
        "messages": [{"role": "user", "content": content},
                     {"role": "assistant", "content": "circle"}],
    }  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path, make_video: Any) -> Recipe:
    make_video(tmp_path / "v.mp4", 0, 2)
    rows = [row("a", "v.mp4"), row("b", "gone.mp4"), row("c", "v.mp4", "a <video> of its own"),
            row("d", "v.mp4")]  # fmt: skip
    write_rows(tmp_path / "rl.jsonl", rows)
    base = load_recipe("scale")
    data = ChatData(files={str(tmp_path / "rl.jsonl"): 1.0}, fps=2.0, max_frames=64)
    return replace(base, stages={"gspo": replace(base.stages["gspo"], data=data)})  # type: ignore[arg-type]


def test_rows_have_the_columns_that_verls_data_set_reads(recipe: Recipe, tmp_path: Path) -> None:
    made = export(recipe, "gspo", tmp_path / "out")
    read = pyarrow.parquet.read_table(made.rows).to_pylist()
    assert made.kept == len(read) == 2 and [r["extra_info"]["id"] for r in read] == ["a", "d"]
    assert [why for _, why in made.dropped.items()] == [
        f"the video {tmp_path / 'gone.mp4'} does not exist",
        "its text has a placeholder of verl's (<video> or <image>)",
    ]
    first = read[0]
    assert set(first) == {
        "data_source", "prompt", "videos", "ability", "reward_model", "extra_info"
    }  # fmt: skip
    assert first["prompt"][0]["role"] == "system"
    assert first["prompt"][1] == {"role": "user", "content": "<video>Which shape is red?"}
    (video,) = first["videos"]
    assert video["video"] == (tmp_path / "v.mp4").as_uri()
    assert (video["fps"], video["max_frames"]) == (2.0, 64)
    assert first["reward_model"]["style"] == "rule"


def test_the_configuration_has_the_stages_values_under_verls_names(
    recipe: Recipe, tmp_path: Path
) -> None:
    made = export(recipe, "gspo", tmp_path / "out")
    told, stage = yaml.safe_load(made.config.read_text()), recipe.stages["gspo"]
    assert isinstance(stage, Gspo)
    actor = told["actor_rollout_ref"]["actor"]
    assert actor["policy_loss"]["loss_mode"] == "gspo"
    assert actor["loss_agg_mode"] == "seq-mean-token-mean"
    assert (actor["clip_ratio_low"], actor["clip_ratio_high"]) == (3e-4, 4e-4)
    assert (actor["use_kl_loss"], actor["kl_loss_coef"]) == (True, 0.04)
    assert (actor["ppo_epochs"], actor["optim"]["lr"]) == (stage.updates, 2e-5)
    assert told["actor_rollout_ref"]["rollout"]["n"] == stage.group == 8
    assert told["data"]["train_files"] == str(made.rows) and told["data"]["video_key"] == "videos"
    assert told["data"]["train_batch_size"] == stage.documents
    assert told["trainer"]["total_training_steps"] == stage.steps
    assert told["defaults"] == ["ppo_trainer", "_self_"]
    assert f"--config-path {tmp_path / 'out'} --config-name gspo" in made.config.read_text()


def test_the_schedule_is_carried_over_and_what_is_not_is_told(
    recipe: Recipe, tmp_path: Path
) -> None:
    """verl's own default keeps the rate constant."""
    stage = recipe.stages["gspo"]
    assert isinstance(stage, Gspo)
    optimiser = replace(stage.optimiser, learning_rate=1e-5, final_learning_rate=1e-6)
    stages = {"gspo": replace(stage, optimiser=optimiser)}
    text = export(replace(recipe, stages=stages), "gspo", tmp_path / "out").config.read_text()
    told = yaml.safe_load(text)["actor_rollout_ref"]["actor"]["optim"]
    assert (told["lr_scheduler_type"], told["num_cycles"]) == ("cosine", 0.5)
    assert told["min_lr_ratio"] == pytest.approx(0.1) and told["betas"] == [0.9, 0.95]
    assert "not carried over: shares of the files, total_pixels" in text


def test_a_letter_earns_what_it_earns_in_training_and_a_last_question_is_asked(
    recipe: Recipe, tmp_path: Path
) -> None:
    lettered = row("a", "v.mp4") | {"answer": "B"}
    open_end = row("b", "v.mp4")
    open_end["messages"].append({"role": "user", "content": "And which is blue?"})
    bare = row("c", "v.mp4")
    bare["messages"] = bare["messages"][:1]
    wrong, silent = row("d", "v.mp4") | {"answer": "F"}, row("e", "v.mp4") | {"answer": None}
    write_rows(tmp_path / "rl.jsonl", [lettered, open_end, bare, wrong, silent])
    made = export(recipe, "gspo", tmp_path / "out")
    first, second, third = pyarrow.parquet.read_table(made.rows).to_pylist()
    truth = first["reward_model"]["ground_truth"]
    assert compute_score(first["data_source"], "circle", truth) == 1.0
    assert second["prompt"][-1] == {"role": "user", "content": "And which is blue?"}
    assert third["prompt"][-1]["content"] == "<video>Which shape is red?"
    whys = list(made.dropped.values())
    assert "'F' is none of its options" in whys[0] and "no `answer`" in whys[1]


def test_a_row_on_which_no_response_can_earn_is_not_exported(
    recipe: Recipe, tmp_path: Path
) -> None:
    doc = {"answer": "NA", "options": ["x", "y"], "question_type": "t"}
    hidden = row("a", "v.mp4") | {"benchmark": "motionbench", "doc": doc}
    public = hidden | {"id": "b", "doc": doc | {"answer": "A"}}
    write_rows(tmp_path / "rl.jsonl", [hidden, public])
    made = export(recipe, "gspo", tmp_path / "out")
    (why,) = made.dropped.items()
    assert made.kept == 1 and why[0].endswith("rl.jsonl, row 1")
    assert why[1].startswith("it has no right answer that motionbench could score responses by")


def test_the_reward_that_verl_loads_by_path_is_the_rule_of_training(
    recipe: Recipe, tmp_path: Path
) -> None:
    made = export(recipe, "gspo", tmp_path / "out")
    told = yaml.safe_load(made.config.read_text())["custom_reward_function"]
    reward = runpy.run_path(told["path"])[told["name"]]
    first = pyarrow.parquet.read_table(made.rows).to_pylist()[0]
    asked = first["data_source"], first["reward_model"]["ground_truth"]
    assert json.loads(asked[1])["answer"] == "circle"
    assert reward(asked[0], "circle", asked[1], {}) == 1.0
    assert reward(asked[0], "a cross", asked[1]) == 0.0
    assert reward(asked[0], "no idea", asked[1]) == 0.0


def test_what_cannot_be_exported_is_told(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match="draws them .* Give it `files`"):
        export(load_recipe("scale"), "gspo", out)
    with pytest.raises(RecipeError, match="kind opd; only gspo"):
        export(load_recipe("scale"), "opd", out)
    with pytest.raises(RecipeError, match="no stage 'rl'; there are gspo"):
        export(recipe, "rl", out)
    write_rows(tmp_path / "rl.jsonl", [row("b", "gone.mp4")])
    with pytest.raises(DataError, match=r"no row is left for verl; the first: .*row 1"):
        export(recipe, "gspo", out)
    assert not out.exists()
