"""Runs a recipe: its stages one after another, each from the checkpoint of the one before.

    OUT/1-sft_short/   stage.json, metrics.jsonl, states/, checkpoint/ (when the stage is done)
    OUT/2-sft_long/    ...

A stage whose checkpoint is there is not trained again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internvideo3.model.checkpoint import load_model, resolve_checkpoint, weights_digest
from internvideo3.model.prompt import Prompter
from internvideo3.training.captions import WorldCaptions
from internvideo3.training.chat import ChatDocuments
from internvideo3.training.checkpoints import CheckpointMismatchError
from internvideo3.training.endpoint import Endpoint
from internvideo3.training.loop import Loop, Progress, Stage, describe
from internvideo3.training.policy import Policy, vision_ids
from internvideo3.training.probe import modality_losses, note_losses
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import (
    Convert,
    Cpt,
    Gspo,
    Opd,
    Recipe,
    Sft,
    StageOptions,
    WorldData,
    require,
    stage_digest,
)
from internvideo3.training.remote import PushedWeights, RemoteSampler, RemoteTeacher
from internvideo3.training.rollouts import Sampler
from internvideo3.training.sources import documents_of
from internvideo3.training.stages.convert import convert
from internvideo3.training.stages.cpt import CptStage
from internvideo3.training.stages.gspo import GspoStage, SamplerOf
from internvideo3.training.stages.opd import OpdStage, check_teacher
from internvideo3.training.stages.sft import SftStage


@dataclass(frozen=True)
class Trained:
    """Where a run stands."""

    checkpoint: Path | None
    """Of the last stage; None if a signal stopped the run before."""
    stage: str
    """The last stage that was worked on."""
    folders: tuple[Path, ...]
    """Of the stages that were reached."""


def quiet(name: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


ROLLOUT_S = 3600.0
"""Longest wait for the responses to one prompt, or for weights to be read."""
PUSHED = "pushed"
"""Folder of a stage with the weights that a server samples from."""
Place = Callable[[int, str, str], str]
"""(number of a stage from 1, its name, its digest) → the name of its folder."""


def numbered(number: int, name: str, digest: str) -> str:
    """Folders in the order of the stages."""
    return f"{number}-{name}"


def by_content(number: int, name: str, digest: str) -> str:
    """Folders named after all that decides the weights: recipes that agree so far share them."""
    return f"{name}-{digest[:12]}"


def train(
    recipe: Recipe,
    out: Path,
    progress: Progress = quiet,
    group: Processes | None = None,
    place: Place = numbered,
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
        if isinstance(options, StageOptions):
            require(options.steps, f"stages.{name}.steps")
    name = ""
    folders: list[Path] = []
    for number, (name, options) in enumerate(recipe.stages.items(), start=1):
        begun = weights_digest(resolve_checkpoint(start))
        digest = stage_digest(options, recipe.seed, begun, _teacher_digest(options))
        folder = out / place(number, name, digest)
        folders.append(folder)
        job = Job(name, options, recipe.seed, start, folder, digest)
        if not job.done() and not job.run(progress, group):
            return Trained(None, name, tuple(folders))
        total = options.steps if isinstance(options, StageOptions) else 1
        progress(name, require(total, name), require(total, name))
        start = str(folder / "checkpoint")
    return Trained(Path(start), name, tuple(folders))


def _teacher_digest(options: StageOptions | Convert) -> str | None:
    """Of a teacher in this process; what a server serves, it alone knows."""
    if not isinstance(options, Opd) or options.remote:
        return None
    return weights_digest(resolve_checkpoint(options.teacher))


@dataclass(frozen=True)
class Job:
    """One stage and where it is done."""

    name: str
    options: StageOptions | Convert
    seed: int
    start: str
    folder: Path
    digest: str

    def done(self) -> bool:
        """Whether its checkpoint is there.

        Raises:
            CheckpointMismatchError: The folder holds another recipe's.
        """
        path = self.folder / "checkpoint" / "trained.txt"
        if not path.is_file():
            return False
        if path.read_text().strip() != self.digest:
            raise CheckpointMismatchError(
                f"{self.folder} holds a checkpoint of another recipe, seed or start (see its "
                "stage.json). Give another --out."
            )
        return True

    def run(self, progress: Progress, group: Processes) -> bool:
        """Do it; False if a signal stopped it."""
        if group.first:
            self._describe()
        group.wait()
        model, processor = load_model(self.start, group.device, torch.float32)
        options = self.options
        if isinstance(options, Convert):
            progress(self.name, 0, 1)
            if group.first:
                model = convert(options, model, processor, self.seed, self.folder)
                _write(self.folder, model, Policy(model).state_dict(), processor, self.digest)
            group.wait()
            return True
        group.divide_rows(options.sequence_parallel)
        policy = Policy(
            model, train_vision=options.train_vision, recompute=options.recompute,
            backend=options.attention, sharing=group.sharing,
        )  # fmt: skip
        stage = build_stage(options, processor, policy, self.seed, group, self.folder)
        loop = Loop(
            self.name, options, stage, policy, self.folder, self.digest, self.seed, group, progress
        )
        self._probe("before CPT", policy, processor, group)
        if not loop.run():
            return False
        self._probe("after CPT", policy, processor, group)
        _export(self.folder, policy, processor, self.digest, group)
        if group.first:
            shutil.rmtree(self.folder / PUSHED, ignore_errors=True)
        return True

    def _describe(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "stage.json").exists():
            told = describe(self.options, self.seed, self.start)
            (self.folder / "stage.json").write_text(told)

    def _probe(self, moment: str, policy: Policy, processor: Any, group: Processes) -> None:
        """Losses by modality around continued pretraining."""
        options = self.options
        if not isinstance(options, Cpt) or not isinstance(options.data, WorldData):
            return
        lengths = dict(options.data.lengths)
        losses = modality_losses(policy.eval(), processor, lengths, options.probe)
        if group.first:
            note_losses(self.folder, moment, losses)


def build_stage(
    options: StageOptions, processor: Any, policy: Policy, seed: int, group: Processes,
    folder: Path | None = None,
) -> Stage:  # fmt: skip
    """The stage that the options describe, before the policy is sharded.

    Args:
        options: Of the stage.
        processor: The policy's.
        policy: What learns.
        seed: Of the recipe.
        group: The processes that train.
        folder: The stage's, where weights for a server are written; needed with `rollouts`.
    """
    data = require(options.data, "data")
    if isinstance(options, Cpt) and isinstance(data, WorldData):
        captions = WorldCaptions(data, processor, seed, options.shares.by_kind())
        return CptStage(options, captions, group)
    if isinstance(options, Cpt):
        return CptStage(options, ChatDocuments(data, processor, seed), group)
    documents = documents_of(data, processor, seed)
    if isinstance(options, Sft):
        return SftStage(options, documents, group)
    assert isinstance(options, Gspo | Opd)
    if options.rollouts:
        sampler_of = _remote_sampler_of(options, processor, require(folder, "folder"), group)
    else:
        sampler_of = _sampler_of(policy, processor, options.max_new_tokens, group)
    if isinstance(options, Gspo):
        reference = policy.copied()
        return GspoStage(options, documents, reference, sampler_of, seed, group)
    if options.remote:
        endpoint = Endpoint(url=options.teacher, model=options.teacher_model)
        remote = RemoteTeacher(endpoint, processor.tokenizer)
        return OpdStage(options, documents, remote, sampler_of, seed, group)
    teacher, theirs = load_model(options.teacher, group.device, torch.float32)
    check_teacher(processor, theirs)
    return OpdStage(options, documents, policy.beside(teacher), sampler_of, seed, group)


def _sampler_of(policy: Policy, processor: Any, max_new_tokens: int, group: Processes) -> SamplerOf:
    """Samples with the policy itself, or under FSDP with a whole copy that follows its weights."""
    copy = None if group.count == 1 else policy.copied()
    barred = vision_ids(policy.model, processor)

    def sampler_of(policy: Policy) -> Sampler:
        if copy is not None:
            copy.load_state_dict(group.whole_weights(policy))
        model = (copy or policy).model.eval()
        return Sampler(model, processor, barred, max_new_tokens)

    return sampler_of


def _remote_sampler_of(
    options: Gspo | Opd, processor: Any, folder: Path, group: Processes
) -> SamplerOf:
    """Samples at servers, to which the policy's weights are pushed before each step."""
    addresses = [one.strip() for one in str(options.rollouts).split(",")]
    endpoints = [Endpoint(url=one, model="policy", timeout_s=ROLLOUT_S) for one in addresses]
    prompter = Prompter(processor, {"do_resize": False})

    def sampler_of(policy: Policy) -> RemoteSampler:
        weights = group.whole_weights(policy) if group.count > 1 else policy.state_dict()
        digest = ""
        if group.first:
            _write(folder, policy.model, weights, processor, "for a server", PUSHED)
            digest = weights_digest(folder / PUSHED)
        digest = group.from_first(digest)
        pushed = [PushedWeights(one, (folder / PUSHED).resolve(), digest) for one in endpoints]
        for one in pushed if group.first else []:
            one.push()
        group.wait()
        barred = vision_ids(policy.model, processor)
        mine = pushed[group.rank % len(pushed)]
        return RemoteSampler(mine, prompter, barred, options.max_new_tokens)

    return sampler_of


def _export(folder: Path, policy: Policy, processor: Any, digest: str, group: Processes) -> None:
    """The trained model as a checkpoint that every command takes; whole or not there."""
    weights = group.whole_weights(policy) if group.count > 1 else policy.state_dict()
    if group.first:
        _write(folder, policy.model, weights, processor, digest)
    group.wait()


def _write(
    folder: Path, model: Any, weights: Any, processor: Any, digest: str, name: str = "checkpoint"
) -> None:
    part = folder / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    named = {key.removeprefix("model."): value.cpu() for key, value in weights.items()}
    if model.config.tie_word_embeddings:
        named.pop("lm_head.weight", None)
    model.save_pretrained(part, state_dict=named)
    processor.save_pretrained(part)
    (part / "trained.txt").write_text(digest + "\n")
    os.sync()
    shutil.rmtree(folder / name, ignore_errors=True)
    part.rename(folder / name)
