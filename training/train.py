"""Runs a recipe: its stages one after another, each from the checkpoint of the one before.

    OUT/1-sft_short/   stage.json, metrics.jsonl, states/, checkpoint/ (when the stage is done)
    OUT/2-sft_long/    ...

A stage whose checkpoint is there is not trained again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internvideo3.model.checkpoint import load_model, resolve_checkpoint, weights_digest
from internvideo3.training.documents import WorldDocuments
from internvideo3.training.loop import Loop, Progress, Stage, describe
from internvideo3.training.policy import Policy, vision_ids
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import (
    Gspo,
    Opd,
    Recipe,
    Sft,
    StageOptions,
    require,
    stage_digest,
)
from internvideo3.training.rollouts import Sampler
from internvideo3.training.stages.gspo import GspoStage
from internvideo3.training.stages.opd import OpdStage, check_teacher
from internvideo3.training.stages.sft import SftStage


@dataclass(frozen=True)
class Trained:
    """Where a run stands."""

    checkpoint: Path | None
    """Of the last stage; None if a signal stopped the run before."""
    stage: str
    """The last stage that was worked on."""


def quiet(name: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def train(
    recipe: Recipe, out: Path, progress: Progress = quiet, group: Processes | None = None
) -> Trained:
    """Train what is missing of a recipe; continues an interrupted run.

    Raises:
        RecipeError: Something that training needs is not set, or makes no sense.
        CheckpointMismatchError: The folder holds the states of another recipe.
        TrainingError: Loss or gradients are not finite.
    """
    group = group or Processes()
    start = str(require(recipe.start, "start"))
    for name, options in recipe.stages.items():
        require(options.data, f"stages.{name}.data")
        require(options.steps, f"stages.{name}.steps")
    name = ""
    for number, (name, options) in enumerate(recipe.stages.items(), start=1):
        folder = out / f"{number}-{name}"
        if not train_stage(name, options, recipe.seed, start, folder, progress, group):
            return Trained(None, name)
        start = str(folder / "checkpoint")
    return Trained(Path(start), name)


def train_stage(
    name: str,
    options: StageOptions,
    seed: int,
    start: str,
    folder: Path,
    progress: Progress,
    group: Processes,
) -> bool:
    """Train one stage into a folder; False if a signal stopped it."""
    model, processor = load_model(start, group.device, torch.float32)
    digest = stage_digest(options, seed, weights_digest(resolve_checkpoint(start)))
    if _is_done(folder, digest):
        progress(name, require(options.steps, name), require(options.steps, name))
        return True
    if group.first:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "stage.json").exists():
            (folder / "stage.json").write_text(describe(options, seed, start))
    group.wait()
    policy = Policy(model, train_vision=options.train_vision, recompute=options.recompute)
    stage = build_stage(options, processor, policy, seed, group)
    loop = Loop(name, options, stage, policy, folder, digest, seed, group, progress)
    if not loop.run():
        return False
    _export(folder, policy, processor, digest, group)
    return True


def build_stage(
    options: StageOptions, processor: Any, policy: Policy, seed: int, group: Processes
) -> Stage:
    """The stage that the options describe, before the policy is sharded."""
    documents = WorldDocuments(require(options.data, "data"), processor, seed)
    if isinstance(options, Sft):
        return SftStage(options, documents, group)
    assert isinstance(options, Gspo | Opd)
    sampler_of = _sampler_of(policy, processor, options.max_new_tokens, group)
    if isinstance(options, Gspo):
        reference = Policy(deepcopy(policy.model).eval())
        return GspoStage(options, documents, reference, sampler_of, seed, group)
    teacher, theirs = load_model(options.teacher, group.device, torch.float32)
    check_teacher(processor, theirs)
    return OpdStage(options, documents, Policy(teacher.eval()), sampler_of, seed, group)


def _sampler_of(
    policy: Policy, processor: Any, max_new_tokens: int, group: Processes
) -> Callable[[Policy], Sampler]:
    """Samples with the policy itself, or under FSDP with a whole copy that follows its weights."""
    copy = None if group.count == 1 else Policy(deepcopy(policy.model))
    barred = vision_ids(policy.model, processor)

    def sampler_of(policy: Policy) -> Sampler:
        if copy is not None:
            copy.load_state_dict(group.whole_weights(policy))
        model = (copy or policy).model.eval()
        return Sampler(model, processor, barred, max_new_tokens)

    return sampler_of


def _export(folder: Path, policy: Policy, processor: Any, digest: str, group: Processes) -> None:
    """The trained model as a checkpoint that every command takes; whole or not there."""
    weights = group.whole_weights(policy) if group.count > 1 else policy.state_dict()
    if group.first:
        part = folder / "checkpoint.part"
        shutil.rmtree(part, ignore_errors=True)
        named = {key.removeprefix("model."): value.cpu() for key, value in weights.items()}
        if policy.model.config.tie_word_embeddings:
            named.pop("lm_head.weight", None)
        policy.model.save_pretrained(part, state_dict=named)
        processor.save_pretrained(part)
        (part / "trained.txt").write_text(digest + "\n")
        os.sync()
        part.rename(folder / "checkpoint")
    group.wait()


def _is_done(folder: Path, digest: str) -> bool:
    path = folder / "checkpoint" / "trained.txt"
    if not path.is_file():
        return False
    if path.read_text().strip() != digest:
        raise ValueError(
            f"{folder} holds a checkpoint of another recipe, seed or start (see its stage.json). "
            "Give another --out."
        )
    return True
