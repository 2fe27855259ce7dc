"""Kills a command at every moment at which it changes the disk, and repeats it each time.

Between two changes the disk is as it was, so a process killed at any time leaves what one of these
leaves: before each file is made, opened, written to, renamed or removed, and in the middle of each
write. Children are real processes and are really killed (SIGKILL); the model, the videos and
lmms-eval are real too.

    python kill_lab.py WORLD CHECKPOINT FOLDER EVERY

EVERY 5 takes each fifth moment; test_kills.py reads FOLDER/report.json. Three commands are killed:
`eval` (from nothing to its result), `eval` that merges the parts of two shards, and `score` on a
run of another version's scores.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvideo3.harness.evaluate import evaluate, settle_environment
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.recorder import SuiteRecorder

settle_environment()

import internvideo3.harness.lmms  # noqa: E402, F401  imported once, before the forks
from internvideo3.harness.rescore import rescore  # noqa: E402
from internvideo3.harness.store import RunStore, read_rows  # noqa: E402

SUITES = ("world_short", "world_long")
NEW_TOKENS = 4
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Moments:
    """Counts this process's changes below a folder; at a chosen one the process is killed."""

    def __init__(self, root: Path, log: Path, at: int | None, *, half: bool):
        """Start counting.

        Args:
            root: the folder.
            log: where each moment is noted, a line each.
            at: number of the change before which the process is killed; None for never.
            half: whether half of that change, a write, is made first.
        """
        self._root, self._at, self._half = str(root), at, half
        self._count, self._log = 0, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._write, self._fsync = os.write, os.fsync
        os.write = self.write  # type: ignore[assignment]
        os.fsync = self.fsync  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(args[2], int) and args[2] & _WRITING
        if opened or event in _CHANGES:
            path = os.fspath(args[0]) if not isinstance(args[0], int) else ""
            # Trees are removed by names relative to an open folder.
            inside = str(path).startswith(self._root) or event in ("os.remove", "os.rmdir")
            if inside and not str(path).endswith((".lock", ".create")):
                self._moment(event)

    def write(self, descriptor: int, data: Any) -> int:
        """os.write, which may be killed in the middle."""
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        if target.is_relative_to(self._root):
            if self._half and self._count == self._at:
                self._write(descriptor, bytes(data)[: max(1, len(data) // 2)])
            self._moment("write")
        return self._write(descriptor, data)

    def fsync(self, descriptor: Any) -> None:
        """os.fsync, which may be killed before it begins."""
        self._moment("fsync")
        self._fsync(descriptor)

    def _moment(self, what: str) -> None:
        if self._count == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        self._count += 1
        self._write(self._log, (what + "\n").encode())


@dataclass(frozen=True)
class Command:
    """Something that writes to a run."""

    name: str
    work: Callable[[Path], object]
    """Does it to a folder."""
    begin: Path | None
    """The folder to begin with; None for none."""


def main(world: Path, checkpoint: Path, folder: Path, every: int) -> dict[str, Any]:
    options = EvalOptions(
        model=str(checkpoint),
        suites=SUITES,
        out=folder / "whole",
        root=world,
        max_new_tokens=NEW_TOKENS,
    )
    assert child(lambda: evaluate(options)) == 0
    shards, other = folder / "shards", folder / "other"
    for shard in ("1/2", "2/2"):
        assert child(lambda s=shard: evaluate(replace(options, out=shards, shard=s))) == 0  # type: ignore[misc]
    shutil.copytree(folder / "whole", other)
    spoil_scores(other)
    commands = (
        Command("eval", lambda out: evaluate(replace(options, out=out)), None),
        Command("eval of merged shards", lambda out: evaluate(replace(options, out=out)), shards),
        Command("score", rescore, other),
    )
    whole = content(folder / "whole")
    found = {one.name: kill_everywhere(one, folder, whole, every) for one in commands}
    return {"samples": len(on_disk(folder / "whole")), "every": every, "commands": found}


def spoil_scores(run: Path) -> None:
    """Make a run's scores those of another version."""
    with RunStore.open(run, json.loads((run / "run.json").read_text())) as store:
        for suite in SUITES:
            nothing = {"value": 0.0, "parsed": None, "outcome": "unreadable"}
            rows = [row | {"official": nothing} for row in store.answered(suite).values()]
            store.rewrite(suite, rows)
    (run / "results.json").unlink()


def kill_everywhere(
    command: Command, folder: Path, whole: dict[str, bytes], every: int
) -> dict[str, Any]:
    """Kill a command at its moments, one after the other, and repeat it after each."""
    moments = attempt(command, folder, None, half=False).moments
    plan = [(at, False) for at in range(len(moments))]
    plan += [(at, True) for at, what in enumerate(moments) if what == "write"]
    counts = {"changes": len(moments), "writes": moments.count("write"), "kills": 0}
    most_lost = 0
    for at, half in sorted(plan)[::every]:
        where = f"{command.name}, change {at} ({moments[at]}{', half' if half else ''})"
        killed = attempt(command, folder, at, half=half)
        assert killed.status == -signal.SIGKILL, f"{where}: status {killed.status}"
        kept = on_disk(folder / "killed")
        under_way = set(killed.batches[-1]) if killed.batches else set()
        lost = {sample for batch in killed.batches for sample in batch} - kept
        assert lost <= under_way, f"{where}: lost {sorted(lost - under_way)}"
        again = attempt(command, folder, None, half=False, begin=False)
        assert again.status == 0, f"{where}: the repeated command has status {again.status}"
        twice = {sample for batch in again.batches for sample in batch} & kept
        assert not twice, f"{where}: computed again {sorted(twice)}"
        assert content(folder / "killed") == whole, f"{where}: other bytes"
        litter = sorted(p.name for p in (folder / "killed").rglob("*.part"))
        assert not litter, f"{where}: left {litter}"
        counts["kills"] += 1
        most_lost = max(most_lost, len(lost))
    return counts | {"most_samples_lost": most_lost}


@dataclass(frozen=True)
class Attempt:
    """One process."""

    status: int
    moments: list[str]
    batches: list[list[str]]
    """Ids of samples that were computed, batch by batch, noted before they are written."""


def attempt(
    command: Command, folder: Path, at: int | None, *, half: bool, begin: bool = True
) -> Attempt:
    out, log, computed = folder / "killed", folder / "moments.txt", folder / "computed.txt"
    if begin:
        shutil.rmtree(out, ignore_errors=True)
        if command.begin is not None:
            shutil.copytree(command.begin, out)
    computed.unlink(missing_ok=True)

    def work() -> None:
        note_batches(computed)
        Moments(out, log, at, half=half)
        command.work(out)

    status = child(work)
    batches = computed.read_text().splitlines() if computed.exists() else []
    return Attempt(status, log.read_text().split(), [line.split("\t") for line in batches])


def note_batches(log: Path) -> None:
    recorded = SuiteRecorder.record

    def record(self: SuiteRecorder, task: str, answers: Any) -> None:
        with log.open("a") as file:
            file.write("\t".join(str(doc["id"]) for doc, _ in answers) + "\n")
        recorded(self, task, answers)

    SuiteRecorder.record = record  # type: ignore[method-assign]


def child(work: Callable[[], object]) -> int:
    """Run in a process of its own; what it says goes to stderr."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 99
    try:
        os.dup2(2, 1)
        work()
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def content(run: Path) -> dict[str, bytes]:
    """The bytes that equal runs have in common: all but run.json and timings."""
    files = [run / "samples" / f"{suite}.jsonl" for suite in SUITES] + [run / "results.json"]
    return {path.name: path.read_bytes() for path in files}


def on_disk(out: Path) -> set[str]:
    """Samples in a run's files; while parts are merged one may be in two of them."""
    kept: set[str] = set()
    for file in (path for suite in SUITES for path in out.glob(f"**/samples/{suite}.jsonl")):
        ids = [row["id"] for row in read_rows(file)]
        assert len(ids) == len(set(ids)), f"{file} has a sample twice"
        kept |= set(ids)
    return kept


if __name__ == "__main__":
    report = main(*map(Path, sys.argv[1:4]), every=int(sys.argv[4]))
    (Path(sys.argv[3]) / "report.json").write_text(json.dumps(report))
