"""Training states on disk: written beside, renamed when whole, never half.

A state is a folder `step-N` of torch's distributed checkpoint format (model, optimiser; any number
of processes may read what another number wrote) and a `progress.json`. The schedule, the data
position and the random draws are functions of step and seed, so the step is all of their state.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.optim import Optimizer

from internvideo3.training.processes import Processes


class CheckpointMismatchError(ValueError):
    """A state that another recipe wrote."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a state stands."""

    step: int
    """Optimiser steps done."""
    digest: str
    """Of all that decides the weights (`recipe.stage_digest`)."""


def save(
    folder: Path, policy: nn.Module, optimizer: Optimizer, progress: Progress, group: Processes
) -> None:
    """Write a state and remove the older ones."""
    place = folder / f"step-{progress.step:08d}"
    part = folder / f"{place.name}.part"
    if group.first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    group.wait()
    model, state = get_state_dict(policy, optimizer)
    save_state({"model": model, "optimizer": state}, checkpoint_id=part, no_dist=group.count == 1)
    group.wait()
    if group.first:
        (part / "progress.json").write_text(json.dumps(asdict(progress)) + "\n")
        shutil.rmtree(place, ignore_errors=True)
        part.rename(place)
        for old in folder.iterdir():
            if old != place:
                shutil.rmtree(old)
    group.wait()


def resume(
    folder: Path, policy: nn.Module, optimizer: Optimizer, digest: str, group: Processes
) -> int:
    """Load the newest whole state in place; returns its step, 0 if there is none.

    Raises:
        CheckpointMismatchError: Another recipe, seed or start wrote it.
    """
    found = sorted(folder.glob("step-????????/progress.json"))
    if not found:
        return 0
    progress = Progress(**json.loads(found[-1].read_text()))
    if progress.digest != digest:
        raise CheckpointMismatchError(
            f"{folder} was written by another recipe, seed or start (see stage.json beside it). "
            "Give another --out, or repeat the command that began it."
        )
    model, state = get_state_dict(policy, optimizer)
    held: dict[str, Any] = {"model": model, "optimizer": state}
    load_state(held, checkpoint_id=found[-1].parent, no_dist=group.count == 1)
    set_state_dict(
        policy, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"]
    )
    return progress.step
