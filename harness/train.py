"""`internvideo3 train`: what the command does, without printing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from transformers import Qwen3VLConfig

from internvideo3.harness.locks import lock
from internvideo3.harness.ranks import is_first
from internvideo3.model.checkpoint import read_config, resolve_checkpoint
from internvideo3.model.config import InternVideo3Config
from internvideo3.training.follow import Row
from internvideo3.training.loop import TrainingError, Watch
from internvideo3.training.plan import (
    FLOAT_BYTES,
    GIB,
    count_weights,
    latent_config,
    plan_step,
    released_config,
)
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import KINDS, Open, Stage, load_recipe
from internvideo3.training.train import Trained, quiet, train, unwatched

LOCK = ".train.lock"
"""File in a folder while a command trains in it."""
RELEASED = "8b"
"""Name of the released shape, which is no checkpoint."""
WHOLE_TOKENS = 65536
"""Rows longer than this are also planned as parts, as sequence parallelism would have them."""
SPLITS = (1, 2, 4, 8)


def run_training(
    recipe: str,
    out: Path,
    threads: int,
    progress: Callable[[str, int, int], None],
    device: str | None = None,
    watch: Watch = unwatched,
) -> Trained:
    """Train what is missing of a recipe, alone or as one process of torchrun's.

    Raises:
        ValueError: The recipe cannot be used, or training cannot go on.
    """
    read = load_recipe(recipe)
    torch.set_num_threads(threads)
    group = Processes(device)
    try:
        with alone_in(out, lambda refused: bool(group.most(int(refused)))):
            return train(read, out, progress if group.first else quiet, group, watch=watch)
    finally:
        group.leave()


@contextmanager
def alone_in(out: Path, any_of: Callable[[bool], bool] = bool) -> Iterator[None]:
    """No other command trains in a folder until this ends, or its process does.

    Two would write one state, and each take away what the other reads. The first process of a
    launch has the folder for all.

    Args:
        out: The folder; made if missing.
        any_of: Whether what a process says is true of any process of the launch, which then all
            end together: one alone would leave the others waiting.

    Raises:
        TrainingError: Another command does, or the folder cannot be written.
    """
    made = not out.exists()
    held, failure = _claimed(out) if is_first() else (None, None)
    if any_of(failure is not None):
        raise _refused(out, failure) from failure
    try:
        yield
    finally:
        if held is not None:
            _let_go(out, held, made)


def _claimed(out: Path) -> tuple[IO[str] | None, OSError | None]:
    """A folder's lock, or why it is not to be had."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return lock(out / LOCK), None
    except OSError as error:
        return None, error


def _let_go(out: Path, held: IO[str], made: bool) -> None:
    (out / LOCK).unlink(missing_ok=True)
    held.close()
    if made:
        with suppress(OSError):  # what is kept is not taken away
            out.rmdir()


def _refused(out: Path, failure: OSError | None) -> TrainingError:
    if failure is None or isinstance(failure, BlockingIOError):
        return TrainingError(
            f"another command trains in {out}. Wait for it, or give another --out."
        )
    return TrainingError(f"{out} cannot be written: {failure.strerror}. Give another --out.")


def plan_lines(
    recipe: str,
    model: str | None,
    gpus: int,
    progress: Callable[[str, int, int], None] = quiet,
) -> list[str]:
    """What each stage of a recipe needs on one of so many GPUs; long rows whole and in parts.

    Args:
        recipe: Name or file.
        model: `8b` for the released shape, or a checkpoint with a vision tower; None: the recipe's
            own start, or `8b` where it has none.
        gpus: GPUs that share weights, gradients and moments.
        progress: Told each stage, its lines so far and its lines in all.

    Raises:
        ValueError: The recipe or a checkpoint cannot be used.
    """
    read = load_recipe(recipe)
    name = model or read.start or RELEASED
    config = _config_of(name)
    written = FLOAT_BYTES * count_weights(config).total
    lines = [f"GiB on each GPU, every token a vision token and learnt. Planned: {name}, "
             f"{_shape(config)}. The first process writes its weights from the host: "
             f"{_gib(written)}."]  # fmt: skip
    for stage_name, stage in read.stages.items():
        if stage.kind != "convert":
            told = partial(progress, stage_name)
            lines += [f"{stage_name}: {line}" for line in _stage_lines(stage, config, gpus, told)]
        elif not isinstance(config, InternVideo3Config):
            config = latent_config(config, _value(stage, "preset"))
            lines.append(f"{stage_name}: from here on {_shape(config)}.")
    return lines


def _stage_lines(
    stage: Stage | Open, config: Any, gpus: int, progress: Callable[[int, int], None]
) -> list[str]:
    """A line for each way to divide its rows that the GPUs and the heads allow."""
    tokens, own = _value(stage, "pack_tokens"), _value(stage, "sequence_parallel") or 1
    if tokens is None:
        return ["pack_tokens is not set, so there is no plan."]
    heads = config.text_config.num_key_value_heads
    tried = SPLITS if tokens > WHOLE_TOKENS else ()
    parts = sorted(n for n in {*tried, own} if not gpus % n and not heads % n)
    lines = [] if own in parts else [_why_not(own, gpus, heads)]
    for done, count in enumerate(parts):
        progress(done, len(parts))
        lines.append(_plan_line(stage, config, gpus, count))
        progress(done + 1, len(parts))
    return lines


def _why_not(own: int, gpus: int, heads: int) -> str:
    """Why rows cannot be divided as the recipe says."""
    if gpus % own:
        needed = f"needs a multiple of {own} GPUs; --gpus is {gpus}"
    else:
        needed = f"does not divide {heads} key/value heads"
    return f"sequence_parallel is {own}, which {needed}. So it cannot run."


def _plan_line(stage: Stage | Open, config: Any, gpus: int, parts: int) -> str:
    row = Row(
        tokens=_value(stage, "pack_tokens"),
        parts=parts,
        recompute=_value(stage, "recompute"),
        bfloat16=bool(_value(stage, "bfloat16")),
        train_vision=_value(stage, "train_vision"),
    )
    frozen = {"reference": config} if stage.kind == "gspo" else {}
    teacher = _value(stage, "teacher")
    if teacher is not None and not teacher.startswith(("http://", "https://")):
        frozen["teacher"] = _config_of(teacher)
    sampler = stage.kind in ("gspo", "opd") and not _value(stage, "rollouts")
    planned = plan_step(config, row, gpus, frozen=frozen, sampler=sampler)
    sizes = {
        "states": planned.states, "gathered": planned.gathered, **planned.others,
        "pixels": planned.pixels, "tower": planned.tower, "activations": planned.activations,
        "in all": planned.step,
    }  # fmt: skip
    told = ", ".join(f"{part} {_gib(size)}" for part, size in sizes.items())
    shared = f" ({row.tokens:,} shared by {parts})" if parts > 1 else ""
    start = f"; all models whole at the start {_gib(planned.start)}" if gpus > 1 else ""
    host = f"; on the host {_gib(planned.host_pixels)} of pixels for each row of its step"
    without = "; no teacher is set" if stage.kind == "opd" and teacher is None else ""
    count = f"{gpus} GPU{'s' if gpus > 1 else ''}"
    return f"{row.own:,} tokens a GPU{shared}, {count}: {told}{start}{host}{without}"


def _value(stage: Stage | Open, key: str) -> Any:
    """An option of a stage, also of one that leaves others open; None if its kind has no such."""
    given = stage.options if isinstance(stage, Open) else vars(stage)
    defaults = {one.name: one.default for one in fields(KINDS[stage.kind])}
    return given.get(key, defaults.get(key))


def _gib(size: int) -> str:
    """One decimal, of little three; of a model of the scale world that is all there is."""
    told = f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.3f}"
    return "0" if told == "0.000" else told


def _shape(config: Any) -> str:
    text = config.text_config
    told = f"{text.num_hidden_layers} layers of width {text.hidden_size}"
    if not isinstance(config, InternVideo3Config):
        return f"GQA, {told}"
    return f"M²LA, {told}, latent rank {text.latent_rank} and {text.rope_slots} rotary slots"


def _config_of(name: str) -> Any:
    """Configuration of the released shape or of a checkpoint, GQA or M²LA."""
    if name == RELEASED:
        return released_config()
    told = read_config(resolve_checkpoint(name))
    kinds = {"internvideo3": InternVideo3Config, "qwen3_vl": Qwen3VLConfig}
    if told["model_type"] not in kinds:
        raise ValueError(
            f"{name} is a {told['model_type']} checkpoint; --plan plans models with a vision "
            f"tower ({', '.join(kinds)}). Give another --model, or `{RELEASED}`."
        )
    return kinds[told["model_type"]].from_dict(told)
