"""Runs evaluations in forked children and interrupts them; test_crash.py reads its report.

The parent imports everything once (lmms-eval takes ten seconds) and never computes. Children are
real processes: they are killed, interrupted or refused disk space like any other.

    python crash_lab.py WORLD CHECKPOINT FOLDER SEED
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from internvideo3.harness.evaluate import evaluate, settle_environment
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.recorder import SuiteRecorder

settle_environment()

import internvideo3.harness.lmms  # noqa: E402, F401  imported once, before the forks
from internvideo3.harness.store import read_rows  # noqa: E402

SUITES = ("world_short", "world_long")
KILLS = 5
NEW_TOKENS = 8


def main(world: Path, checkpoint: Path, folder: Path, seed: int) -> dict[str, Any]:
    def options(name: str) -> EvalOptions:
        return EvalOptions(
            model=str(checkpoint),
            suites=SUITES,
            out=folder / name,
            root=world,
            max_new_tokens=NEW_TOKENS,
        )

    def command(name: str) -> Callable[[], int]:
        return lambda: run_cli(options(name))

    assert wait(fork(lambda: run(options("whole")))) == 0
    samples = len(on_disk(options("whole").out))
    assert wait(fork(lambda: run(options("again")))) == 0
    kills = kill_and_resume(options("killed"), folder, random.Random(seed), samples)
    return {
        "seed": seed,
        "samples": samples,
        "kills": kills,
        "interrupted": interrupt(
            command("interrupted"), folder / "interrupted", folder / "int.txt"
        ),
        "full": fill_disk(command("full"), folder / "full.txt"),
        "full_resumed": wait(fork(command("full"))),
    }


def kill_and_resume(
    options: EvalOptions, folder: Path, rng: random.Random, samples: int
) -> list[dict[str, Any]]:
    kills = []
    # Counted in answers, not in seconds: on any machine all five strike before the end.
    for number, answers in enumerate(sorted(rng.sample(range(samples), KILLS))):
        log = folder / f"computed-{number}.txt"
        child = fork(lambda log=log: run(options, log))  # type: ignore[misc]
        while len(on_disk(options.out)) < answers:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        status = wait(child)
        kills.append({"after": answers, "status": status, "on_disk": on_disk(options.out)})
    last = folder / f"computed-{KILLS}.txt"
    assert wait(fork(lambda: run(options, last))) == 0
    for number, kill in enumerate(kills):
        kill["computed_later"] = [
            line
            for later in range(number + 1, KILLS + 1)
            for line in lines(folder / f"computed-{later}.txt")
        ]
    return kills


def interrupt(command: Callable[[], int], out: Path, said: Path) -> dict[str, Any]:
    """Press Ctrl-C once the first answers are on disk, then repeat the command.

    On a busy machine the run can end before the key arrives; that is no interruption, so the run
    is started again in an empty folder.
    """
    # A suite that was started in the background of a script inherits a SIGINT that is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for _ in range(5):
        child = fork(command, said)
        while not on_disk(out):
            time.sleep(0.005)
        os.kill(child, signal.SIGINT)
        status = wait(child)
        if status != 0:
            break
        shutil.rmtree(out)
    return {"status": status, "said": said.read_text(), "on_disk": on_disk(out)} | {
        "resumed": wait(fork(command))
    }


def fill_disk(command: Callable[[], int], said: Path) -> dict[str, Any]:
    """A limit on file size stands for a full disk: writes fail in the middle of a file."""

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
        return command()

    status = wait(fork(limited, said))
    return {"status": status, "said": said.read_text()}


def run(options: EvalOptions, log: Path | None = None) -> int:
    if log is not None:
        recorded = SuiteRecorder.record

        def record(self: SuiteRecorder, task: str, answers: Any) -> None:
            with log.open("a") as file:
                file.writelines(doc["id"] + "\n" for doc, _ in answers)
            recorded(self, task, answers)

        SuiteRecorder.record = record  # type: ignore[method-assign]
    evaluate(options)
    return 0


def run_cli(options: EvalOptions) -> int:
    from internvideo3.harness import cli

    sys.argv = ["internvideo3", "eval", "--model", options.model, "--out", str(options.out)]
    sys.argv += ["--suite", ",".join(options.suites), "--root", str(options.root)]
    sys.argv += ["--max-new-tokens", str(NEW_TOKENS)]
    try:
        cli.main()
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def fork(work: Callable[[], int], said: Path | None = None) -> int:
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        target = os.open(said or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2 if said else 1)
        status = work()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_disk(out: Path) -> list[str]:
    return [row["id"] for suite in SUITES for row in read_rows(out / f"samples/{suite}.jsonl")]


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


if __name__ == "__main__":
    report = main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    (Path(sys.argv[3]) / "report.json").write_text(json.dumps(report))
