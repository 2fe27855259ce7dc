"""One thread that computes for requests, in the order in which they came, while somebody waits."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from internvideo3.harness.serving.admission import LOOK_EVERY_S, left, stopping

T = TypeVar("T")


@dataclass
class _Task:
    key: Hashable
    work: Callable[[], Any]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    waiting: int = 0
    """Requests that wait for it."""
    begun: bool = False

    def __post_init__(self) -> None:
        self.outcome: asyncio.Future[Any] = self.loop.create_future()


class Turns:
    """Who computes, one task at a time.

    What has begun runs to its end, also when its client leaves, who may come back for it; the
    process does not wait for it.
    """

    def __init__(self) -> None:
        # Simple, since a signal may call `close` in the middle of its thread's own `put`.
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._known: dict[Hashable, _Task] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    async def take(self, key: Hashable, work: Callable[[], T], request: Request) -> T:
        """What work comes to, once it is its turn.

        Args:
            key: equal for equal work: who asks again, after a timeout, gets what is computed
                already.
            work: computes; what it raises is raised here.
            request: whose client waits.

        Raises:
            ApiError: the client has left, or the server stops before the turn has come.
        """
        known = self._known.get(key)
        task = self._known[key] = known or _Task(key, work)
        # Before the thread sees it, which leaves out what nobody waits for.
        task.waiting += 1
        if known is None:
            self._tasks.put(task)
        try:
            await self._wait(task, request)
            outcome: T = task.outcome.result()
            return outcome
        finally:
            task.waiting -= 1
            if not (task.waiting or task.begun):
                # The thread leaves it out, so nobody may join it any more.
                self._forget(task)

    async def _wait(self, task: _Task, request: Request) -> None:
        while not task.outcome.done():
            if self._closed and not task.begun:
                raise stopping()
            await asyncio.wait([task.outcome], timeout=LOOK_EVERY_S)
            if not task.outcome.done() and await request.is_disconnected():
                raise left()

    def close(self) -> None:
        """Refuses those who wait and those who come; what has begun goes on."""
        self._closed = True
        self._tasks.put(None)

    def join(self, seconds: float) -> bool:
        """Waits until nothing computes; whether that is so."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if task.waiting and not self._closed:
                task.begun = True
                self._compute(task)
            # It has a request's frames.
            del task

    def _compute(self, task: _Task) -> None:
        try:
            set_outcome, what = task.outcome.set_result, task.work()
        except BaseException as error:  # raised again where it is waited for
            # One that ends a thread would leave all who come after it waiting.
            told = error if isinstance(error, Exception) else RuntimeError(repr(error))
            set_outcome, what = task.outcome.set_exception, told

        def tell() -> None:
            self._forget(task)
            if task.waiting:
                set_outcome(what)

        # The loop may be closed, with all who waited.
        with suppress(RuntimeError):
            task.loop.call_soon_threadsafe(tell)

    def _forget(self, task: _Task) -> None:
        if self._known.get(task.key) is task:
            del self._known[task.key]
