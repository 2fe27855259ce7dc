"""Runs a recipe: its stages one after another, each from the checkpoint of the one before.

    OUT/1-sft_short/   stage.json, metrics.jsonl, states/, checkpoint/ (when the stage is done)
    OUT/2-sft_long/    ...

A stage whose checkpoint is there is not trained again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from internvideo3.model.checkpoint import (
    bars_for,
    load_model,
    processor_digest,
    resolve_checkpoint,
    weights_digest,
)
from internvideo3.model.prompt import Prompter
from internvideo3.training.captions import WorldCaptions
from internvideo3.training.chat import ChatDocuments, RowLimits, shares_of
from internvideo3.training.checkpoints import CheckpointMismatchError, newest
from internvideo3.training.endpoint import Endpoint
from internvideo3.training.loop import (
    Loop,
    Progress,
    Stage,
    TrainingError,
    Watch,
    describe,
    together,
)
from internvideo3.training.policy import Policy, vision_ids
from internvideo3.training.probe import held_of, measured_on, modality_losses, note_losses
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import (
    ChatData,
    Convert,
    Cpt,
    Gspo,
    Modality,
    Opd,
    Recipe,
    RecipeError,
    Sft,
    StageOptions,
    WorldData,
    complete,
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
    stopped: bool = False
    """Whether a signal came during the last step of all."""


def quiet(name: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def unwatched(name: str, row: Mapping[str, float]) -> None:
    """Metrics that nobody watches."""


KINDS_APART = 0.01
"""How far shares of kinds of documents may be from those that were asked for."""
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
    watch: Watch = unwatched,
) -> Trained:
    """Train what is missing of a recipe; continues an interrupted run.

    Args:
        recipe: what to train.
        out: folder of the stages' folders.
        progress: told each stage, its steps so far and its steps in all.
        group: the processes that train it; by default this one alone.
        place: names a stage's folder.
        watch: told each stage's metrics after each step.

    Raises:
        RecipeError: Something that training needs is not set, or makes no sense.
        CheckpointMismatchError: The folder holds the states of another recipe.
        TrainingError: Loss or gradients are not finite.
    """
    group = group or Processes()
    stages = complete(recipe)
    start, name = str(recipe.start), ""
    check_files(stages)
    folders: list[Path] = []
    stopped = checked = False
    for number, (name, options) in enumerate(stages.items(), start=1):
        begun = start_digest(start)
        digest = stage_digest(options, recipe.seed, begun, _teacher_digest(options))
        folder = out / place(number, name, digest)
        folders.append(folder)
        job = Job(name, options, recipe.seed, start, folder, digest)
        if not (done := job.done()) and not checked:
            check_mixtures(dict(list(stages.items())[number - 1 :]))
            checked = True
        ended = Ended.FINISHED if done else job.run(progress, group, watch)
        stopped = ended is Ended.FINISHED_AND_STOPPED
        last = number == len(stages)
        if ended is Ended.STOPPED or (stopped and not last):
            return Trained(None, name, tuple(folders))
        total = options.steps if isinstance(options, StageOptions) else 1
        progress(name, require(total, name), require(total, name))
        start = str(folder / "checkpoint")
    return Trained(Path(start), name, tuple(folders), stopped)


def start_digest(name: str | Path) -> str:
    """Digest of all of a checkpoint that decides what is trained from it.

    Its tokenizer, template and picture sizes decide that as its weights do; digests of runs are of
    weights alone and stay so.

    Raises:
        CheckpointError: It is not there, or has no weights.
    """
    folder = resolve_checkpoint(name)
    return f"{weights_digest(folder)} {processor_digest(folder)}"


def check_files(stages: Mapping[str, StageOptions | Convert]) -> None:
    """A file that a later stage needs is missed before the first one is trained.

    Raises:
        RecipeError: It is not there.
    """
    named = {
        f"stages.{name}": [*data.files, *(getattr(options, "held_out", None) or ())]
        for name, options in stages.items()
        if isinstance(data := options.data, ChatData)
    }
    missing = {
        f"{file} ({where})" for where, files in named.items() for file in files
        if not Path(file).is_file()
    }  # fmt: skip
    if missing:
        raise RecipeError(
            f"the recipe's files {', '.join(sorted(missing))} do not exist (from {Path.cwd()})"
        )


def check_mixtures(stages: Mapping[str, StageOptions | Convert]) -> None:
    """Files that make another mixture than is asked for are told before anything is trained.

    Raises:
        RecipeError: A stage's do.
        DataError: A file cannot be read.
    """
    for options in stages.values():
        if isinstance(options, Cpt) and isinstance(options.data, ChatData):
            check_kinds(options.shares.by_kind(), _shares(tuple(options.data.files.items())))


@lru_cache(maxsize=4)
def _shares(files: tuple[tuple[str, float], ...]) -> dict[Modality, float]:
    """Variants of a recipe ask the same of the same, large files."""
    return shares_of(dict(files))


def _teacher_digest(options: StageOptions | Convert) -> str | None:
    """Of a teacher in this process; what a server serves, it alone knows."""
    if not isinstance(options, Opd) or options.remote:
        return None
    return weights_digest(resolve_checkpoint(options.teacher))


class Ended(Enum):
    """How the work on a stage ended."""

    FINISHED = auto()
    FINISHED_AND_STOPPED = auto()
    """A signal came during its last step."""
    STOPPED = auto()
    """A signal came before; its state is saved."""


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

    def run(self, progress: Progress, group: Processes, watch: Watch = unwatched) -> Ended:
        """Do it, to its end or to a signal."""
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
            return Ended.FINISHED
        group.divide_rows(options.sequence_parallel)
        _check_documents(self.name, options, group)
        policy = Policy(
            model, train_vision=options.train_vision, recompute=options.recompute,
            backend=options.attention, sharing=group.sharing,
        )  # fmt: skip
        stage = build_stage(options, processor, policy, self.seed, group, self.folder)
        loop = Loop(
            self.name, options, stage, policy, self.folder, self.digest, self.seed, group,
            progress, watch,
        )  # fmt: skip
        self._probe("before CPT", policy, processor, group)
        if not loop.run():
            return Ended.STOPPED
        self._probe("after CPT", policy, processor, group)
        _export(self.folder, policy, processor, self.digest, group)
        if group.first:
            shutil.rmtree(self.folder / PUSHED, ignore_errors=True)
        return Ended.FINISHED_AND_STOPPED if loop.stopped else Ended.FINISHED

    def _describe(self) -> None:
        """Say what is trained here, while nothing is that was begun as another stage.

        What decides no weights, such as the files of `held_out`, may be another when a stage goes
        on: then the losses before it are measured anew, from its start.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "stage.json"
        held = path.read_text() if path.exists() else ""
        if held and self.digest not in held and newest(self.folder / "states") is not None:
            return  # it is of that state, which is refused when it is read
        told = describe(self.options, self.seed, self.start, self.digest)
        if held != told:
            (self.folder / "losses.json").unlink(missing_ok=True)
            path.write_text(told)

    def _probe(self, moment: str, policy: Policy, processor: Any, group: Processes) -> None:
        """Losses by modality around continued pretraining."""
        options = self.options
        held = held_of(options, processor) if isinstance(options, Cpt) else None
        if held is None or not isinstance(options, Cpt):
            return
        documents = measured_on(options)
        losses = modality_losses(policy.eval(), held, options.probe)
        if group.first:
            note_losses(self.folder, moment, losses, documents)


def _check_documents(name: str, options: StageOptions, group: Processes) -> None:
    """Every process has a document of each step: one without would leave the others waiting."""
    sharing = group.count // group.parts
    if options.documents < sharing:
        raise RecipeError(
            f"stages.{name}.documents is {options.documents}, and {sharing} processes (or groups "
            "that share rows) need one each; raise it or start fewer"
        )


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
    if isinstance(options, Cpt) and isinstance(data, ChatData):
        rows = ChatDocuments(data, processor, seed, RowLimits(options.pack_tokens))
        return CptStage(options, rows, group)
    documents = documents_of(data, processor, seed, limits_of(options))
    if isinstance(options, Sft):
        return SftStage(options, documents, group)
    assert isinstance(options, Gspo | Opd)
    if options.rollouts:
        sampler_of = _remote_sampler_of(options, processor, require(folder, "folder"), group)
    else:
        sampler_of = _sampler_of(options, policy, processor, group)
    if isinstance(options, Gspo):
        reference = policy.copied()
        group.shard(reference)
        return GspoStage(options, documents, reference, sampler_of, seed, group)
    if options.remote:
        endpoint = Endpoint(url=options.teacher, model=options.teacher_model)
        remote = RemoteTeacher(endpoint, processor.tokenizer)
        return OpdStage(options, documents, remote, sampler_of, seed, group)
    teacher, theirs = load_model(options.teacher, group.device, torch.float32)
    check_teacher(processor, theirs)
    beside = policy.beside(teacher)
    group.shard(beside)
    return OpdStage(options, documents, beside, sampler_of, seed, group)


def limits_of(options: StageOptions) -> RowLimits:
    """What documents of a stage have to fit and to hold.

    Raises:
        RecipeError: The responses to one prompt fill a row.
    """
    if not isinstance(options, Gspo | Opd):
        return RowLimits(options.pack_tokens)
    answers = options.group * (options.max_new_tokens + 1)
    if answers >= options.pack_tokens:
        raise RecipeError(
            f"{options.group} responses of up to {options.max_new_tokens} tokens leave no room in "
            f"a row of pack_tokens = {options.pack_tokens}; raise it, or lower group or "
            "max_new_tokens"
        )
    return RowLimits(options.pack_tokens, answers, scored=isinstance(options, Gspo))


def check_kinds(asked: Mapping[Modality, float], found: Mapping[Modality, float]) -> None:
    """The kinds of documents that files hold are those that the mixture asks for.

    Raises:
        RecipeError: A share is another by more than `KINDS_APART`.
    """
    if all(abs(asked[kind] - found[kind]) <= KINDS_APART for kind in asked):
        return
    told = ", ".join(f"{kind} {found[kind]:.1%} for {asked[kind]:.1%}" for kind in asked)
    raise RecipeError(
        f"the files make another mixture than `shares` asks for: {told}. Change the shares of "
        "`data.files`, or `shares`."
    )


def _sampler_of(options: Gspo | Opd, policy: Policy, processor: Any, group: Processes) -> SamplerOf:
    """Samples with the policy itself, or with a whole copy that follows its weights.

    A copy is needed where the policy is divided, and where sampling is in bf16, in one process as
    in many.
    """
    itself = group.count == 1 and not options.bfloat16
    copy = None if itself else policy.copied(torch.bfloat16 if options.bfloat16 else None)
    barred = vision_ids(policy.model, processor)

    def sampler_of(policy: Policy) -> Sampler:
        if copy is not None:
            group.fill(policy, copy)
        model = (copy or policy).model.eval()
        return Sampler(model, processor, barred, options.max_new_tokens)

    return sampler_of


def _remote_sampler_of(
    options: Gspo | Opd, processor: Any, folder: Path, group: Processes
) -> SamplerOf:
    """Samples at servers, to which the policy's weights are pushed before each step."""
    addresses = [one.strip() for one in str(options.rollouts).split(",")]
    endpoints = [Endpoint(url=one, model="policy", timeout_s=ROLLOUT_S) for one in addresses]
    prompter = Prompter(processor, {"do_resize": False})

    def sampler_of(policy: Policy) -> RemoteSampler:
        weights = _written_weights(policy, group)
        digest = ""
        if group.first:
            _write(folder, policy.model, weights, processor, "for a server", PUSHED)
            digest = weights_digest(folder / PUSHED)
        digest = group.from_first(digest)
        pushed = [PushedWeights(one, (folder / PUSHED).resolve(), digest) for one in endpoints]
        # A server that is down ends all processes; the others would wait for this one for ever.
        together(group, lambda: _push(pushed) if group.first else None)
        barred = vision_ids(policy.model, processor)
        # Of the processes that share rows one asks; all shares of rows are dealt to the servers.
        mine = pushed[group.documents_of_step[0] % len(pushed)]
        return RemoteSampler(mine, prompter, barred, options.max_new_tokens)

    return sampler_of


def _written_weights(policy: Policy, group: Processes) -> dict[str, Any]:
    """A policy's whole weights, for the first process to write."""
    return group.whole_weights(policy) if group.count > 1 else policy.state_dict()


def _push(servers: Sequence[PushedWeights]) -> None:
    for one in servers:
        one.push()


def _export(folder: Path, policy: Policy, processor: Any, digest: str, group: Processes) -> None:
    """The trained model as a checkpoint that every command takes; whole or not there."""
    weights = _written_weights(policy, group)
    if group.first:
        _write(folder, policy.model, weights, processor, digest)
    group.wait()


def _write(
    folder: Path, model: Any, weights: Any, processor: Any, digest: str, name: str = "checkpoint"
) -> None:
    part = folder / f"{name}.part"
    try:
        _write_part(part, model, weights, processor, digest)
        shutil.rmtree(folder / name, ignore_errors=True)
        part.rename(folder / name)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(
            f"{folder / name} cannot be written: {reason}. The stage's last state is kept; make "
            "room and repeat the command."
        ) from error


def _write_part(part: Path, model: Any, weights: Any, processor: Any, digest: str) -> None:
    shutil.rmtree(part, ignore_errors=True)
    named = {key.removeprefix("model."): value.cpu() for key, value in weights.items()}
    if model.config.tie_word_embeddings:
        named.pop("lm_head.weight", None)
    with bars_for(sum(value.nbytes for value in named.values())):
        model.save_pretrained(part, state_dict=named)
    processor.save_pretrained(part)
    (part / "trained.txt").write_text(digest + "\n")
    os.sync()
