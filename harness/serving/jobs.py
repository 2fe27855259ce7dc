"""One thread that answers, and those who wait for it: bounded, and each can leave at any time."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from internvideo3.harness.serving.admission import stopping
from internvideo3.harness.serving.studio import Say, Told
from internvideo3.harness.serving.wire import ApiError

LOG = logging.getLogger("uvicorn.error")
STOPPING_S = 5.0
"""Seconds after which those who wait are told that the server stops, though a step goes on."""


class Gone(Exception):  # noqa: N818 - not an error
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Words:
    """A piece of an answer."""

    field: str
    """content, or reasoning_content."""
    text: str


Event = Words | Told | ApiError
"""What comes of a job, in order; the last one is not `Words`."""
Work = Callable[[Say], Told]


@dataclass
class Job:
    """One answer."""

    work: Work
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    left: bool = False
    """Whether nobody waits any more. A plain flag: an `Event` has a lock, which a signal that comes
    while it is set would wait for."""

    def leave(self) -> None:
        """Nobody waits any more: the answer ends at its next step."""
        self.left = True

    def say(self, name: str, text: str) -> None:
        """Hands words on.

        Raises:
            Gone: nobody waits for them.
        """
        if self.left:
            raise Gone
        if text:
            self.tell(Words(name, text))

    def tell(self, event: Event) -> None:
        """Hands an event to those who wait."""
        # The loop may be closed, with all who waited.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Line:
    """The queue before the model.

    Args:
        waiting: most requests that wait while one is answered.
        interrupt: ends what an answer in progress waits for.
    """

    def __init__(self, waiting: int, interrupt: Callable[[], None]) -> None:
        self.waiting = waiting
        self._interrupt = interrupt
        self.inside = 0
        """Requests that have a place."""
        # Simple, since a signal may call `close` in the middle of its thread's own `put`.
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._current: Job | None = None
        # Reentrant: a signal may call `close` while its thread holds it.
        self._lock = threading.RLock()
        self._closed_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the line, from before the body is read until the answer is sent.

        Raises:
            ApiError: the line is full, or closed.
        """
        if self._closed_s is not None:
            raise stopping()
        if self.inside > self.waiting:
            raise ApiError(
                429,
                f"one request is answered and {self.inside - 1} wait, as many as may. "
                "Try again later.",
                kind="rate_limit_error",
                code="queue_full",
            )
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    @contextmanager
    def job(self, work: Work) -> Iterator[Job]:
        """Puts work in the line; leaving the block gives it up.

        Raises:
            ApiError: the line is closed.
        """
        job = Job(work, asyncio.get_running_loop())
        self._jobs.put(job)
        try:
            # Only behind the `put` is it certain that the end of the line comes after the job.
            if self._closed_s is not None:
                raise stopping()
            yield job
        finally:
            self._give_up(job)

    def close(self) -> None:
        """Ends the answer in progress and those that wait; new ones are refused."""
        self._closed_s = time.monotonic()
        self._jobs.put(None)
        current = self._current
        if current is not None:
            self._give_up(current)

    def is_stuck(self) -> bool:
        """Whether it was closed, and a step of an answer goes on that cannot be ended."""
        return self._closed_s is not None and time.monotonic() - self._closed_s > STOPPING_S

    def join(self, seconds: float) -> bool:
        """Waits until the thread has ended; whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _give_up(self, job: Job) -> None:
        job.leave()
        with self._lock:
            if self._current is job:
                self._interrupt()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                self._current = job
            outcome = _outcome(job) if self._closed_s is None else stopping()
            with self._lock:
                self._current = None
            job.tell(outcome)
        while not self._jobs.empty():
            late = self._jobs.get()
            if late is not None:
                late.tell(stopping())


def _outcome(job: Job) -> Event:
    try:
        job.say("content", "")
        return job.work(job.say)
    except ApiError as error:
        return error
    except Gone:
        return stopping()
    except ValueError as error:  # what is wrong with the video or the question
        return ApiError(400, str(error), param="messages")
    except Exception:  # the thread serves the next request; the log has what happened
        LOG.exception("an answer failed")
        message = "the answer failed; the server's log says where."
        return ApiError(500, message, kind="server_error")
