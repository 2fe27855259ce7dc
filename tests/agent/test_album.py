"""Small pictures of a whole video: what is new is found, pages survive, damage is repaired.

pytest tests/agent/test_album.py
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from internvideo3.harness.agent.album import A_PAGE, Album, open_album
from internvideo3.tasks.decoder import IsolatedReader

EVENTS_S = (13.5, 41.0)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minute at 8 frames a second: grey, a cut to another grey at 30 s, two short red signs."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(480):
            time_s = number / 8
            pixels = np.full((64, 96, 3), 60 if time_s < 30 else 160, np.uint8)
            if any(event <= time_s < event + 1 for event in EVENTS_S):
                pixels[20:40, 30:60] = (250, 20, 20)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def reader() -> Iterator[IsolatedReader]:
    with closing(IsolatedReader()) as opened:
        yield opened


def most_new(album: Album, seen_s: list[float]) -> float:
    return float(album.times_T[int(album.novelty(seen_s).argmax())])


def test_what_no_look_has_shown_is_new_and_a_seen_change_is_not(
    film: Path, reader: IsolatedReader
) -> None:
    album = open_album(film, 0.0, 60.0, reader, None)
    seen = [float(t) for t in np.arange(0, 60, 5)]
    first = most_new(album, seen)
    second = most_new(album, [*seen, first])
    assert sorted(int(t) for t in (first, second)) == [13, 41]
    everything = [*seen, *(t + d for t in EVENTS_S for d in (0.0, 0.25, 0.5, 0.75))]
    assert album.novelty(everything).max() < 0.01, "the cut at 30 s lies between two seen greys"


def test_pages_on_disk_are_not_read_from_the_video_again(
    film: Path, reader: IsolatedReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_album(film, 0.0, 60.0, reader, tmp_path)
    pages = sorted(tmp_path.rglob("*.npz"))
    assert len(pages) == 60 * 4 // A_PAGE
    pages[0].unlink()
    pages[1].write_bytes(b"torn")
    asked: list[float] = []
    read = reader.read

    def counted(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["start_s"])
        return read(*args, **kwargs)

    monkeypatch.setattr(reader, "read", counted)
    again = open_album(film, 0.0, 60.0, reader, tmp_path)
    assert len(asked) == 2
    assert np.array_equal(again.times_T, whole.times_T)
    assert np.array_equal(again.pictures_TX, whole.pictures_TX)
    open_album(film, 0.0, 60.0, reader, tmp_path)
    assert len(asked) == 2


def test_a_part_has_its_own_times(film: Path, reader: IsolatedReader) -> None:
    album = open_album(film, 10.0, 20.0, reader, None)
    assert album.times_T[0] >= 10 and album.times_T[-1] <= 20 and len(album.times_T) >= 38


def test_a_full_disk_costs_the_page_and_not_the_album(
    film: Path, reader: IsolatedReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    wanted = open_album(film, 0.0, 4.0, reader, None)
    monkeypatch.setattr(np, "savez", full)
    found = open_album(film, 0.0, 4.0, reader, tmp_path)
    assert np.array_equal(found.pictures_TX, wanted.pictures_TX)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
