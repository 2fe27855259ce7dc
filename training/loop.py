"""The loop of every stage: passes, one update, metrics, a state now and then.

A stage hands over the passes of a step and the loss of a pass; everything that makes training
safe is here. All of a step's randomness comes from (seed, step), so that a resumed run goes the way
of an uninterrupted one, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from internvideo3.training import checkpoints
from internvideo3.training.curation.records import DataError
from internvideo3.training.curves import Curves
from internvideo3.training.documents import Document
from internvideo3.training.endpoint import EndpointError
from internvideo3.training.packing import Pack
from internvideo3.training.policy import Policy
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Convert, Optimiser, StageOptions, require
from internvideo3.training.throughput import pass_flops, peak_flops

Progress = Callable[[str, int, int], None]
Watch = Callable[[str, Mapping[str, float]], None]
"""Told a stage and each line of its metrics."""
OUTSIDE = (EndpointError, DataError)
"""What ends training through no fault of the weights: a server that is down, unusable data."""
Made = TypeVar("Made")
Totals = dict[str, tuple[float, float]]
"""Metric → (sum, count) in this process; every process has the same names."""


class TrainingError(ValueError):
    """Training that cannot go on; what was saved stays."""


@dataclass(frozen=True)
class Work:
    """One forward and backward pass."""

    pack: Pack
    loss: Callable[[Tensor, Tensor], Tensor]
    """Its share of the step's loss, from hidden states `[N,W]` and output embeddings `[V,W]`."""
    scale: float = 1.0
    """0 for a pass that only keeps this process in step with the others."""


class Stage(ABC):
    """What differs between stages."""

    updates = 1
    """Optimiser updates on the passes of one step."""
    bfloat16 = False
    """Whether matrix products of all passes, those of other models too, run in bf16."""

    def products(self, device: torch.device) -> torch.autocast:
        """The precision of a pass, as a context."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16)

    @abstractmethod
    def works(self, step: int, policy: Policy) -> tuple[list[Work], Totals]:
        """This process's passes of a step, and what to note of them."""

    def noted(self) -> Totals:
        """What to note of the step's last update, asked after it; by default nothing."""
        return {}


@dataclass
class Loop:
    """One stage in training."""

    name: str
    options: StageOptions
    stage: Stage
    policy: Policy
    folder: Path
    digest: str
    seed: int
    group: Processes
    progress: Progress
    watch: Watch

    def __post_init__(self) -> None:
        """Shards the policy and builds its optimiser."""
        self.steps: int = require(self.options.steps, f"stages.{self.name}.steps")
        self.group.shard(self.policy)
        learned = [p for p in self.policy.parameters() if p.requires_grad]
        optimiser = self.options.optimiser
        groups = [
            {"params": [p for p in learned if (p.ndim > 1) == wide],
             "weight_decay": optimiser.weight_decay if wide else 0.0}
            for wide in (True, False)
        ]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optimiser.betas, foreach=False)
        self.stopping = False
        self.stopped = False
        self.curves: Curves | None = None

    def run(self) -> bool:
        """Train from the newest state to the last step; False if a signal came before that.

        `stopped` says whether one came, be it during the last step.
        """
        states = self.folder / "states"
        step = checkpoints.resume(states, self.policy, self.optimizer, self.digest, self.group)
        self._forget_metrics_after(step)
        self.progress(self.name, step, self.steps)
        self.curves = Curves(self.folder, step) if self.group.first else None
        with _graceful(self), self._closing():
            while step < self.steps:
                try:
                    self._train(step)
                except OUTSIDE:  # in all processes, see together
                    # Steps since the last state would be lost to a server that is down.
                    self._save(states, step)
                    raise
                step += 1
                self.progress(self.name, step, self.steps)
                self.stopped = bool(self.group.most(int(self.stopping)))
                if self.stopped or step % self.options.save_every == 0 or step == self.steps:
                    self._save(states, step)
                if self.stopped:
                    return step == self.steps
        return True

    @contextmanager
    def _closing(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self.curves is not None:
                self.curves.close()

    def _save(self, states: Path, step: int) -> None:
        if not step:
            return  # nothing is done, and saving would change it (`checkpoints.NOTHING`)
        reached = checkpoints.Progress(step=step, digest=self.digest)
        checkpoints.save(states, self.policy, self.optimizer, reached, self.group)

    def _train(self, step: int) -> None:
        started = time.perf_counter()
        torch.manual_seed((self.seed * 1_000_003 + step) % 2**63)
        works, totals = together(self.group, lambda: self.stage.works(step, self.policy))
        works = self._in_step(works)
        rate = rate_at(self.options.optimiser, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.policy.train()
        for _ in range(self.stage.updates):
            loss, norm = self._update(works, step)
        tokens = sum(len(work.pack.ids_T) for work in works if work.scale)
        flops = sum(pass_flops(self.policy.model, work.pack) for work in works if work.scale)
        totals = {
            **totals, **self.stage.noted(), "tokens": (tokens, 0.0), "loss": (loss, 0.0),
            "flops": (self.stage.updates * flops, 0.0),
        }  # fmt: skip
        self._note(step, totals, {"norm": norm, "rate": rate}, time.perf_counter() - started)

    def _update(self, works: Sequence[Work], step: int) -> tuple[float, float]:
        """One optimiser update; returns this process's loss and the norm of all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.group.device)
        for work in works:
            with self.stage.products(self.group.device):
                part = self.policy(work.pack.to(self.group.device), work.loss) * work.scale
            # FSDP2 averages gradients over the processes; the step's loss is their sum. Processes
            # that share a row all have its loss.
            (part * (self.group.count / self.group.parts)).backward()
            loss += part.detach()
        norm = self._clip()
        if not (math.isfinite(norm) and bool(torch.isfinite(loss))):
            raise TrainingError(
                f"step {step + 1} of {self.name} has loss {float(loss)} and gradient norm {norm}. "
                "The weights were not changed; the newest state is kept. Lower the learning rate "
                "and begin with another --out."
            )
        self.optimizer.step()
        return float(loss), norm

    def _clip(self) -> float:
        learned = [p for p in self.policy.parameters() if p.grad is not None]
        norm: Any = torch.nn.utils.clip_grad_norm_(
            learned, self.options.optimiser.clip_norm, foreach=False
        )
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _in_step(self, works: list[Work]) -> list[Work]:
        """As many passes as the busiest process has: sharded layers are gathered by all at once."""
        missing = self.group.most(len(works)) - len(works)
        return works + [replace(works[-1], scale=0.0)] * missing

    def _note(self, step: int, totals: Totals, shown: dict[str, float], seconds: float) -> None:
        names = sorted(totals)
        mine = torch.tensor([totals[name] for name in names], dtype=torch.float64).T
        sums = self.group.total(mine.contiguous().to(self.group.device)).tolist()
        row: dict[str, float] = {"step": step + 1}
        for name, total, count in zip(names, *sums, strict=True):
            row[name] = total / count if count else total
        row |= shown | {"seconds": seconds, "tokens_per_s": row["tokens"] / seconds}
        peak = peak_flops(self.group.device)
        if peak is not None:
            row["mfu"] = row["flops"] / (seconds * peak * self.group.count)
        if self.group.first:
            self._write_row(row)
            self.watch(self.name, row)
            if self.curves is not None:
                self.curves.add(row)

    def _write_row(self, row: dict[str, float]) -> None:
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise TrainingError(
                f"{path} cannot be written: {error.strerror}. The newest state is kept; make room "
                "and repeat the command."
            ) from error

    def _forget_metrics_after(self, step: int) -> None:
        """Steps after the newest state are taken again, and noted again."""
        path = self.folder / "metrics.jsonl"
        if not self.group.first or not path.is_file():
            return
        whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in whole if json.loads(line)["step"] <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept))
        part.replace(path)


def rate_at(optimiser: Optimiser, step: int, steps: int) -> float:
    """Learning rate of a step (from 0): linear warm-up, then a cosine to the final rate."""
    rising = math.ceil(round(optimiser.warmup * steps, 9))  # 0.07 * 100 is a little more than 7
    if step < rising:
        return optimiser.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    span = optimiser.learning_rate - optimiser.final_learning_rate
    return optimiser.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * done))


def together(group: Processes, make: Callable[[], Made]) -> Made:
    """What a process makes by itself; what ends one process ends all, which can save together.

    Whatever may fail from outside has to be behind this before the processes next exchange numbers:
    one that has failed would wait for others that wait for it.
    """
    made: list[Made] = []
    failure: EndpointError | DataError | None = None
    try:
        made.append(make())
    except OUTSIDE as error:
        failure = error
    if group.most(int(failure is not None)):
        raise failure or EndpointError("another process cannot go on; see its message")
    return made[0]


def by_leaders(group: Processes, make: Callable[[], Made]) -> Made:
    """What one of the processes that share rows makes and the others take over.

    Of what differs from one making to the next: responses and judgements of servers, which answer
    otherwise by batch, card or version, and whatever is rounded otherwise.
    """
    made = together(group, lambda: make() if group.leads_row else None)
    return cast(Made, group.from_leader(made))


def check_shared(group: Processes, documents: Sequence[Document]) -> None:
    """Processes that share rows hold the same ids in them.

    Raises:
        TrainingError: They do not; in all processes.
    """
    ids = [(one.trunk_ids, [branch.ids for branch in one.branches], one.said) for one in documents]
    digest = hashlib.sha256(repr(ids).encode()).digest()
    if group.most(int(not group.alike(int.from_bytes(digest[:7], "big")))):
        raise TrainingError(
            f"{group.parts} processes share their rows (sequence_parallel) and have different ids "
            "in them, so that what they learn would be of no document. A video that only some of "
            "them could read, or other versions of the code or its libraries, do that; see the "
            "log of each. The newest state is kept."
        )


def in_step(group: Processes, rows: Sequence[Made]) -> list[tuple[Made, bool]]:
    """This process's rows, and the last one again until all processes have seen as many.

    A reference or teacher that the processes share is gathered by all of them at once. The number
    beside a row says whether it counts.
    """
    missing = group.most(len(rows)) - len(rows)
    return [(row, True) for row in rows] + [(row, False) for row in list(rows[-1:]) * missing]


def own_indices(options: StageOptions, step: int, group: Processes) -> range:
    """Places of this process's documents of a step in the stage's sequence."""
    first = step * options.documents
    own, count = group.documents_of_step
    return range(first + own, first + options.documents, count)


def describe(options: StageOptions | Convert, seed: int, start: str, digest: str) -> str:
    """What `stage.json` says of a stage."""
    told = {"start": start, "seed": seed, "digest": digest, "options": asdict(options)}
    return json.dumps(told, indent=1, default=str) + "\n"


@contextmanager
def _graceful(loop: Loop) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the run after the step in progress, with its state saved."""

    def stop(number: int, frame: Any) -> None:
        loop.stopping = True

    before = {one: signal.signal(one, stop) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
