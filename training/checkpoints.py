"""Training states on disk: written beside, renamed when whole, never half.

A state is a folder `step-N` of torch's distributed checkpoint format (model, optimiser; any number
of processes may read what another number wrote) and a `progress.json`. The schedule, the data
position and the random draws are functions of step and seed, so the step is all of their state.
A state that cannot be written leaves nothing behind, and the one before it where it was.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.optim import Optimizer

from internvideo3.training.processes import Processes


class CheckpointMismatchError(ValueError):
    """A state that another recipe wrote."""


class StateError(ValueError):
    """A state that cannot be written or read; what was saved before stays."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a state stands."""

    step: int
    """Optimiser steps done."""
    digest: str
    """Of all that decides the weights (`recipe.stage_digest`)."""


log = logging.getLogger("internvideo3.training")
STATE = re.compile(r"step-[0-9]{8}")
OWN = re.compile(rf"{STATE.pattern}(\.part)?")
"""Names that are written here, whole states and halves; `step-00000100-keep` is somebody's copy."""
NOTHING = "step-00000000"
"""A state before the first step, as earlier versions wrote. Beginning again is exact and it is not:
to tell an optimiser's state, torch takes a step of one that has none."""


def save(
    folder: Path, policy: nn.Module, optimizer: Optimizer, progress: Progress, group: Processes
) -> None:
    """Write a state and remove the older ones.

    Raises:
        StateError: It cannot be written, in one process or in all; the state before it stays.
    """
    place = folder / f"step-{progress.step:08d}"
    part = folder / f"{place.name}.part"
    if group.most(int(group.first and place.is_dir())):
        # Training was continued here and came no further. Step and recipe decide the weights, and
        # between the old folder's removal and the new one's arrival there would be no state.
        return
    model, state = get_state_dict(policy, optimizer)
    held = {"model": model, "optimizer": state}

    def begin() -> None:
        if group.first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    def write() -> None:
        with _unwarned():
            save_state(held, checkpoint_id=part, no_dist=group.count == 1)

    def finish() -> None:
        if group.first:
            _note(part / "progress.json", progress)
            part.rename(place)
            _remove_others(folder, place)

    for act in (begin, write, finish):
        failure = _failure(act)
        if group.most(int(failure is not None)):
            if group.first:
                shutil.rmtree(part, ignore_errors=True)
            raise _unwritten(place, failure) from failure


def resume(
    folder: Path, policy: nn.Module, optimizer: Optimizer, digest: str, group: Processes
) -> int:
    """Load the newest whole state in place; returns its step, 0 if there is none.

    Raises:
        CheckpointMismatchError: Another recipe, seed or start wrote it.
        StateError: It cannot be read.
    """
    place = newest(folder)
    if place is None:
        return 0
    progress = _progress(place)
    if progress.digest != digest:
        raise CheckpointMismatchError(
            f"{folder} was written by another recipe, seed or start (see stage.json beside it). "
            "Give another --out, or repeat the command that began it."
        )
    model, state = get_state_dict(policy, optimizer)
    held: dict[str, Any] = {"model": model, "optimizer": state}
    try:
        with _unwarned():
            load_state(held, checkpoint_id=place, no_dist=group.count == 1)
    except (OSError, CheckpointException) as error:
        raise _unread(place, _reason(error)) from error
    set_state_dict(
        policy, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"]
    )
    return progress.step


def newest(folder: Path) -> Path | None:
    """The newest whole state of a folder, if there is one."""
    found = sorted(path.parent for path in folder.glob("step-*/progress.json"))
    whole = [place for place in found if STATE.fullmatch(place.name) and place.name != NOTHING]
    return whole[-1] if whole else None


def _progress(place: Path) -> Progress:
    try:
        return Progress(**json.loads((place / "progress.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _unread(place, f"progress.json: {error}") from error


def _note(path: Path, progress: Progress) -> None:
    """Write where a state stands; on the disk before the state counts as whole."""
    with path.open("w") as file:
        file.write(json.dumps(asdict(progress)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _remove_others(folder: Path, place: Path) -> None:
    """Remove older states and halves of states; what others put here stays (`.DS_Store`, a copy).

    The new state is whole by now, so nothing here ends training.
    """
    for old in folder.glob("step-*"):
        if old == place or not OWN.fullmatch(old.name):
            continue
        try:
            shutil.rmtree(old)
        except OSError as error:
            log.warning("the old state %s cannot be removed: %s", old, _reason(error))


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without torch's warning that there is one process only, which was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _failure(act: Callable[[], None]) -> OSError | CheckpointException | None:
    """What ended a part of the writing; the processes then see together how to go on."""
    try:
        act()
    except (OSError, CheckpointException) as error:
        return error
    return None


def _unwritten(place: Path, failure: BaseException | None) -> StateError:
    why = "another process could not" if failure is None else _reason(failure)
    held = newest(place.parent)
    kept = f"the state {held.name} stays" if held else "there is no state yet"
    return StateError(
        f"{place} cannot be written: {why}. Nothing half is left, and {kept}. Free space there, or "
        "make the folder writable, then repeat the command."
    )


def _unread(place: Path, why: str) -> StateError:
    return StateError(
        f"the state {place} cannot be read: {why}. Bring the folder back as it was; without it "
        "the same command begins the stage again."
    )


def _reason(error: BaseException) -> str:
    """In the system's words where the system refused: torch hides them behind its own."""
    if isinstance(error, CheckpointException):
        # Of all processes; the first to fail speaks for them.
        error = next(iter(error.failures.values()))[0]
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror if link.filename is None else f"{link.filename}: {link.strerror}"
        link = link.__cause__ or link.__context__
    if "inline_container" in str(error):
        # What the system said stayed in the other process: only exceptions travel, not their cause.
        return f"torch could not finish a file, as on a full disk ({error})"
    return str(error).strip() or repr(error)
