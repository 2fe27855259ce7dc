"""Processes that make videos side by side.

A worker is `python -m internvideo3.tasks.world.workers`: jobs come in as JSON lines, records go out
as JSON lines. Plain processes and pipes, because `multiprocessing` would either fork a program that
has threads or run the caller's main module again; and a worker whose parent was killed notices at
its next line.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from typing import IO, Any, Final

from internvideo3.tasks.world.files import Job, Record, make_video

SMALL_S: Final = 300.0
"""Seconds of video below which one process is faster than starting several."""


class WorkerError(RuntimeError):
    """A worker ended without finishing its jobs."""


def make_videos(jobs: Sequence[Job], workers: int | None = None) -> Generator[Record, None, None]:
    """Make videos, several at a time; records come as videos are finished, in any order.

    Args:
        jobs: Videos to make.
        workers: Processes; by default one for each core that this process may use.

    Raises:
        OSError: If the disk is full or refuses.
        WorkerError: If a worker is killed.
    """
    count = min(workers or _cores(), len(jobs))
    if count <= 1 or (workers is None and sum(job.length_s for job in jobs) < SMALL_S):
        yield from map(make_video, jobs)
        return
    # Long videos first, so that the workers finish together.
    ranked = sorted(jobs, key=lambda job: -job.length_s)
    started: list[subprocess.Popen[str]] = []
    answers: queue.Queue[dict[str, Any]] = queue.Queue()
    try:
        for share in (ranked[start::count] for start in range(count)):
            worker = _start()
            started.append(worker)
            threading.Thread(target=_feed, args=(worker, share), daemon=True).start()
            threading.Thread(target=_listen, args=(worker, answers), daemon=True).start()
        yield from _collect(answers, len(jobs))
    finally:
        for worker in started:
            worker.kill()
            worker.wait()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _start() -> subprocess.Popen[str]:
    # The parent's import path, so that a worker finds this package however the parent did.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "internvideo3.tasks.world.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _feed(worker: subprocess.Popen[str], jobs: Sequence[Job]) -> None:
    try:
        with _pipe(worker.stdin) as pipe:
            for job in jobs:
                pipe.write(json.dumps(asdict(job)) + "\n")
    except BrokenPipeError:
        return  # the worker is gone; its listener reports that


def _listen(worker: subprocess.Popen[str], answers: queue.Queue[dict[str, Any]]) -> None:
    for line in _pipe(worker.stdout):
        answers.put(json.loads(line))
    answers.put({"ended": worker.wait()})


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def _collect(answers: queue.Queue[dict[str, Any]], count: int) -> Iterator[Record]:
    while count:
        answer = answers.get()
        if "errno" in answer:
            raise OSError(answer["errno"], answer["message"], answer["path"])
        if answer.get("ended"):
            raise WorkerError(f"a process that makes videos ended with status {answer['ended']}")
        if "record" in answer:
            count -= 1
            yield Record(**answer["record"])


def main() -> None:
    """A worker: jobs from stdin, records to stdout."""
    # Ctrl-C reaches the whole group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        try:
            _answer({"record": asdict(make_video(Job(**json.loads(line))))})
        except BrokenPipeError:
            return
        except OSError as error:
            path = str(error.filename or "")
            _answer({"errno": error.errno or 0, "message": error.strerror or "", "path": path})


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
