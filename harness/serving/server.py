"""uvicorn, ended by a signal together with the answer in progress."""

from __future__ import annotations

import signal
import socket
from types import FrameType
from typing import NoReturn, Protocol

import uvicorn
from starlette.applications import Starlette

LAST_SECONDS = 10
"""Time for open connections to end, after which they are cut."""


class Served(Protocol):
    """What is served."""

    def app(self) -> Starlette:
        """The application."""

    def close(self) -> None:
        """Ends what is in progress; nothing new is begun."""

    def join(self, seconds: float) -> bool:
        """Waits until it has ended; whether it has."""


class Server(uvicorn.Server):
    """Serves until Ctrl-C or SIGTERM.

    Args:
        serving: what is served.
    """

    def __init__(self, serving: Served) -> None:
        super().__init__(
            uvicorn.Config(
                serving.app(),
                lifespan="off",
                timeout_graceful_shutdown=LAST_SECONDS,
                server_header=False,
            )
        )
        self.serving = serving

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What uvicorn installs for both signals."""
        self.serving.close()
        super().handle_exit(sig, frame)

    def run_until_told(self, listening: socket.socket) -> bool:
        """Serves on an open socket; returns after a signal, when all connections have ended.

        Returns:
            Whether nothing is computed any more. Else the process is to end by `os._exit`: where
            Python ends while a thread is in torch, the thread comes back to nothing, and aborts.
        """
        # uvicorn raises the signal again at its end, and SIGTERM would take our cleaning with it.
        before = signal.signal(signal.SIGTERM, _end)
        try:
            self.run([listening])
        except (KeyboardInterrupt, _Ended):
            pass
        finally:
            signal.signal(signal.SIGTERM, before)
        return self.serving.join(LAST_SECONDS)


class _Ended(BaseException):
    """SIGTERM, after the server has ended."""


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise _Ended
