"""`internvideo3 ablate`: trains recipes, evaluates them, writes Table 5; what the command does.

    OUT/ablation.json               command, commit, recipes, seeds, suites, stages of each recipe
    OUT/stages/NAME-DIGEST/         training; recipes that agree up to a stage share its folder
    OUT/runs/RECIPE-sSEED/          evaluation
    OUT/table5.json table5.md curves.svg

Repeat the command to continue it, or to add recipes and seeds.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from internvideo3.harness import provenance
from internvideo3.harness.evaluate import evaluate, load_benchmarks, settle_environment
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.preflight import suite_names
from internvideo3.harness.store import Row, write_json
from internvideo3.harness.train import alone_in
from internvideo3.reports.ablation import MAPPING, write_table5
from internvideo3.tasks.brief import EVALUABLE
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import (
    Recipe,
    RecipeError,
    complete,
    load_recipe,
    load_variant,
    variants,
)
from internvideo3.training.train import Trained, by_content, check_files, check_mixtures, train

Progress = Callable[[str, int, int], None]
WORK_TO_TABLE = 20
"""Time between two tables, in times what one takes to write."""


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """One ablation command."""

    recipes: tuple[str, ...]
    """Variants of the preset, or recipe files."""
    preset: str = "scale"
    """A recipe's name or file."""
    seeds: tuple[int, ...]
    out: Path
    suites: tuple[str, ...] = tuple(MAPPING.values())
    """What recipes are evaluated on: of the scale world, or benchmarks."""
    limit: int | None = None
    """Questions of a suite; None for all."""
    root: Path | None = None
    """The scale world's root; None for the usual place."""
    data: Path | None = None
    """Where benchmarks are; None for the usual place."""
    device: str | None = None
    """Where training and evaluation compute; None for CUDA if there is one."""
    threads: int = 1
    """CPU threads of each process."""
    jobs: int = 1
    """Processes that train and evaluate side by side."""
    command: tuple[str, ...] = ()
    """The command line, for the record."""


@dataclass(frozen=True)
class Finished:
    """A recipe and seed that is evaluated, or whose training a signal stopped."""

    recipe: str
    seed: int
    trained: Trained


def ablate(options: AblateOptions, progress: Progress) -> Path | None:
    """Train, evaluate and report what is missing; the table, or None if a signal stopped training.

    Raises:
        ValueError: A recipe, suite or checkpoint cannot be used; training cannot go on.
    """
    settle_environment()
    torch.set_num_threads(options.threads)
    for name in options.recipes:
        stages = complete(recipe_of(options, name))
        check_files(stages)
        check_mixtures(stages)
    with alone_in(options.out):
        _check_labels(options)
        _check_suites(options)
        return _tabled(options, progress)


def _tabled(options: AblateOptions, progress: Progress) -> Path | None:
    """What is missing, worked on until it is done or a signal comes."""
    plan = _plan(options)
    if options.jobs > 1:
        from internvideo3.harness.ablate_jobs import side_by_side

        results = side_by_side(options, progress)
    else:
        results = _in_turn(options, progress)
    # However this ends, the processes end first; then the table has all that is finished.
    with _Table(options.out) as table, contextlib.closing(results):
        for one in results:
            if one.trained.checkpoint is None:
                return None
            plan["runs"][f"{label(one.recipe)}-s{one.seed}"] = {
                "recipe": label(one.recipe),
                "seed": one.seed,
                "stages": [os.path.relpath(path, options.out) for path in one.trained.folders],
            }
            plan["runs"] = _ordered(plan["runs"])
            write_json(options.out / "ablation.json", plan)
            table.changed()
    return options.out / "table5.md"


class _Table:
    """Table 5 of what is finished, written as often as it does not hold up the work.

    A table of many runs takes seconds; after each of them, also of those that are kept, it would
    take longer than an evaluation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.owed = False
        self.not_before = 0.0

    def __enter__(self) -> Self:
        """Of one ablation."""
        return self

    def __exit__(self, *error: object) -> None:
        """Write what is owed."""
        self._write()

    def changed(self) -> None:
        """Another run is finished."""
        self.owed = True
        if time.monotonic() >= self.not_before:
            self._write()

    def _write(self) -> None:
        if not self.owed:
            return
        started = time.monotonic()
        write_table5(self.folder)
        ended = time.monotonic()
        self.owed, self.not_before = False, ended + WORK_TO_TABLE * (ended - started)


def _ordered(runs: dict[str, Row]) -> dict[str, Row]:
    """Runs in the order of the paper's rows, whichever was finished first; own recipes follow."""
    place = {name: number for number, name in enumerate(variants())}

    def key(run: Row) -> tuple[int, int]:
        return run["seed"], place.get(run["recipe"], len(place))

    return dict(sorted(runs.items(), key=lambda item: key(item[1])))


def _in_turn(options: AblateOptions, progress: Progress) -> Generator[Finished]:
    whole = len(options.seeds) * len(options.recipes)
    for number, (seed, name) in enumerate(itertools.product(options.seeds, options.recipes)):
        progress(ALL, number, whole)
        trained = train_one(options, name, recipe_of(options, name), seed, progress)
        if trained.stopped:  # in its last step; what follows is for the next command
            trained = replace(trained, checkpoint=None)
        if trained.checkpoint is not None:
            evaluate_one(options, trained.checkpoint, name, seed, progress)
        yield Finished(name, seed, trained)
    progress(ALL, whole, whole)


def _plan(options: AblateOptions) -> Row:
    """What `ablation.json` says; runs of an earlier command stay in it."""
    commit, dirty = provenance.revision()
    path = options.out / "ablation.json"
    before = json.loads(path.read_text()) if path.is_file() else {"runs": {}, "about": {}}
    # Who deletes an evaluation wants it again.
    runs = {k: v for k, v in before["runs"].items() if (options.out / "runs" / k).is_dir()}
    told = variants()
    about = {
        label(name): told.get(name) or recipe_of(options, name).about for name in options.recipes
    }
    return {
        "created": provenance.now(),
        "command": list(options.command),
        "commit": commit,
        "dirty": dirty,
        "packages": provenance.packages(),
        "hardware": provenance.hardware(),
        "preset": options.preset,
        "suites": before.get("suites") or list(options.suites),
        "scale": _is_scale(options) or bool(runs and before.get("scale", True)),
        "starts": sorted({*_starts(options), *before.get("starts", [])}),
        "limit": options.limit,
        "about": before["about"] | about,
        "sources": before.get("sources", {})
        | {label(name): _source(name) for name in options.recipes},
        "runs": runs,
    }


def _check_labels(options: AblateOptions) -> None:
    """Make sure that no two recipes would share a row: of this command, or with one before it."""
    path = options.out / "ablation.json"
    held = json.loads(path.read_text()).get("sources", {}) if path.is_file() else {}
    for name in options.recipes:
        source = _source(name)
        other = held.setdefault(label(name), source)
        if other != source:
            raise RecipeError(
                f"two recipes would share the row {label(name)!r} of the table: {other} and "
                f"{source}. Rename one of the files, or take another --out."
            )


def _source(name: str) -> str:
    """Where a recipe comes from: its file, or the variant's name."""
    return str(Path(name).resolve()) if Path(name).is_file() else f"the variant {name}"


def _check_suites(options: AblateOptions) -> None:
    """What recipes are evaluated on is there, and is what the folder's table is of.

    Raises:
        PreflightError: A suite is not built or not there, or a video is missing.
        RecipeError: The folder's table has other columns.
    """
    path = options.out / "ablation.json"
    held = json.loads(path.read_text()).get("suites", []) if path.is_file() else []
    if held and set(held) != set(options.suites):
        raise RecipeError(
            f"the table in {options.out} is of {', '.join(held)}, and this command asks for "
            f"{', '.join(options.suites)}. Give another --out."
        )
    load_benchmarks(_evaluation(options, "", options.out / "runs"))


def _is_scale(options: AblateOptions) -> bool:
    """Whether the table's numbers are of the scale model or of the scale world."""
    model = any(start.startswith("scale:") for start in _starts(options))
    return model or any(suite in EVALUABLE for suite in options.suites)


def _starts(options: AblateOptions) -> list[str]:
    return sorted({str(recipe_of(options, name).start) for name in options.recipes})


def label(name: str) -> str:
    """What the table calls a variant or a recipe file."""
    return Path(name).stem


def recipe_of(options: AblateOptions, name: str) -> Recipe:
    """A recipe of the command by its name or file."""
    own = Path(name).is_file() or Path(name).suffix in (".yaml", ".yml")
    return load_recipe(name) if own else load_variant(options.preset, name)


def train_one(
    options: AblateOptions, name: str, recipe: Recipe, seed: int, progress: Progress
) -> Trained:
    """Train what is missing of a recipe, or of its first stages."""

    def told(stage: str, done: int, total: int) -> None:
        progress(f"{name} {seed} {stage}", done, total)

    seeded = replace(recipe, seed=seed)
    return train(seeded, options.out / "stages", told, Processes(options.device), by_content)


def evaluate_one(
    options: AblateOptions, checkpoint: Path, name: str, seed: int, progress: Progress
) -> None:
    """Answer what is missing of a recipe's questions."""

    def told(suite: str, done: int, total: int) -> None:
        progress(f"{name} {seed} {suite}", done, total)

    folder = options.out / "runs" / f"{label(name)}-s{seed}"
    evaluate(_evaluation(options, str(checkpoint), folder), told)


def _evaluation(options: AblateOptions, model: str, folder: Path) -> EvalOptions:
    """The evaluation of one recipe and seed."""
    return EvalOptions(
        model=model,
        suites=options.suites,
        out=folder,
        root=options.root,
        data=options.data,
        limit=options.limit,
        device=options.device,
        threads=options.threads,
        frame_cache=options.out / "frames",
        command=options.command,
    )


ALL = "recipes and seeds"
"""Name of the progress of the whole."""


def suites_of(text: str | None) -> tuple[str, ...]:
    """The suites of a command; those that stand for Table 5's columns where none is named.

    Raises:
        PreflightError: A name is unknown; the nearest are offered.
    """
    return tuple(MAPPING.values()) if text is None else tuple(suite_names(text))


def chosen(recipes: Sequence[str]) -> tuple[str, ...]:
    """The recipes of a command; all variants where none is named."""
    return tuple(recipes) or tuple(variants())
