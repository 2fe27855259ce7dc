"""Scenes of whole videos: pieces of long ones tell what the whole would, failures are words.

pytest tests/harness/test_scenes.py
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from internvideo3.harness import scenes
from internvideo3.harness.agent.tools import segmentation
from internvideo3.harness.agent.tools.desk import Result
from internvideo3.harness.scenes import SceneFinder
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import Frames
from internvideo3.training.curation.records import DataError

FPS = 25


def write_film(path: Path, frames: int, scene: int = 40) -> None:
    """Scenes of so many frames, each a texture that moves; a picture to begin at every second."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.gop_size = FPS
        for number in range(frames):
            texture = np.random.default_rng(number // scene).integers(0, 255, (4, 6, 3), np.uint8)
            pixels_HWC = np.roll(texture.repeat(16, 0).repeat(16, 1), number % scene, axis=1)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


class Reader(IsolatedReader):
    """Knows a length only."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def read(self, path: str | Path, **_: Any) -> Frames:
        pixels_THWC, length_s = np.zeros((2, 8, 8, 3), np.uint8), self.frames / FPS
        return Frames(pixels_THWC=pixels_THWC, indices=(0, 1), source_fps=FPS, digest="x",
                      total_frames=self.frames, duration_s=length_s)  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Mapping[str, Any]]]:
    """What a tool was asked that finds a change every 7 seconds, and false ones at parts' ends."""
    calls: list[Mapping[str, Any]] = []

    def call(self: Any, name: str, arguments: Mapping[str, Any]) -> Result:
        calls.append(arguments)
        start_s, end_s = arguments.get("start_s", 0.0), arguments.get("end_s", 1500.0)
        true = [at for at in np.arange(7.0, 1500.0, 7.0) if start_s < at < end_s]
        false = [start_s + 1.3] * (start_s > 0) + [end_s - 1.3] * (end_s < 1500)
        return Result(ok=True, data={"changes": sorted([*true, *false])})

    monkeypatch.setattr("internvideo3.harness.agent.tools.desk.Desk.call", call)
    yield calls


def test_a_long_video_is_asked_for_in_pieces(asked: list[Mapping[str, Any]]) -> None:
    """Each change is told once, by a piece that sees what is around it."""
    with closing(SceneFinder(Reader(1500 * FPS))) as found:
        assert found(Path("long.mp4")) == list(np.arange(7.0, 1500.0, 7.0))
    assert len(asked) == 7
    for call in asked[1:-1]:
        first = call["start_s"] * FPS + 0.5
        assert round(first) % scenes.WINDOW == 0 and first == pytest.approx(round(first))
        assert (call["end_s"] - call["start_s"]) * FPS == pytest.approx(scenes.PIECE)
    assert scenes.PIECE < segmentation.MOST_FRAMES / 4, "also where frames come thicker for a while"


def test_a_short_video_is_asked_for_as_a_whole(asked: list[Mapping[str, Any]]) -> None:
    with closing(SceneFinder(Reader(scenes.PIECE))) as found:
        found(Path("short.mp4"))
    assert asked == [{"path": "short.mp4"}]


def test_what_the_tool_cannot_do_is_a_fault_of_the_video(monkeypatch: pytest.MonkeyPatch) -> None:
    died = Result(ok=False, error="crashed", message="video_segmentation was stopped: it ended")
    monkeypatch.setattr("internvideo3.harness.agent.tools.desk.Desk.call", lambda *_: died)
    with (
        closing(SceneFinder(Reader(100))) as found,
        pytest.raises(DataError, match=r"scenes of v\.mp4 cannot be found: .*stopped: it ended"),
    ):
        found(Path("v.mp4"))


def test_a_piece_without_pictures_has_no_change_and_a_video_is_refused(
    tmp_path: Path, asked: list[Mapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded screen may stand still for minutes, by the times in its file."""
    write_film(tmp_path / "film.mp4", 10)
    with pytest.raises(ValueError, match=r".") as nothing:
        segmentation._frames(tmp_path / "film.mp4", 90.0, 95.0)
    empty = Result(ok=False, error="failed", message=f"{scenes.TOOL} failed: {nothing.value}")
    call = scenes.Desk.call

    def still(self: Any, name: str, arguments: Mapping[str, Any]) -> Result:
        stands = 200 < arguments.get("start_s", 0.0) < 300
        return empty if stands else call(self, name, arguments)

    monkeypatch.setattr(scenes.Desk, "call", still)
    with closing(SceneFinder(Reader(1500 * FPS))) as found:
        told = found(Path("screen.mp4"))
    assert len(asked) == 6 and {*told} < {*np.arange(7.0, 1500.0, 7.0)} and len(told) > 150
    monkeypatch.setattr(scenes.Desk, "call", lambda *_: empty)
    with closing(SceneFinder(Reader(100))) as found, pytest.raises(DataError, match="cannot be"):
        found(Path("v.mp4"))


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_a_part_has_the_frames_that_decoding_from_the_beginning_gives(
    ending: str, tmp_path: Path
) -> None:
    path = tmp_path / f"film.{ending}"
    write_film(path, 200)
    for start_s, end_s in ((2.5, 4.0), (4.02, 6.0), (5.98, None)):
        parts = segmentation._frames(path, start_s, end_s)
        whole = segmentation._decoded(path, start_s, end_s, seek=False)
        for part, one in zip(parts, whole, strict=True):
            np.testing.assert_array_equal(part, one)


@pytest.mark.slow
def test_pieces_tell_what_the_whole_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_film(tmp_path / "film.mp4", 250)
    whole = segmentation.run(str(tmp_path / "film.mp4"))["changes"]
    assert len(whole) == 6
    monkeypatch.setattr(scenes, "PIECE", 200)
    monkeypatch.setattr(scenes, "OVERLAP", 100)
    with closing(IsolatedReader()) as reader, closing(SceneFinder(reader)) as found:
        assert found(tmp_path / "film.mp4") == whole
