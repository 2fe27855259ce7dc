"""One process at a time: locks on files, which the system lets go when their process dies."""

import fcntl
import os
from pathlib import Path
from typing import IO


def lock(path: Path, *, shared: bool = False) -> IO[str]:
    """Take the lock of a file, making the file; closing what is returned lets it go.

    Args:
        path: the lock's own file. What is replaced or taken away whole cannot be locked itself.
        shared: together with others that share it, but not with one that has it alone.

    Raises:
        BlockingIOError: another process has it.
        OSError: the file cannot be made, or lies on a file system without locks.
    """
    while True:
        # To be read too: NFS shares a lock only with who may.
        file = path.open("a+")
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            # Whoever had it may have taken the file away since: then the next has another file.
            if _is_at(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def is_locked(path: Path) -> bool:
    """Whether a process has a lock; a file that a killed one has left says nothing."""
    if not path.is_file():
        return False
    try:
        lock(path).close()
    except BlockingIOError:
        return True
    return False


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
