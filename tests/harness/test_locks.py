"""Locks: who has one, who waits, what a killed process leaves.

pytest tests/harness/test_locks.py
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from internvideo3.harness.locks import is_locked, lock

HOLD = """
import sys, time
from pathlib import Path
from internvideo3.harness.locks import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_is_of_one_process_until_it_dies(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert not is_locked(path) and not path.exists()  # asking leaves nothing behind
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert is_locked(path)
        with pytest.raises(BlockingIOError):
            lock(path)
        os.kill(other.pid, signal.SIGKILL)
    assert path.exists() and not is_locked(path)
    with lock(path):
        assert is_locked(path)


def test_who_shares_a_lock_keeps_out_who_wants_it_alone(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with lock(path, shared=True), lock(path, shared=True), pytest.raises(BlockingIOError):
        lock(path)
    with lock(path), pytest.raises(BlockingIOError):
        lock(path, shared=True)


def test_a_file_that_its_holder_took_away_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking the holder may take its file away, and a third make another."""
    path = tmp_path / ".lock"
    opened = Path.open
    tries = []

    def open_then_lose(self: Path, *given: str) -> object:
        file = opened(self, *given)
        if not tries:
            self.unlink()
        tries.append(self)
        return file

    monkeypatch.setattr(Path, "open", open_then_lose)
    with lock(path), pytest.raises(BlockingIOError):  # held is the file that is there
        lock(path)
    assert len(tries) == 3
