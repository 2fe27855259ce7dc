"""`internvideo3 train`: what the command does, without printing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from internvideo3.model.checkpoint import read_config, resolve_checkpoint
from internvideo3.model.config import InternVideo3Config
from internvideo3.training.plan import GIB, Plan, plan_step, released_config
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Convert, Cpt, Sft, load_recipe
from internvideo3.training.train import Trained, quiet, train

WHOLE_TOKENS = 65536
"""Rows longer than this are also planned as parts, as sequence parallelism would have them."""
SPLITS = (1, 2, 4, 8)


def run_training(
    recipe: str,
    out: Path,
    threads: int,
    progress: Callable[[str, int, int], None],
    device: str | None = None,
) -> Trained:
    """Train what is missing of a recipe, alone or as one process of torchrun's.

    Raises:
        ValueError: The recipe cannot be used, or training cannot go on.
    """
    read = load_recipe(recipe)
    torch.set_num_threads(threads)
    group = Processes(device)
    try:
        return train(read, out, progress if group.first else quiet, group)
    finally:
        group.leave()


def plan_lines(recipe: str, model: str, gpus: int) -> list[str]:
    """What each stage of a recipe needs on one of so many GPUs; long rows whole and in parts.

    Args:
        recipe: Name or file.
        model: `8b` for the released shape, or an M²LA checkpoint.
        gpus: GPUs that share weights, gradients and moments.

    Raises:
        ValueError: The recipe or the checkpoint cannot be used.
    """
    config = released_config() if model == "8b" else _latent_config(model)
    lines = ["GiB on each GPU; the vision tower's activations are not in it."]
    for name, stage in load_recipe(recipe).stages.items():
        if isinstance(stage, Convert):
            continue
        for parts in SPLITS if stage.pack_tokens > WHOLE_TOKENS else (1,):
            planned = plan_step(
                config,
                stage.pack_tokens // parts,
                gpus,
                recompute=stage.recompute,
                bfloat16=isinstance(stage, Cpt | Sft) and stage.bfloat16,
            )
            lines.append(_plan_line(name, planned, gpus))
    return lines


def _plan_line(name: str, planned: Plan, gpus: int) -> str:
    parts = {
        "states": planned.states, "gathered": planned.gathered,
        "activations": planned.activations, "in all": planned.total,
    }  # fmt: skip
    told = ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items())
    return f"{name}: {planned.tokens:,} tokens a GPU, {gpus} GPUs: {told}"


def _latent_config(model: str) -> InternVideo3Config:
    path = resolve_checkpoint(model)
    config = read_config(path)
    if config["model_type"] != "internvideo3":
        raise ValueError(
            f"{model} is a {config['model_type']} checkpoint; --plan knows M²LA models. Convert it "
            "first (`internvideo3 convert`), or leave --model out for the released 8B shape."
        )
    made: InternVideo3Config = InternVideo3Config.from_dict(config)
    return made
