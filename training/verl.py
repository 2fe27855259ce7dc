"""A GSPO stage for verl's trainer: rows as Parquet, options as YAML, the same rule as its reward.

Only files are written; neither verl nor Ray is imported. Fields are those of volcengine/verl, read
in `verl/trainer/config/ppo_trainer.yaml` @1acd108 (data, algorithm, rollout, trainer, reward),
`actor/actor.yaml` @03d67c6 (`policy_loss.loss_mode`, clipping, KL), `optim/fsdp.yaml` @4965d66 (the
schedule) and `data/legacy_data.yaml` @09d3a66; a video is a mapping as
`verl/utils/dataset/vision_utils.py` @0709889 takes it. Other versions may have other ones, and
nothing of it was run with verl here.

    OUT/train.parquet   data_source, prompt, videos, ability, reward_model, extra_info
    OUT/gspo.yaml       over verl's own `ppo_trainer`
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from internvideo3.model.checkpoint import resolve_checkpoint
from internvideo3.model.scale.build import SYSTEM_PROMPT
from internvideo3.training import verl_reward
from internvideo3.training.chat import MARK, asked_of, doc_of
from internvideo3.training.curation.records import DataError, Row, read_rows
from internvideo3.training.documents import SCORED_AS, check_scored
from internvideo3.training.recipe import ChatData, Gspo, Open, Recipe, RecipeError, require

PLACE = "<video>"
"""Where verl's data set puts a video into a prompt."""
NOT_CARRIED = """\
# Of the recipe's stage these are not carried over: shares of the files, total_pixels, gap_cap,
# train_vision, bfloat16, and that vectors (norms, biases) do not decay.
"""
PLACEHOLDERS = re.compile(r"<(video|image)>")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    rows: Path
    config: Path
    kept: int
    dropped: dict[str, str]
    """File and number of a row → why verl could not use it."""


def export(recipe: Recipe, name: str, out: Path) -> Exported:
    """Write a recipe's GSPO stage for verl.

    Args:
        recipe: Its `start` is the model's path.
        name: Of the stage.
        out: Folder; made if missing.

    Raises:
        RecipeError: The stage is not there, is no GSPO stage, or draws its videos.
        DataError: A file cannot be read, or no row is left.
    """
    stage = _gspo(recipe, name)
    data = stage.data
    if not isinstance(data, ChatData):
        raise RecipeError(
            f"verl reads videos from files, and stages.{name}.data draws them (or is not set). "
            "Give it `files` in the chat form (training/README.md shows how)."
        )
    kept, dropped = _rows(data)
    if not kept:
        first = next(iter(dropped.items()), ("", "the files are empty"))
        raise DataError(f"no row is left for verl; the first: {first[0]} {first[1]}")
    rows, config = out / "train.parquet", out / f"{name}.yaml"
    told = yaml.safe_dump(_config(recipe, stage, rows.resolve(), name), sort_keys=False)
    out.mkdir(parents=True, exist_ok=True)
    _write(kept, rows)
    where = f"--config-path {out.resolve()} --config-name {name}"
    config.write_text(f"# python -m verl.trainer.main_ppo {where}\n{NOT_CARRIED}{told}")
    return Exported(rows, config, len(kept), dropped)


def _gspo(recipe: Recipe, name: str) -> Gspo:
    stage = recipe.stages.get(name)
    if stage is None:
        raise RecipeError(f"no stage {name!r}; there are {', '.join(recipe.stages)}")
    if isinstance(stage, Open):
        raise RecipeError(f"stages.{name} leaves open: {', '.join(stage.missing)}; set it first")
    if not isinstance(stage, Gspo):
        raise RecipeError(f"stages.{name} is of kind {stage.kind}; only gspo is exported for verl")
    return stage


def _rows(data: ChatData) -> tuple[list[Row], dict[str, str]]:
    """All rows of the files, in their order; shares are verl's sampler's to keep."""
    kept: list[Row] = []
    dropped: dict[str, str] = {}
    for file in data.files:
        for number, row in enumerate(read_rows(Path(file)), start=1):
            try:
                kept.append(_row(row, Path(file).parent, data, len(kept)))
            except (ValueError, LookupError, TypeError) as error:
                dropped[f"{file}, row {number}"] = str(error)
    return kept, dropped


def _row(row: Row, folder: Path, data: ChatData, index: int) -> Row:
    asked = asked_of(row["messages"])
    videos: list[Row] = []
    prompt = [_message(message, folder, data, videos) for message in asked]
    if len(videos) != 1:
        raise DataError(f"a rollout needs exactly one video, this row has {len(videos)}")
    if prompt[0]["role"] != "system":
        prompt.insert(0, {"role": "system", "content": SYSTEM_PROMPT})
    doc = row.get("doc")
    if doc is None and row.get("answer") is None:
        raise DataError("it has no `answer` to score responses by")
    doc = doc_of(row) if doc is None else doc
    check_scored(row.get("benchmark"), doc)
    return {
        "data_source": row.get("benchmark") or SCORED_AS,
        "prompt": prompt,
        "videos": videos,
        "ability": row.get("category", "all"),
        "reward_model": {"style": "rule", "ground_truth": json.dumps(doc)},
        "extra_info": {"index": index, "id": str(row.get("id")), "split": "train"},
    }


def _message(message: Mapping[str, Any], folder: Path, data: ChatData, videos: list[Row]) -> Row:
    """A message as text with places for its videos, which are added to the list."""
    content = message["content"]
    parts: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = ""
    for part in parts:
        if part["type"] == "video_url":
            videos.append(_video(folder / part["video_url"]["url"], data))
            text += PLACE
        elif part["type"] == "text":
            said = part["text"].replace(MARK, "")
            if PLACEHOLDERS.search(said):
                raise DataError("its text has a placeholder of verl's (<video> or <image>)")
            text += said
        else:
            raise DataError(f"a part of type {part['type']!r} is not exported")
    return {"role": message["role"], "content": text}


def _video(path: Path, data: ChatData) -> Row:
    if not path.is_file():
        raise DataError(f"the video {path} does not exist")
    return {
        "type": "video", "video": path.resolve().as_uri(), "fps": data.fps,
        "max_frames": data.max_frames, "min_pixels": data.min_pixels,
        "max_pixels": data.max_pixels,
    }  # fmt: skip


def _write(rows: list[Row], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    part = path.with_suffix(".part")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), part)
    part.replace(path)


def _config(recipe: Recipe, stage: Gspo, rows: Path, name: str) -> Row:
    """The stage's options under verl's names, over its own defaults."""
    optimiser, steps = stage.optimiser, require(stage.steps, f"stages.{name}.steps")
    return {
        "hydra": {"searchpath": ["pkg://verl.trainer.config"]},
        "defaults": ["ppo_trainer", "_self_"],
        "data": {
            "train_files": str(rows), "val_files": str(rows), "prompt_key": "prompt",
            "video_key": "videos", "reward_fn_key": "data_source", "truncation": "error",
            "train_batch_size": stage.documents, "max_prompt_length": stage.pack_tokens,
            "max_response_length": stage.max_new_tokens, "shuffle": True,
        },
        "algorithm": {
            "adv_estimator": "grpo", "norm_adv_by_std_in_grpo": True, "use_kl_in_reward": False,
        },
        "actor_rollout_ref": {
            "model": {"path": str(resolve_checkpoint(str(require(recipe.start, "start"))))},
            "actor": {
                "policy_loss": {"loss_mode": "gspo"}, "loss_agg_mode": "seq-mean-token-mean",
                "clip_ratio_low": stage.clip_low, "clip_ratio_high": stage.clip_high,
                "use_kl_loss": stage.kl_weight > 0, "kl_loss_coef": stage.kl_weight,
                "kl_loss_type": "low_var_kl", "entropy_coeff": 0,
                "ppo_mini_batch_size": stage.documents, "ppo_epochs": stage.updates,
                "grad_clip": optimiser.clip_norm,
                "optim": {
                    "lr": optimiser.learning_rate, "lr_warmup_steps_ratio": optimiser.warmup,
                    "weight_decay": optimiser.weight_decay, "betas": list(optimiser.betas),
                    "lr_scheduler_type": "cosine", "num_cycles": 0.5,
                    "min_lr_ratio": optimiser.final_learning_rate / optimiser.learning_rate,
                },
            },
            "rollout": {"n": stage.group, "temperature": 1.0, "top_p": 1.0},
        },
        "custom_reward_function": {
            "path": str(Path(verl_reward.__file__).resolve()), "name": "compute_score",
        },
        "trainer": {
            "total_training_steps": steps, "save_freq": stage.save_every,
            "val_before_train": False, "test_freq": -1,
        },
    }  # fmt: skip
