"""What could not be measured: its rows, which of them are tried again, and a command's last words.

A row's `retry` says whether the next command tries again: what may pass by itself is tried, memory
that others took at the time above all; what this device or code can never do is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from internvideo3.model.device import is_of_memory

Row = dict[str, Any]
SHOWN = 3
"""Failed points that a command names at its end; the rows have all."""


class UnfinishedError(ValueError):
    """What could not be timed; the rest was, and what was measured is there."""


class GateError(UnfinishedError):
    """Models whose engine and forward pass disagree."""


@dataclass
class Amiss:
    """What went wrong in a command that went on."""

    red: list[str] = field(default_factory=list)
    """Models and forms, or points, whose gate is red."""
    unloaded: dict[str, str] = field(default_factory=dict)
    """Models that cannot be loaded, and why."""
    failed: dict[str, str] = field(default_factory=dict)
    """Points of other models that failed, and why."""

    def raise_if_any(self) -> None:
        """Say what was not timed, and why.

        Raises:
            GateError: a gate is red, and nothing else is amiss.
            UnfinishedError: a model was not loaded, or a point failed.
        """
        told = [f"{name}: not loaded, and not timed: {why}" for name, why in self.unloaded.items()]
        if self.red:
            told.append(
                f"{', '.join(self.red)}: the gate is red, no rate is reported; see the rows."
            )
        shown = [f"{key}: {why}" for key, why in list(self.failed.items())[:SHOWN]]
        if shown:
            told.append(
                f"{len(self.failed)} points failed; the same command tries them again. "
                + " ".join(shown)
            )
        if told:
            kind = UnfinishedError if self.unloaded or self.failed else GateError
            raise kind(" ".join(told))


def failure(error: Exception, *, shared: bool = True) -> Row:
    """The row of a point that ended so.

    Args:
        error: what it ended with.
        shared: whether others may have taken the memory that was lacking.
    """
    if not is_of_memory(error):
        return unmeasured("failed", f"{type(error).__name__}: {error}", retry=True)
    reason = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        reason = reason.split(". ", maxsplit=1)[0]
    else:
        reason = f"{type(error).__name__}: {reason}"
    return unmeasured("out of memory", reason, retry=shared)


def unmeasured(status: str, reason: str, *, retry: bool) -> Row:
    """The row of a point that was not measured."""
    reason = " ".join(reason.split())[:400]
    return {"kind": "none", "status": status, "reason": reason, "retry": retry}


def reasons(rows: Sequence[Row]) -> str:
    """Status and reason of what was not measured."""
    return f"{rows[0]['status']}: {rows[0]['reason']}"
