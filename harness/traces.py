"""Rollouts of a run on disk: `runs/<id>/traces/<sample id>.json.gz`, one file a rollout.

A file appears when it is whole, and before the sample's record, so that a record has its trace. No
clock is in it: equal runs write equal bytes.
"""

import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from internvideo3.harness.locks import lock
from internvideo3.harness.store import TRACES, write_bytes

ROLLOUT = "trace.json"
"""A single rollout's file in the folder of `ask` or `trace replay`."""
WRITTEN = (ROLLOUT, "trace.html", "timings.json")
LOCK = ".rollout.lock"
_ENDING = ".json.gz"
_LONGEST_NAME = 255
"""Bytes that file systems take for a name."""
_KEPT_OF_A_NAME = 150


class TraceError(ValueError):
    """A trace that is not there or cannot be read."""


@contextmanager
def claimed(folder: Path, *, numbered: bool = False) -> Iterator[Path]:
    """Hold a folder for a rollout, for this process alone, and say which.

    Args:
        folder: the folder; made if it is not there.
        numbered: whether NAME-2, NAME-3, ... is taken where there is a rollout, or is being made.

    Raises:
        TraceError: there is one, which would be lost, or another process is making one.
    """
    names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    for place in itertools.chain([folder], names if numbered else ()):
        made = not place.exists()
        try:
            held = _take(place)
            break
        except TraceError:
            if not numbered:
                raise
    with held:
        try:
            yield place
        finally:
            (place / LOCK).unlink(missing_ok=True)
            if made:
                _remove_empty(place)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # what is kept is not taken away
        folder.rmdir()


def _take(folder: Path) -> IO[str]:
    """The lock of a folder without a rollout."""
    _check_free(folder)  # before anything is made
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(folder / LOCK)
    except BlockingIOError:
        raise TraceError(
            f"another process is writing a rollout to {folder}. Give another --out."
        ) from None
    try:
        _check_free(folder)  # who had it before may have written one since
    except TraceError:
        (folder / LOCK).unlink()
        held.close()
        raise
    return held


def _check_free(folder: Path) -> None:
    kept = [name for name in WRITTEN if (folder / name).exists()]
    if kept:
        raise TraceError(
            f"{folder} already holds a rollout ({', '.join(kept)}). Give another --out, or take "
            "it away."
        )


def trace_path(run: Path, sample: str) -> Path:
    """Where a sample's trace is; what a file name cannot hold is escaped, or told by a digest."""
    *folders, last = sample.split("/")
    return (run / TRACES).joinpath(*map(_file_name, folders), _file_name(last, _ENDING))


def _file_name(part: str, ending: str = "") -> str:
    """A part of an id as a name; only one that is too long loses its end, for a digest of all."""
    quoted = quote(part, safe=" ()+,=@")
    if set(part) == {"."}:
        quoted = quoted.replace(".", "%2E")
    if len(quoted) + len(ending) > _LONGEST_NAME:
        digest = hashlib.sha256(part.encode()).hexdigest()[:16]
        quoted = f"{quoted[:_KEPT_OF_A_NAME]}-{digest}"
    return quoted + ending


def write_trace(run: Path, sample: str, trace: Mapping[str, Any]) -> None:
    """Write a sample's trace, all or nothing; when this returns it survives a crash.

    Raises:
        StoreError: the disk is full or refuses.
    """
    text = json.dumps(trace, sort_keys=True, ensure_ascii=True, default=str)
    packed = gzip.compress(text.encode(), compresslevel=6, mtime=0)
    write_bytes(trace_path(run, sample), packed)


def read_trace(path: Path) -> dict[str, Any]:
    """A trace that `ask` or `eval` wrote.

    Raises:
        TraceError: there is none, or it cannot be read.
    """
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        trace = json.loads(text)
    except FileNotFoundError:
        raise TraceError(f"there is no trace at {path}; `ask` and `eval` write them.") from None
    except (OSError, EOFError, ValueError, zlib.error, RecursionError) as error:
        raise TraceError(f"{path} is no trace ({error}).") from None
    if not isinstance(trace, dict) or "entries" not in trace:
        raise TraceError(f"{path} is JSON, but no trace of a rollout.")
    return trace
