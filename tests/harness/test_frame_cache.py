"""Frames kept on disk: same pixels, found by content, limited in size, never an error.

pytest tests/harness/test_frame_cache.py
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from internvideo3.harness import evaluate
from internvideo3.harness.direct import Answerer
from internvideo3.harness.frame_cache import FrameCache
from internvideo3.harness.options import EvalOptions
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import Frames, VideoError, read_frames
from internvideo3.tasks.world.media import encode_video


@pytest.fixture()
def video(tmp_path: Path) -> Path:
    pixels_THWC = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), np.uint8)
    path = tmp_path / "a.mp4"
    path.write_bytes(encode_video(pixels_THWC, fps=8))
    return path


def counting(path: Path) -> tuple[Callable[[], Frames], list[int]]:
    calls: list[int] = []

    def make() -> Frames:
        calls.append(1)
        return read_frames(path)

    return make, calls


def test_a_hit_is_the_same_in_every_field_and_decodes_nothing(video: Path, tmp_path: Path) -> None:
    make, calls = counting(video)
    first = FrameCache(tmp_path / "c", 1 << 30).get(str(video), (2.0,), make)
    again = FrameCache(tmp_path / "c", 1 << 30)
    second = again.get(str(video), (2.0,), make)
    assert len(calls) == 1 and (again.hits, again.misses) == (1, 0)
    assert np.array_equal(first.pixels_THWC, second.pixels_THWC)
    assert second.pixels_THWC.dtype == np.uint8
    for name in ("indices", "source_fps", "total_frames", "duration_s", "digest"):
        assert getattr(first, name) == getattr(second, name)


def test_content_and_recipe_decide_and_not_the_name(video: Path, tmp_path: Path) -> None:
    make, calls = counting(video)
    cache = FrameCache(tmp_path / "c", 1 << 30)
    cache.get(str(video), (2.0,), make)
    renamed = video.rename(tmp_path / "b.mp4")
    cache.get(str(renamed), (2.0,), make)
    assert len(calls) == 1
    cache.get(str(renamed), (1.0,), lambda: read_frames(renamed, fps=1.0))
    assert cache.misses == 2
    pixels_THWC = np.zeros((16, 32, 32, 3), np.uint8)
    renamed.write_bytes(encode_video(pixels_THWC, fps=8))
    edited = cache.get(str(renamed), (2.0,), lambda: read_frames(renamed))
    assert cache.misses == 3 and edited.pixels_THWC.max() < 8


def test_the_least_recently_used_go_first(video: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    make, _ = counting(video)
    FrameCache(folder, 1 << 30).get(str(video), ("old",), make)
    size = sum(path.stat().st_size for path in folder.iterdir())
    cache = FrameCache(folder, 2 * size + 100)
    cache.get(str(video), ("new",), make)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    cache.get(str(video), ("old",), make)
    cache.get(str(video), ("third",), make)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 * size + 100
    hits = cache.hits
    cache.get(str(video), ("old",), make)
    assert cache.hits == hits + 1
    cache.get(str(video), ("new",), make)
    assert cache.hits == hits + 1


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", b"no zip at all"])
def test_a_damaged_file_is_made_again(damage: bytes, video: Path, tmp_path: Path) -> None:
    make, calls = counting(video)
    cache = FrameCache(tmp_path / "c", 1 << 30)
    first = cache.get(str(video), (), make)
    (kept,) = (tmp_path / "c").iterdir()
    kept.write_bytes(damage)
    assert cache.get(str(video), (), make).digest == first.digest
    assert len(calls) == 2
    cache.get(str(video), (), make)
    assert len(calls) == 2


def test_a_full_disk_costs_the_cache_and_not_the_run(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    make, _ = counting(video)
    assert FrameCache(tmp_path / "c", 1 << 30).get(str(video), (), make).indices
    assert list((tmp_path / "c").iterdir()) == []


def test_a_missing_video_is_named(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "c", 1 << 30)
    with pytest.raises(VideoError, match=r"gone\.mp4"):
        cache.get(str(tmp_path / "gone.mp4"), (), lambda: read_frames(tmp_path / "gone.mp4"))


def test_answers_are_the_same_with_a_cold_and_a_warm_cache(
    world: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = EvalOptions(
        model=str(checkpoint),
        suites=("world_short",),
        out=tmp_path / "plain",
        root=world,
        max_new_tokens=4,
    )
    evaluate.evaluate(plain)
    cached = replace(plain, frame_cache=tmp_path / "cache")
    evaluate.evaluate(replace(cached, out=tmp_path / "cold"))
    monkeypatch.setattr(IsolatedReader, "read", lambda *_, **__: pytest.fail("decoded again"))
    evaluate.evaluate(replace(cached, out=tmp_path / "warm"))
    expected = (plain.out / "samples/world_short.jsonl").read_bytes()
    for name in ("cold", "warm"):
        assert (tmp_path / name / "samples/world_short.jsonl").read_bytes() == expected


def test_shuffled_frames_are_not_what_the_cache_keeps(
    world: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from internvideo3.harness.direct import Clip
    from internvideo3.harness.settings import Settings
    from internvideo3.model.checkpoint import load_model

    path = next((world / "test/videos").glob("world_long-*.mp4"))
    settings = Settings(min_pixels=4096, max_pixels=4096)
    cache = FrameCache(tmp_path / "c", 1 << 30)
    answerer = Answerer(*load_model(str(checkpoint), "cpu", "float32"), settings, cache)
    shuffled = answerer.decode((Clip(path=str(path), shuffled=True),)).frames[0]
    straight = answerer.decode((Clip(path=str(path)),)).frames[0]
    again = answerer.decode((Clip(path=str(path), shuffled=True),)).frames[0]
    assert (cache.hits, cache.misses) == (2, 1)
    assert shuffled.digest == again.digest != straight.digest
    assert shuffled.indices == straight.indices
    assert not np.array_equal(shuffled.pixels_THWC, straight.pixels_THWC)
    sums = [frames.pixels_THWC.sum((1, 2, 3)) for frames in (shuffled, straight)]
    assert sorted(sums[0]) == sorted(sums[1])


def test_an_error_is_not_kept(video: Path, tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "c", 1 << 30)
    whole = video.read_bytes()
    video.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(VideoError):
        cache.get(str(video), (), lambda: read_frames(video))
    video.write_bytes(whole)
    assert cache.get(str(video), (), lambda: read_frames(video)).indices
