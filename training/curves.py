"""Metrics as TensorBoard reads them, beside `metrics.jsonl`, where tensorboardX is installed."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("internvideo3.training")


class Curves:
    """Writes scalars into a stage's folder."""

    def __init__(self, folder: Path, step: int) -> None:
        """Continues at a step; what was written after it is shown no more."""
        self._writer: Any = None
        if importlib.util.find_spec("tensorboardX") is None:
            log.info("no TensorBoard files: pip install 'internvideo3[train]'")
            return
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def add(self, row: Mapping[str, float]) -> None:
        """Add a line of `metrics.jsonl`."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
