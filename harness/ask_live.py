"""The live view of `ask`: every entry as it is written, and a line of what is held and left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

if TYPE_CHECKING:
    from internvideo3.harness.agent.context import Entry
    from internvideo3.harness.agent.rollout import State

STYLES = {
    "observation": "cyan",
    "reasoning": "bold",
    "action": "magenta",
    "feedback": "green",
    "memory": "yellow",
    "belief": "dim",
    "instruction": "dim",
}
LONGEST_CHARS = 240
"""Of one entry on the terminal; the trace page has all of it."""


class View:
    """What is told of a rollout while it runs."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._shown = 0

    def __call__(self, state: State) -> None:
        """A step was made."""
        entries = state.context.entries
        for entry in entries[self._shown :]:
            self._live.console.print(line(entry))
        self._shown = len(entries)
        self._live.update(Group(Spinner("dots", status(state))))

    def advance(self, done: int, total: int) -> None:
        """A caption was written."""
        self._live.update(Spinner("dots", f"captions: {done} of {total} clips"))


@contextmanager
def live_view(console: Console) -> Iterator[View]:
    """Shows a rollout while it runs; yields what is told of every step.

    Where the console is no terminal, a log has the entries alone: no line that changes.
    """
    first = Spinner("dots", "reading the model and the video")
    with Live(first, console=console, transient=True, auto_refresh=console.is_terminal) as live:
        try:
            yield View(live)
        finally:
            if not console.is_terminal:
                live.update("")


def line(entry: Entry) -> Text:
    """One entry, in one line of plain text."""
    when = "" if entry.span is None else f" {entry.span[0]:g}-{entry.span[1]:g} s"
    head = Text(f"{entry.turn:>2} {entry.kind:<11} {entry.source}{when}  ", "dim")
    return head + Text(printable(entry.text), STYLES[entry.kind])


def status(state: State) -> Text:
    """What is held and what is left."""
    spending = state.spending
    held = state.judgements[-1] if state.judgements else None
    now = f"{printable(held.answer)} ({held.support:.2f}). " if held else ""
    return Text(f"turn {spending.turns}. {now}{spending.told()}")


def printable(text: str) -> str:
    """Text that cannot steer a terminal: one line, without control characters."""
    flat = " ".join(text.split())
    clean = "".join(mark if mark.isprintable() else "\N{REPLACEMENT CHARACTER}" for mark in flat)
    return clean if len(clean) <= LONGEST_CHARS else clean[:LONGEST_CHARS] + " …"
