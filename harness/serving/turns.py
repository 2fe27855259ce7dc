"""One thread that computes for requests, in the order in which they came, while somebody waits."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from starlette.requests import Request

from internvideo3.harness.serving.admission import LOOK_EVERY_S, left, stopping

T = TypeVar("T")


@dataclass
class _Task(Generic[T]):
    work: Callable[[], T]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    begun: bool = False
    left: bool = False
    """Whether nobody waits any more."""

    def __post_init__(self) -> None:
        self.outcome: asyncio.Future[T] = self.loop.create_future()

    def run(self) -> None:
        self.begun = True
        try:
            result = self.work()
        except Exception as error:  # raised again where it is waited for
            self._tell(self.outcome.set_exception, error)
        else:
            self._tell(self.outcome.set_result, result)

    def _tell(self, set_outcome: Callable[[Any], None], what: Any) -> None:
        def tell() -> None:
            if not self.left:
                set_outcome(what)

        # The loop may be closed, with all who waited.
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(tell)


class Turns:
    """Who computes, one request at a time.

    What has begun runs to its end, also when its client leaves; the process does not wait for it.
    """

    def __init__(self) -> None:
        # Simple, since a signal may call `close` in the middle of its thread's own `put`.
        self._tasks: queue.SimpleQueue[_Task[Any] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    async def take(self, work: Callable[[], T], request: Request) -> T:
        """What work comes to, once it is its turn.

        Args:
            work: computes; what it raises is raised here.
            request: whose client waits.

        Raises:
            ApiError: the client has left, or the server stops before the turn has come.
        """
        task = _Task(work)
        self._tasks.put(task)
        try:
            while not task.outcome.done():
                if self._closed and not task.begun:
                    raise stopping()
                await asyncio.wait([task.outcome], timeout=LOOK_EVERY_S)
                if not task.outcome.done() and await request.is_disconnected():
                    raise left()
            return task.outcome.result()
        finally:
            task.left = True

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
            if not (task.left or self._closed):
                task.run()
            # It has a request's frames.
            del task
