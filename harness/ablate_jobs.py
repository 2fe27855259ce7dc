"""An ablation in several processes on one machine: each does one stage or evaluation at a time.

What recipes share is one piece of work with several that wait for it, so that no process waits for
another's half-trained stage. Of what can be begun, the longest chain goes first. The weights are
those of one process (tests/training/test_ablation.py); only their order differs.
"""

from __future__ import annotations

import functools
import heapq
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from multiprocessing.connection import Connection
from typing import Any

from internvideo3.harness.ablate import AblateOptions, Finished, evaluate_one, recipe_of, train_one
from internvideo3.harness.ablate import Progress as Told
from internvideo3.training.recipe import Recipe, complete, stage_digest
from internvideo3.training.train import Trained, start_digest

ALL_WORK = "stages and runs"
"""Name of the progress of the whole."""
_told: Connection | None = None
"""Where a worker process puts its progress."""


class AblationStoppedError(ValueError):
    """A process of the ablation was killed."""


@dataclass(frozen=True)
class Work:
    """A recipe's first so many stages, the last of them new; or the evaluation after all."""

    recipe: str
    seed: int
    stages: int
    evaluates: bool = False


def graph(recipes: Mapping[str, Recipe], seeds: tuple[int, ...]) -> dict[Work, set[Work]]:
    """Each piece of work and what it waits for; a stage that recipes share is there once."""
    found: dict[Work, set[Work]] = {}
    shared: dict[tuple[str, str], Work] = {}
    starts = {start: start_digest(start) for start in {str(r.start) for r in recipes.values()}}
    for seed in seeds:
        for name, recipe in recipes.items():
            before: set[Work] = set()
            stages = _digests(recipe, seed, starts[str(recipe.start)])
            for count, key in enumerate(stages, start=1):
                work = shared.setdefault(key, Work(name, seed, count))
                found.setdefault(work, set()).update(before)
                before = {work}
            found[Work(name, seed, len(stages), evaluates=True)] = before
    return found


def _digests(recipe: Recipe, seed: int, begun: str) -> list[tuple[str, str]]:
    """Name and digest of each stage; equal ones are trained in one folder (`train.by_content`).

    The weights of a stage that is not trained yet are known by the digest of the stage.
    """
    made = []
    for name, stage in complete(recipe).items():
        begun = stage_digest(stage, seed, begun)
        made.append((name, begun))
    return made


def side_by_side(options: AblateOptions, progress: Told) -> Generator[Finished]:
    """Train and evaluate in `options.jobs` processes; yields what is evaluated, as it comes.

    After a signal, running stages save their state and nothing is begun any more.

    Raises:
        ValueError: As training and evaluation; stages that run beside it save their state.
        AblationStoppedError: A process was killed.
    """
    recipes = {name: recipe_of(options, name) for name in options.recipes}
    work = graph(recipes, options.seeds)
    with _pool(options, progress) as pool:
        yield from _done(options, work, pool, progress)


def _done(
    options: AblateOptions,
    work: dict[Work, set[Work]],
    pool: ProcessPoolExecutor,
    progress: Told,
) -> Iterator[Finished]:
    order = TopologicalSorter(work)
    order.prepare()
    heights = _heights(work)
    place = {one: number for number, one in enumerate(work)}
    ready: list[tuple[int, int, Work]] = []
    running: dict[Future[Trained], Work] = {}
    left = len(work)
    while order.is_active():
        progress(ALL_WORK, len(work) - left, len(work))
        for one in order.get_ready():
            heapq.heappush(ready, (-heights[one], place[one], one))
        while ready and len(running) < options.jobs:
            one = heapq.heappop(ready)[-1]
            running[pool.submit(_do, options, one)] = one
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            one, trained = running.pop(future), _result(future)
            if trained.checkpoint is None or one.evaluates:
                yield Finished(one.recipe, one.seed, trained)
            order.done(one)
            left -= 1
    progress(ALL_WORK, len(work), len(work))


def _result(future: Future[Trained]) -> Trained:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise AblationStoppedError(
            "a process of the ablation was killed (too little memory for so many --jobs?); what it "
            "had finished is kept. Repeat the command to continue."
        ) from error


def _heights(work: Mapping[Work, set[Work]]) -> dict[Work, int]:
    """How many pieces of work follow one another from each on."""
    after: dict[Work, list[Work]] = {one: [] for one in work}
    for one, before in work.items():
        for other in before:
            after[other].append(one)

    @functools.cache
    def height(one: Work) -> int:
        return 1 + max(map(height, after[one]), default=0)

    return {one: height(one) for one in work}


@contextmanager
def _pool(options: AblateOptions, progress: Told) -> Iterator[ProcessPoolExecutor]:
    """Processes whose progress is told here, and which end when this one does."""
    context = multiprocessing.get_context("spawn")
    # Not a queue: whoever is killed while it holds a queue's lock keeps it. Messages are shorter
    # than what a pipe takes whole or not at all.
    heard, told = context.Pipe(duplex=False)
    listener = threading.Thread(target=_listen, args=(heard, progress), daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(
        options.jobs, mp_context=context, initializer=_begin, initargs=(told, options.threads)
    )
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()  # a stage under way saves its state
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        pool.shutdown(cancel_futures=True)
        told.send(None)
        listener.join()
        told.close()
        heard.close()


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _listen(heard: Connection, progress: Told) -> None:
    while (said := heard.recv()) is not None:
        progress(*said)


def _begin(told: Connection, threads: int) -> None:
    """Prepare a worker process."""
    import torch

    from internvideo3.harness.evaluate import settle_environment

    global _told
    _told = told
    settle_environment()
    torch.set_num_threads(threads)
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    """End with the process that started this one, also where that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(options: AblateOptions, work: Work) -> Trained:
    recipe = recipe_of(options, work.recipe)
    part = replace(recipe, stages=dict(list(recipe.stages.items())[: work.stages]))
    trained = train_one(options, work.recipe, part, work.seed, _tell)
    if trained.stopped:  # in its last step; what follows is for the next command
        return replace(trained, checkpoint=None)
    if work.evaluates and trained.checkpoint is not None:
        evaluate_one(options, trained.checkpoint, work.recipe, work.seed, _tell)
    return trained


def _tell(name: str, done: int, total: int) -> None:
    assert _told is not None
    _told.send((name, done, total))
