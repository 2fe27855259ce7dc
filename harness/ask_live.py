"""The live view of `ask`: every entry as it is written, and a line of what is held and left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@contextmanager
def live_view(console: Console) -> Iterator[Callable[[State], None]]:
    """Shows a rollout while it runs; yields what is told of every step."""
    shown = 0
    with Live(Spinner("dots", "reading the model and the video"), console=console) as live:

        def watch(state: State) -> None:
            nonlocal shown
            entries = state.context.entries
            for entry in entries[shown:]:
                live.console.print(line(entry))
            shown = len(entries)
            live.update(Group(Spinner("dots", status(state))))

        yield watch


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
