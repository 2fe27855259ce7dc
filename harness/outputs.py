"""Where results go: made ready before the work begins, and of one command at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvideo3.harness.locks import lock
from internvideo3.training.curation.records import DataError, check_ending


def make_ready(out: Path) -> None:
    """Make the folder of a file of rows, so that hours of work do not end at a missing one.

    Raises:
        DataError: No file of this name can be written there.
        OSError: The folder cannot be made.
    """
    check_ending(out)
    if out.is_dir():
        raise DataError(f"{out} is a folder; give a file as --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise DataError(f"{out.parent} cannot be written; give another --out")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold a file, or a folder if it is one, for this command alone.

    Two that go on from what is on disk would each write the other's part once more.

    Raises:
        DataError: Another command has it.
        OSError: It cannot be written there.
    """
    path = out / ".lock" if out.is_dir() else out.with_name(f".{out.name}.lock")
    try:
        held = lock(path)
    except BlockingIOError:
        raise DataError(
            f"another command is writing to {out}. Wait for it, or give another --out."
        ) from None
    with held:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
