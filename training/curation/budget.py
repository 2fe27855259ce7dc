"""Rows that cannot be used: each logged and kept with its reason, too many end the command."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from internvideo3.training.curation.records import DataError

log = logging.getLogger("internvideo3.data")
FEW = 10
"""Bad rows that are always forgiven: of a handful of rows one is more than any budget."""
MOST_BAD = 0.01
"""Share of bad rows that is forgiven, as in training's recipes."""
UNUSABLE = (ValueError, LookupError, TypeError, AttributeError, OSError)
"""What a row of another form, or a broken video, raises."""


@dataclass(frozen=True)
class Budget:
    """Counts the bad rows of a file."""

    file: str
    total: int
    """Rows of the file."""
    most_bad: float = MOST_BAD
    """Share of them that may be bad."""
    bad: dict[str, str] = field(default_factory=dict)
    """id → why the row cannot be used."""

    def leave_out(self, number: int, key: str, error: Exception) -> None:
        """Log a row that cannot be used, and count it.

        Args:
            number: Of the row in its file, from 1.
            key: Its id.
            error: What is wrong with it.

        Raises:
            DataError: There are too many.
        """
        why = f"has no {error}" if isinstance(error, KeyError) else str(error)
        self.bad[key] = f"cannot be used: {why}"
        log.warning("%s, row %d (id %s) is left out: %s", self.file, number, key, why)
        if len(self.bad) > max(FEW, self.most_bad * self.total):
            raise DataError(
                f"{len(self.bad)} of {self.total} rows of {self.file} cannot be used, more than "
                f"{self.most_bad:.0%}; the last one, row {number} (id {key}): {why}. Repair the "
                "data or raise --most-bad."
            ) from error
