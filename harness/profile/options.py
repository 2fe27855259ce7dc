"""One profile command: what is asked, where its rows go, and whether all that it names is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from internvideo3.harness import provenance
from internvideo3.harness.gpu.measure import aside, is_marked, kept_aside, mark_aside, unmark
from internvideo3.harness.locks import is_locked
from internvideo3.harness.profile import host
from internvideo3.harness.profile.subjects import config_of, parameters_of
from internvideo3.harness.profile.workload import Workload, WorkloadError
from internvideo3.harness.store import LOCK, SCHEMA, read_run
from internvideo3.model.device import DeviceError, device_of

Row = dict[str, Any]
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """One profile command."""

    workload: Workload
    out: Path
    """Folder that gets one run directory for each model."""
    device: str = "cpu"
    """cpu, or cuda."""
    threads: int = 1
    """CPU threads of torch."""
    video: Path | None = None
    """A video whose decoding and encoding are timed as well."""
    budget_s: float | None = None
    """No point is begun after so many seconds; the same command goes on from there."""
    into: Mapping[str, Path] = field(default_factory=dict)
    """Evaluation runs of some of the models: their rows go there, and not into `out`."""
    command: tuple[str, ...] = ()
    """The command line, for the record."""

    def run_of(self, model: str) -> Path:
        """The run directory of a model."""
        return self.into.get(model) or self.out / folder_name(model)

    def runs(self) -> list[Path]:
        """The run directories of all models."""
        return [self.run_of(name) for name in self.workload.models]

    def drawn(self) -> list[Path]:
        """Every run directory whose rows belong in the figures of `out`: earlier commands', too.

        Those of this command come last, and what was moved aside first comes first: of a point that
        several have, the newest row counts.
        """
        runs = self.runs()
        found = {path.parent for path in self.out.glob("*/measurements.jsonl")} - {*runs}
        return [*sorted(found, key=_by_age), *runs]


def _by_age(path: Path) -> tuple[str, float]:
    """Order of names that differ in a number at their end: `a-2`, `a-10`, then `a`, the newest."""
    stem, _, number = path.name.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (path.name, math.inf)


def folder_name(model: str) -> str:
    """The name of a model's run directory; not that of a hidden one."""
    # `.` and `..` stay as they are, which `check` refuses.
    if model.startswith(".") and model.strip("./"):
        model = Path(model).resolve().name.lstrip(".")
    return model.replace(":", "-").replace("/", "-")


def device_given(name: str) -> torch.device:
    """The device of a command.

    Raises:
        WorkloadError: this machine has none of this name.
    """
    try:
        return device_of(name)
    except DeviceError as error:
        raise WorkloadError(f"{error} --plan needs none.") from error


def check(options: ProfileOptions) -> None:
    """Whether all that is named is there, before anything is written.

    Raises:
        WorkloadError: a model or the video is not, or two models would share a folder.
        CheckpointError: the same, of a checkpoint.
    """
    for name in options.workload.models:
        _check_name(name)
        config_of(name)
        _check_makes_a_model(name)
    if len(set(options.runs())) < len(options.workload.models):
        raise WorkloadError(
            "two of the models have one run directory, since their names differ in signs only; "
            "give them separate --out folders."
        )
    if options.video is not None and not options.video.is_file():
        raise WorkloadError(f"there is no video {options.video}.")


def _check_makes_a_model(name: str) -> None:
    """Whether a model can be made of a configuration; none of its weights are read.

    Raises:
        WorkloadError: it cannot.
    """
    try:
        parameters_of(name)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WorkloadError(
            f"{name}: no model can be made of its configuration: {error}"
        ) from error


def _check_name(name: str) -> None:
    """Whether a model's name can name its run directory.

    Raises:
        WorkloadError: it cannot.
    """
    if not name.isprintable() or not name.strip("./"):
        raise WorkloadError(
            f"the model {name!r} cannot name a run directory; give its folder another name, or "
            "its path in full."
        )


def move_foreign_aside(options: ProfileOptions, tell: Tell) -> None:
    """Rename run directories of another device, which cannot be continued here; they are kept.

    One of this device that was moved aside for the other is taken up again.
    """
    mine = _config(options)
    for name in options.workload.models:
        root = options.run_of(name)
        if name in options.into:
            continue
        # Another model's name may end in a number, and so may somebody's own folder.
        earlier = [path for path in kept_aside(root) if is_marked(path)]
        if (root / "run.json").is_file():
            theirs = _config_of_run(root)
            if theirs == mine or is_locked(root / LOCK):
                continue
            kept = aside(root, earlier)
            root.rename(kept)
            mark_aside(kept)
            tell(f"{root} is of {theirs.get('card') or 'another device'}; kept as {kept.name}")
        ours = [path for path in earlier if _config_of_run(path) == mine]
        if ours and not root.exists() and not is_locked(ours[-1] / LOCK):
            ours[-1].rename(root)
            unmark(ours[-1])
            tell(f"{ours[-1].name} is of this device, and continued as {root.name}")


def _config_of_run(root: Path) -> Mapping[str, Any]:
    """Where a run directory's rows were measured; empty where that is not told."""
    found = read_run(root).get("config") if (root / "run.json").is_file() else None
    return found if isinstance(found, dict) else {}


def describe(name: str, options: ProfileOptions) -> Row:
    """What a model's run.json says."""
    commit, dirty = provenance.revision()
    return {
        "schema": SCHEMA,
        "id": name,
        "created": provenance.now(),
        "command": list(options.command),
        "mode": "profile",
        "model": _described(name, options.workload.dtypes[0]),
        "suites": {},
        "config": _config(options),
        "commit": commit,
        "dirty": dirty,
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
        "comparable": {
            "paper": False,
            "reason": "see each row's device and label; the paper measured one H200",
        },
    }


def _config(options: ProfileOptions) -> Row:
    """What is measured grows from command to command; where it is measured does not."""
    return {
        "device": device_given(options.device).type,
        "card": host.name_of(device_given(options.device)),
        "threads": options.threads,
    }


def _described(name: str, dtype: str) -> Row:
    if name.startswith("random:"):
        attention = "m2la" if "m2la" in name else "gqa"
        return {"name": name, "digest": name, "attention": attention, "label": "random weights"}
    from internvideo3.harness.evaluate import describe_model

    return describe_model(name, dtype)
