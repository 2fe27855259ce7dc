"""Contact sheets: the right frames, the right answer, clear errors.

Run: python -m pytest tests/tasks/test_show.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvideo3.tasks.video import VideoError
from internvideo3.tasks.world.build import BuildError, build_suite, documents
from internvideo3.tasks.world.show import TILE_PX, TILES, contact_sheet, pick, world_show
from internvideo3.tasks.world.suites import SUITES

GREEN = (22, 130, 70)


def count_green(path: Path) -> int:
    return int((np.array(Image.open(path).convert("RGB")) == GREEN).all(-1).sum())


def test_a_sheet_of_a_built_suite_and_of_one_that_is_not(tmp_path: Path) -> None:
    build_suite("world_short", tmp_path, limit_videos=1)
    built = world_show("world_short", index=1, root=tmp_path, out=tmp_path / "a" / "built.png")
    drawn = world_show("world_short", index=1, root=tmp_path / "none", out=tmp_path / "drawn.png")
    one, other = (np.array(Image.open(path).convert("RGB")) for path in (built, drawn))
    assert one.shape == other.shape
    # Below the heading, which names the source, they differ by what the encoder loses.
    tiles = slice(-TILE_PX, None)
    assert 0 < np.abs(one[tiles].astype(int) - other[tiles]).mean() < 4
    assert count_green(built) > 500


def test_by_id_and_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = world_show("world_spatial", sample_id="world_spatial/000002", root=tmp_path)
    assert path == Path("world_spatial-000002.png")
    assert Image.open(path).format == "PNG"


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_every_suite_has_sheets(suite: str, tmp_path: Path) -> None:
    path = world_show(suite, index=3, root=tmp_path, out=tmp_path / "sheet.png")
    assert min(Image.open(path).size) > 300


def test_only_the_right_option_is_marked() -> None:
    doc = next(documents(SUITES["world_long"]))
    pixels = np.full((2, 64, 64, 3), 200, np.uint8)
    sheet = np.array(contact_sheet({**doc, "evidence": [[9.0, 9.5]]}, pixels, (0.0, 1.0), "test"))
    wrong = next(option for option in doc["options"] if option != doc["answer"])
    other = np.array(
        contact_sheet(
            {**doc, "answer": wrong, "evidence": [[9.0, 9.5]]}, pixels, (0.0, 1.0), "test"
        )
    )
    rows = np.flatnonzero((sheet != other).any((1, 2)))
    assert rows.max() - rows.min() < 110
    assert ((sheet[rows] == GREEN).all(-1)).any() and ((other[rows] == GREEN).all(-1)).any()


def test_evidence_is_always_among_the_frames() -> None:
    times_s = [n / 2 for n in range(240)]
    picked = pick(times_s, [[3.0, 3.5], [90.5, 91.0], [119.0, 119.5]])
    assert len(picked) == TILES == len(set(picked))
    assert list(picked) == sorted(picked)
    assert {6, 181, 238} <= set(picked)
    assert picked[0] == 0 and picked[-1] == 239
    assert pick([0.0, 0.6, 1.2, 1.9], [[0.0, 2.0]]) == (0, 1, 2, 3)
    assert len(pick(times_s, [[float(n), n + 0.5] for n in range(40)])) == TILES


@pytest.mark.parametrize("index", [-1, 10**6])
def test_index_out_of_range(index: int, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=rf"has questions 0 to \d+, got {index}"):
        world_show("world_long", index=index, root=tmp_path)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="did you mean world_long"):
        world_show("world_lomg", root=tmp_path)
    with pytest.raises(BuildError, match=r"near: world_long/\d{6}"):
        world_show("world_long", sample_id="world_long/00123", root=tmp_path)
    with pytest.raises(BuildError, match="unknown split 'tset'; did you mean test"):
        world_show("world_long", split="tset", root=tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    build_suite("world_short", tmp_path, limit_videos=1)
    video = tmp_path / "test" / "videos" / "world_short-0000.mp4"
    video.write_bytes(video.read_bytes()[:500])
    with pytest.raises(VideoError, match=r"world_short-0000\.mp4"):
        world_show("world_short", index=0, root=tmp_path, out=tmp_path / "sheet.png")
