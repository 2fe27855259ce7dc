"""One run on disk: `run.json`, append-only samples, a timings sidecar, `results.json`.

    runs/<id>/run.json                 what was run: command, model, config, versions, hardware
    runs/<id>/samples/<suite>.jsonl    one line a sample, written and fsynced when it is answered
    runs/<id>/timings/<suite>.jsonl    seconds of each sample; apart, so that equal runs are
                                       byte-equal
    runs/<id>/results.json             one TaskResult a suite, written when the suite is complete
    runs/<id>/traces/<sample>.json.gz  the rollout of an agentic answer; see `traces`
    runs/<id>/measurements.jsonl       what the profiler measured
    runs/<id>/parts/<part>/...         samples and timings of a process that works on a part only,
                                       until a process that works on all merges them

While a suite runs its lines are in the order of answering; `finish` rewrites them, atomically, in
the order of the data set. A process killed at any moment loses at most the lines it was writing: a
torn last line is cut off at the next start and its sample is answered again.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from internvideo3.harness.locks import lock

Row = dict[str, Any]

SCHEMA = 1
PARTS = "parts"
TRACES = "traces"
LOCK = ".lock"
"""Held in a run directory by whoever writes there."""
# What makes two commands the same run. Everything else in run.json is a record of circumstances.
_IDENTITY = ("mode", "model.digest", "suites", "config")
_UNUSED = {"absent", "null", "false"}
SAMPLES_DIGEST = "samples_sha256"
"""Field of a result: which samples file it was made from (`reports.load` reads it)."""
_UNFINISHED = ".part"
"""Ending of a file that takes another's name when it is whole; a killed process leaves it."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class StoreError(ValueError):
    """A run directory that cannot be used, or cannot be written to."""


def dumps(row: Mapping[str, Any]) -> str:
    """One compact JSON line with sorted keys, so that equal rows are equal bytes."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON, all or nothing.

    Raises:
        StoreError: no space left, or the directory cannot be written.
    """
    text = json.dumps(value, ensure_ascii=False, indent=2)
    _replace(path, [text.encode(), b"\n"])


def write_text(path: Path, text: str) -> None:
    """Write a text file, all or nothing; its folder is made if missing.

    Raises:
        StoreError: no space left, or the directory cannot be written.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return
    _replace(path, [text.encode()])


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, all or nothing; its folder is made if missing.

    Raises:
        StoreError: no space left, or the directory cannot be written.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, [data])


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file; a torn last line is left out, a missing file is empty.

    Raises:
        StoreError: a line other than the last is not JSON.
    """
    if not path.exists():
        return []
    rows, _ = _parse(path)
    return rows


class RunStore:
    """The run directory of one command; open it with `RunStore.open`, in a `with` block.

    A process that works on a part (a rank, a shard) writes to a folder of its own, and reads what
    all have written. A process that works on all merges the parts, suite by suite.
    """

    def __init__(self, root: Path, run: Row, locks: Sequence[IO[str]], part: str | None = None):
        self.root = root
        self.run = run
        self.part = part
        self._locks = locks
        self._home = root if part is None else root / PARTS / part

    @classmethod
    def open(cls, root: Path, run: Row, part: str | None = None) -> "RunStore":
        """Create the run directory, or continue the one that is there.

        Args:
            root: the directory.
            run: the content of run.json for this command.
            part: name of the part that this process works on; None for all.

        Raises:
            StoreError: the directory holds another command's run (what differs is listed), holds
                files that are no run, is in use by another process, or cannot be written.
        """
        with _explained(root):
            root.mkdir(parents=True, exist_ok=True)
            # Parts share the directory; whoever works on all has it alone.
            locks = [_locked(root, shared=part is not None)]
            try:
                home = root
                if part is not None:
                    home = root / PARTS / part
                    home.mkdir(parents=True, exist_ok=True)
                    locks.append(_locked(home))
                with _creating(root):
                    kept = _continued(root, run, alone=part is None)
                    write_json(root / "run.json", kept)
                _prepare(home)
                _sweep(root if part is None else home)
            except BaseException:
                for held in locks:
                    held.close()
                raise
        return cls(root, kept, locks, part)

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(self, *_: object) -> None:
        for held in self._locks:
            held.close()

    def answered(self, suite: str) -> dict[str, Row]:
        """The samples of `suite` that are on disk, parts included, by id.

        Of several answers to one sample one without error counts, else the last.
        """
        rows: dict[str, Row] = {}
        for path in self._all("samples", suite):
            for row in read_rows(path):
                before = rows.get(row["id"])
                if before is None or before.get("error") or not row.get("error"):
                    rows[row["id"]] = row
        return rows

    def add(self, suite: str, rows: Sequence[Row], timings: Sequence[Row]) -> None:
        """Append answered samples; when this returns they survive a crash.

        Timings are written first: a crash in between leaves timings without a sample, which the
        next answer to that sample replaces, and never a sample without timings.

        Raises:
            StoreError: no space left; what was on disk before stays readable.
        """
        _append(self._home / "timings" / f"{suite}.jsonl", timings)
        _append(self._home / "samples" / f"{suite}.jsonl", rows)

    def rewrite(self, suite: str, rows: Iterable[Row]) -> None:
        """Replace the samples of a suite, all or nothing.

        Raises:
            StoreError: no space left; the old samples stay.
        """
        _replace(self._samples(suite), _blocks(dumps(row) + "\n" for row in rows))

    def finish(self, suite: str, order: Sequence[str], result: Row) -> None:
        """Sort the suite's files into the data set's order and record its result.

        With the result goes a digest of the samples file that it is of: a retry or another scoring
        that was interrupted leaves other samples beside it, and a reader can tell.

        Args:
            suite: the suite, all of whose samples are on disk.
            order: its sample ids in the order of the data set.
            result: the suite's TaskResult as a dict.

        Raises:
            StoreError: no space left; the unsorted files stay as they were.
        """
        samples, timings = self.answered(suite), self._times(suite)
        digest = hashlib.sha256()
        _replace(self._timings(suite), _blocks(_sorted(timings, order)))
        _replace(self._samples(suite), _digested(_blocks(_sorted(samples, order)), digest))
        results = self.results() | {suite: {**result, SAMPLES_DIGEST: digest.hexdigest()}}
        write_json(self.root / "results.json", dict(sorted(results.items())))
        self._drop_parts(suite)

    def _times(self, suite: str) -> dict[str, Row]:
        return {row["id"]: row for path in self._all("timings", suite) for row in read_rows(path)}

    def _drop_parts(self, suite: str) -> None:
        """Take away what is merged; a part that holds nothing more goes with its folder."""
        for part in sorted((self.root / PARTS).glob("*")):
            for kind in ("samples", "timings"):
                (part / kind / f"{suite}.jsonl").unlink(missing_ok=True)
            if not any(part.glob("*/*.jsonl")):
                shutil.rmtree(part)
        with contextlib.suppress(OSError):  # not empty: other suites are still in parts
            (self.root / PARTS).rmdir()

    def results(self) -> Row:
        """The results recorded so far, by suite."""
        path = self.root / "results.json"
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{path} is damaged ({error}). Delete it and run `internvideo3 score {self.root}`: "
                "it is made again from the answers."
            ) from None

    def _all(self, kind: str, suite: str) -> list[Path]:
        """The whole run's file, then those of the parts."""
        parts = sorted((self.root / PARTS).glob(f"*/{kind}/{suite}.jsonl"))
        return [self.root / kind / f"{suite}.jsonl", *parts]

    def _samples(self, suite: str) -> Path:
        return self.root / "samples" / f"{suite}.jsonl"

    def _timings(self, suite: str) -> Path:
        return self.root / "timings" / f"{suite}.jsonl"


def read_run(root: Path) -> Row:
    """The content of run.json of a finished or unfinished run.

    Raises:
        StoreError: `root` is not a run directory.
    """
    path = root / "run.json"
    if not path.is_file():
        raise StoreError(
            f"{root} is not a run directory: it has no run.json. "
            "Give the directory that was the --out of `internvideo3 eval`."
        )
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise StoreError(
            f"{path} is not JSON ({error}). Restore it, or run again elsewhere."
        ) from None


def suites_of(root: Path) -> list[str]:
    """The suites that have samples in a run directory, by name.

    Raises:
        StoreError: answers of shards or ranks are not merged; without them a suite, or the run,
            would look finished that is not.
    """
    parts = [path for path in root.glob(f"{PARTS}/*/samples/*.jsonl") if path.stat().st_size]
    if parts:
        suites = ", ".join(sorted({path.stem for path in parts}))
        command = shlex.join(_without_shard(read_run(root).get("command") or ()))
        raise StoreError(
            f"{root}: answers to {suites} are in parts, of shards or of a launch that did not end. "
            f"Merge them first by the command that made them, without --shard"
            + (f": {command}" if command else ".")
        )
    return sorted(path.stem for path in (root / "samples").glob("*.jsonl"))


def _without_shard(command: Sequence[str]) -> list[str]:
    kept = [one for one in command if not str(one).startswith("--shard=")]
    at = kept.index("--shard") if "--shard" in kept else len(kept)
    return [*map(str, kept[:at]), *map(str, kept[at + 2 :])]


def append_measurements(root: Path, rows: Sequence[Row]) -> None:
    """Append profiler rows to a run's measurements.jsonl.

    Raises:
        StoreError: no space left, or the directory cannot be written.
    """
    append_rows(root / "measurements.jsonl", rows)


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a file, in a folder that is made if missing; fsynced on return.

    Raises:
        StoreError: no space left, or the directory cannot be written.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _append(path, rows)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two commands' run.json, one line each; empty for the same run."""
    old, new = dict(_flat(_identity(before))), dict(_flat(_identity(now)))
    differing = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "absent") != new.get(key, "absent")
        # A setting that an older version did not have is the same where it is not used.
        and {old.get(key, "absent"), new.get(key, "absent")} - _UNUSED
    ]
    lines = dict.fromkeys(
        _difference(key, before, now, old.get(key, "absent"), new.get(key, "absent"))
        for key in differing
    )
    return list(lines)


def _difference(
    key: str, before: Mapping[str, Any], now: Mapping[str, Any], old: str, new: str
) -> str:
    """One setting in two commands, a model by its name and a suite that one lacks as a whole."""
    if key == "model.digest":
        key = "model"
        models = [run.get("model", {}) for run in (before, now)]
        old, new = (f"{one.get('name')} ({str(one.get('digest'))[:12]})" for one in models)
    elif key.startswith("suites."):
        suite = key.split(".")[1]
        told = [run.get("suites", {}).get(suite) for run in (before, now)]
        if None in told:
            key = f"suites.{suite}"
            old, new = ("absent" if one is None else "asked" for one in told)
    return f"{key}: {old} in the directory, {new} now"


def _identity(run: Mapping[str, Any]) -> Row:
    picked: Row = {}
    for name in _IDENTITY:
        value: Any = run
        for part in name.split("."):
            value = value.get(part, {}) if isinstance(value, Mapping) else {}
        picked[name] = value
    return picked


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value, ensure_ascii=False)


def _continued(root: Path, run: Row, *, alone: bool) -> Row:
    """The run.json to keep: the present one if it is of the same command, else `run`.

    Where another command recorded nothing (its weights could not be loaded, it was stopped before
    its first answer), there is nothing to keep, and whoever has the directory alone may take it.
    """
    if (root / "run.json").exists():
        before = read_run(root)
        differing = differences(before, run)
        if differing and alone and not _recorded(root):
            return run
        if differing:
            listed = "\n".join(f"  {line}" for line in differing)
            raise StoreError(
                f"{root} holds the run of another command. What differs:\n{listed}\n"
                "Give another --out, or repeat the command that made it (run.json has it)."
            )
        if (before.get("commit"), before.get("dirty")) != (run.get("commit"), run.get("dirty")):
            resumed = [*before.get("resumed", []), _circumstances(run)]
            return before | {"resumed": resumed}
        return before
    ours = {PARTS}  # made just now by a process that works on a part
    names = {path.name for path in root.iterdir() if not path.name.startswith(".")}
    foreign = sorted(names - ours)
    if foreign:
        raise StoreError(
            f"{root} is not empty and not a run directory (it holds {', '.join(foreign[:5])}). "
            "Give a new --out."
        )
    return run


def _recorded(root: Path) -> bool:
    """Whether a run directory holds anything beside its description."""
    written = (*root.glob("*.jsonl"), *root.glob("*/*.jsonl"), *root.glob(f"{PARTS}/*/*/*.jsonl"))
    return (root / "results.json").exists() or any(path.stat().st_size for path in written)


def _prepare(root: Path) -> None:
    for folder in (root / "samples", root / "timings"):
        folder.mkdir(exist_ok=True)
        for path in sorted(folder.glob("*.jsonl")):
            _repair(path)
    if (root / "measurements.jsonl").exists():
        _repair(root / "measurements.jsonl")


def _sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder that this process has alone."""
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for path in place.glob(f".*{_UNFINISHED}"):
            path.unlink()
    # Traces lie in folders of folders, and former versions left tmp*.part there.
    for path in (folder / TRACES).rglob(f"*{_UNFINISHED}"):
        if path.is_file():
            path.unlink()


def _circumstances(run: Row) -> Row:
    return {key: run.get(key) for key in ("created", "commit", "dirty")}


def _locked(root: Path, *, shared: bool = False) -> IO[str]:
    try:
        return lock(root / LOCK, shared=shared)
    except BlockingIOError:
        raise StoreError(
            f"{root} is in use by another process. Wait for it, or give another --out."
        ) from None


@contextlib.contextmanager
def _creating(root: Path) -> Iterator[None]:
    """One process at a time looks whether the run exists, and creates it."""
    with (root / ".create").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _parse(path: Path) -> tuple[list[Row], int]:
    """The whole rows of a file, and how many bytes they take."""
    rows: list[Row] = []
    good = 0
    data = path.read_bytes()
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            if good + len(line) < len(data):
                raise StoreError(
                    f"{path}, line {number}, is not a JSON object, and more lines follow: the file "
                    "was damaged. Delete that line; its sample is then answered again."
                )
            break
        rows.append(row)
        good += len(line)
    return rows, good


def _repair(path: Path) -> None:
    """Cut off a torn last line."""
    _, good = _parse(path)
    if good < path.stat().st_size:
        os.truncate(path, good)


def repair_rows(path: Path) -> None:
    """Cut off a torn last line, which a killed process may have left; a missing file is whole.

    Raises:
        StoreError: a line other than the last is damaged, or the file cannot be written.
    """
    with _explained(path):
        if path.is_file():
            _repair(path)


def _append(path: Path, rows: Iterable[Row]) -> None:
    data = "".join(dumps(row) + "\n" for row in rows).encode()
    with _explained(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            _write_all(file.fileno(), data)
            os.fsync(file.fileno())
        except OSError:
            # Half a line on a full disk would be repaired at the next start anyway; cutting it off
            # now keeps the file readable for `score` and `report` until then.
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


_BLOCK = 1 << 20


def _blocks(pieces: Iterable[str]) -> Iterator[bytes]:
    """Pieces of text together, in blocks of about a mebibyte."""
    block = bytearray()
    for piece in pieces:
        block += piece.encode()
        if len(block) >= _BLOCK:
            yield bytes(block)
            block.clear()
    yield bytes(block)


def _sorted(rows: Mapping[str, Row], order: Sequence[str]) -> Iterator[str]:
    """Rows as lines, in the order of the data set."""
    return (dumps(rows[key]) + "\n" for key in order if key in rows)


def _digested(blocks: Iterable[bytes], digest: "hashlib._Hash") -> Iterator[bytes]:
    """The same blocks, which the digest has seen when they are used up."""
    for block in blocks:
        digest.update(block)
        yield block


def _write_blocks(descriptor: int, blocks: Iterable[bytes]) -> None:
    """Write, sync and close."""
    try:
        for block in blocks:
            _write_all(descriptor, block)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(path: Path, blocks: Iterable[bytes]) -> None:
    """Write a file from its blocks, all or nothing, without holding the whole of it."""
    # The file's own name may be as long as names can be.
    prefix = f".{path.name[:32]}."
    with _explained(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=_UNFINISHED)
        try:
            _write_blocks(descriptor, blocks)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say in words what an operating-system error at `path` means for the run."""
    try:
        yield
    except OSError as error:
        reason = "no space left" if error.errno in _FULL else (error.strerror or str(error))
        raise StoreError(
            f"Cannot write {path}: {reason}. Everything that was written before is kept; "
            "make room or fix the directory, and repeat the command to continue."
        ) from error
