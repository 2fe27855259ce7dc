"""Metrics as TensorBoard reads them, beside `metrics.jsonl`, where tensorboardX is installed.

`metrics.jsonl` is the record; these files are for the eye. Where they cannot be written training
goes on, and says so once. tensorboardX's own `SummaryWriter` writes in a thread: when that dies of
a full disk, its queue fills and training waits for ever. Here the events are written in line.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("internvideo3.training")
FLUSH_S = 30.0
"""Longest time that a line stays in memory while others follow it."""


class Curves:
    """Writes scalars into a stage's folder."""

    def __init__(self, folder: Path, step: int) -> None:
        """Continues at a step; what was written after it is shown no more."""
        self._folder = folder / "tensorboard"
        self._writer: Any = None
        self._flushed = -FLUSH_S
        if importlib.util.find_spec("tensorboardX") is None:
            log.info("no TensorBoard files: pip install 'internvideo3[train]'")
            return
        self._attempt(lambda: self._open(step))

    def add(self, row: Mapping[str, float]) -> None:
        """Add a line of `metrics.jsonl`."""
        if self._writer is not None:
            self._attempt(lambda: self._add(row))

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._attempt(self._writer.close)
            self._writer = None

    def _open(self, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(self._folder / "events"))
        restart = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=step, session_log=restart))

    def _add(self, row: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=value) for name, value in row.items()
            if name != "step"
        ]  # fmt: skip
        told = Summary(value=values)
        self._writer.write_event(Event(wall_time=time.time(), step=int(row["step"]), summary=told))
        if time.monotonic() - self._flushed >= FLUSH_S:
            self._writer.flush()
            self._flushed = time.monotonic()

    def _attempt(self, act: Callable[[], None]) -> None:
        """Do it, or warn and write no more."""
        try:
            act()
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): no more TensorBoard files of this stage. Training goes "
                "on, and metrics.jsonl has every step.", self._folder, error.strerror,
            )  # fmt: skip
            self._drop()

    def _drop(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            # Closing writes what is left, which fails as what was told just now.
            with contextlib.suppress(OSError):
                writer.close()
