"""Where scenes of whole videos change, of any length, found in a process that may crash or hang.

A long video is asked for in pieces that overlap. The network judges `WINDOW` frames at a time, and
pieces begin where its windows do: at a steady frame rate they tell what the whole video would.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from internvideo3.harness.agent.tools.catalogue import TOOLS
from internvideo3.harness.agent.tools.desk import Desk
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import Frames
from internvideo3.training.curation.records import DataError

TOOL = "video_segmentation"
NOTHING = "there is nothing between"
"""What the tool says of a piece without pictures."""
WINDOW = 50
"""Frames that TransNetV2 judges at once; it sees half as many before and behind them."""
PIECE, OVERLAP = 120 * WINDOW, 6 * WINDOW
"""Frames of a piece, five minutes of a slow core, and of what two have in common: so many that
a change in the middle of it is whole in both."""


class SceneFinder:
    """Times at which scenes change, hard cuts and dissolves, by TransNetV2.

    Args:
        reader: Says how long a video is.

    Raises:
        DataError: The network is not installed.
    """

    def __init__(self, reader: IsolatedReader) -> None:
        self.reader = reader
        # Nobody replays what is found here.
        self.desk = Desk({TOOL: replace(TOOLS[TOOL], recorded=False)})
        missing = self.desk.missing(TOOL)
        if missing:
            raise DataError(
                f"scenes are found by {', '.join(missing)}, which is not installed; "
                "pip install 'internvideo3[agent]' has it"
            )

    def __call__(self, video: Path) -> list[float]:
        """Seconds at which scenes of a video change.

        Raises:
            VideoError: It cannot be read.
            DataError: Its pictures cannot all be decoded, or not in time.
        """
        whole = self.reader.read(video, fps=1.0, max_frames=2)
        changes: list[float] = []
        start = 0
        while whole.total_frames - start > PIECE:
            changes += self._changes(video, whole, start, start + PIECE)
            start += PIECE - OVERLAP
        return changes + self._changes(video, whole, start, None)

    def close(self) -> None:
        """Ends the process."""
        self.desk.close()

    def _changes(self, video: Path, whole: Frames, start: int, end: int | None) -> list[float]:
        """Those of a piece, without what its neighbours see better."""
        asked: dict[str, Any] = {"path": str(video)}
        # Between two frames, so that rounding moves none into or out of the piece.
        first_s, middle_s = ((start + n - 0.5) / whole.source_fps for n in (0, OVERLAP // 2))
        if start:
            asked["start_s"] = first_s
        if end is not None:
            asked["end_s"] = (end - 0.5) / whole.source_fps
        result = self.desk.call(TOOL, asked)
        if start and not result.ok and NOTHING in result.message:
            return []  # one picture stands there for long, or the file is shorter than it says
        if not result.ok:
            raise DataError(f"the scenes of {video} cannot be found: {result.message}")
        until_s = None if end is None else (end - OVERLAP // 2 - 0.5) / whole.source_fps
        return [
            one
            for one in result.data["changes"]
            if (not start or one >= middle_s) and (until_s is None or one < until_s)
        ]
