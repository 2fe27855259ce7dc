"""How far a command is: bars in a terminal, lines in a log.

A log gets no bars, which would be thousands of carriage returns, and not silence either: a line
when something is done, and one every few minutes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

FULL_BARS = 5
"""Most bars of finished work that stay among those that move."""
LOG_S = 300.0
"""Seconds after which a log is told again how far it is."""


class Shown(Protocol):
    """What moves bars, or writes lines."""

    def __call__(self, name: str, done: int, total: int) -> None:
        """So much of something is done."""

    def watch(self, stage: str, row: Mapping[str, float]) -> None:
        """Training made a step; a row of its metrics."""


class Bars:
    """One progress bar a name, with the time that is left."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._tasks: dict[str, TaskID] = {}
        self._full: list[str] = []

    def __call__(self, name: str, done: int, total: int) -> None:
        """Move the bar of a name."""
        if name not in self._tasks:
            # The bar starts where an earlier command stopped: its samples tell nothing
            # about how fast this command is.
            self._tasks[name] = self._shown.add_task(name, completed=done, total=total, note="")
        self._shown.update(self._tasks[name], completed=done, total=total)
        if done >= total and name not in self._full:
            self._full.append(name)
            if len(self._full) > FULL_BARS:
                self._leave(self._full[-1 - FULL_BARS])

    def watch(self, stage: str, row: Mapping[str, float]) -> None:
        """Show a line of training's metrics behind the stage's bar."""
        self._shown.update(self._tasks[stage], note=_note(row))

    def _leave(self, name: str) -> None:
        """A full bar becomes a line above the others: what moves must stay on the screen."""
        task = self._tasks[name]
        total = next(one.total for one in self._shown.tasks if one.id == task)
        self._shown.update(task, visible=False)
        if not self._shown.disable:
            self._shown.console.print(f"{name:<16} {total:g}/{total:g}", highlight=False)


class Lines:
    """One line for what is done, and one every `LOG_S` seconds.

    Args:
        stream: where to; None for nowhere.
        clock: seconds, from any moment.
    """

    def __init__(self, stream: TextIO | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._began = self._told = clock()
        self._counts: dict[str, tuple[int, int]] = {}
        self._notes: dict[str, str] = {}

    def __call__(self, name: str, done: int, total: int) -> None:
        """Take a count; write it where it is the last, or nothing was written for long."""
        before = self._counts.get(name)
        self._counts[name] = (done, total)
        full = done >= total and before != (done, total)
        if full or self._clock() - self._told >= LOG_S:
            self._write(name)

    def watch(self, stage: str, row: Mapping[str, float]) -> None:
        """Keep a line of training's metrics for the stage's next line."""
        self._notes[stage] = _note(row)

    def close(self) -> None:
        """Write how far everything is that was begun and is not done."""
        for name, (done, total) in self._counts.items():
            if 0 < done < total:
                self._write(name)

    def _write(self, name: str) -> None:
        self._told = self._clock()
        minutes, seconds = divmod(int(self._told - self._began), 60)
        done, total = self._counts[name]
        after = f"after {minutes // 60}:{minutes % 60:02}:{seconds:02}"
        line = f"{name:<16} {done}/{total} {after} {self._notes.get(name, '')}".rstrip()
        if self._stream is not None:
            self._stream.write(f"{line}\n")
            self._stream.flush()


def _note(row: Mapping[str, float]) -> str:
    name = "reward" if "reward" in row else "loss"
    return f"{name} {row[name]:.3f}"


@contextmanager
def progress(*, shown: bool = True, stderr: bool = False) -> Iterator[Shown]:
    """Show what takes long; yields what is told of it.

    Args:
        shown: whether this process is the one that tells.
        stderr: whether it is told there, because stdout is the result.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=stderr)
    if not console.is_terminal or console.is_dumb_terminal:
        lines = Lines((sys.stderr if stderr else sys.stdout) if shown else None)
        try:
            yield lines
        finally:
            lines.close()
        return
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console, disable=not shown) as bars:
        yield Bars(bars)
