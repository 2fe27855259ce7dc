"""Reading videos: the same frames as lmms-eval's stock path, and clear errors for bad files.

Run: python -m pytest tests/tasks/test_video.py
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from qwen_vl_utils import vision_process as stock

from internvideo3.tasks import video
from internvideo3.tasks.sampling import frame_indices
from internvideo3.tasks.video import Clock, VideoError, read_frames
from internvideo3.tasks.world.media import Tone, encode_video


def moving_square(frames: int, side: int = 64) -> np.ndarray:
    """`[T,H,W,3]` frames of a square that moves, in a colour that tells the frame's number."""
    pixels_THWC = np.full((frames, side, side, 3), 40, np.uint8)
    for t in range(frames):
        x = t % (side - 16)
        pixels_THWC[t, 20:36, x : x + 16] = (255 - t % 200, t % 256, 60)
    return pixels_THWC


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    path.write_bytes(encode_video(moving_square(203)))
    return path


@pytest.mark.parametrize(
    ("frames", "fps"), [(2, 8), (3, 30), (7, 8), (16, 8), (31, 8), (97, 25), (128, 8), (150, 30)]
)
def test_frames_are_those_of_the_stock_path(tmp_path: Path, frames: int, fps: int) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video(moving_square(frames), fps=fps))
    theirs_TCHW, metadata, _ = stock._read_video_decord(
        {"video": str(path), "fps": 2, "max_frames": 768}
    )
    ours = read_frames(path)
    assert list(ours.indices) == metadata["frames_indices"]
    assert ours.source_fps == metadata["fps"] == fps
    assert ours.total_frames == metadata["total_num_frames"] == frames
    assert ours.duration_s == pytest.approx(frames / fps)
    np.testing.assert_array_equal(ours.pixels_THWC, theirs_TCHW.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(
    ("start_s", "end_s"), [(3.0, 9.5), (None, 4.0), (20.3, None), (-1.0, 99.0)]
)
def test_clips_are_those_of_the_stock_path(
    clip: Path, start_s: float | None, end_s: float | None
) -> None:
    request = {"video": str(clip), "fps": 2, "max_frames": 768}
    request |= {"video_start": start_s} if start_s is not None else {}
    request |= {"video_end": end_s} if end_s is not None else {}
    theirs_TCHW, metadata, _ = stock._read_video_decord(request)
    ours = read_frames(clip, start_s=start_s, end_s=end_s)
    assert list(ours.indices) == metadata["frames_indices"]
    np.testing.assert_array_equal(ours.pixels_THWC, theirs_TCHW.permute(0, 2, 3, 1).numpy())


@settings(max_examples=300, deadline=None)
@given(
    total=st.integers(2, 400_000),
    source_fps=st.sampled_from([0.5, 1.0, 8.0, 23.976, 25.0, 29.97, 30.0, 60.0]),
    fps=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    max_frames=st.sampled_from([2, 5, 64, 768, 2048]),
)
def test_the_choice_of_frames_equals_torch_to_the_last_bit(
    total: int, source_fps: float, fps: float, max_frames: int
) -> None:
    request = {"fps": fps, "max_frames": max_frames}
    count = stock.smart_nframes(request, total_frames=total, video_fps=source_fps)
    theirs = torch.linspace(0, total - 1, count).round().long().tolist()
    assert list(frame_indices(total, source_fps, fps=fps, max_frames=max_frames)) == theirs


def test_every_half_second_of_a_world_video_gives_one_frame() -> None:
    for length_s in range(2, 121):
        indices = frame_indices(length_s * 8, 8.0)
        assert [index // 4 for index in indices] == list(range(2 * length_s))


def test_the_digest_is_that_of_all_frames_at_once(clip: Path) -> None:
    """As it was when decord decoded: what is on record names inputs by it."""
    frames = read_frames(clip)
    shape = frames.pixels_THWC.shape
    sha = hashlib.sha256(repr((shape, frames.indices, frames.source_fps)).encode())
    sha.update(frames.pixels_THWC.tobytes())
    assert frames.digest == sha.hexdigest()


def test_chunks_join_without_a_seam(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_frames(clip, fps=8.0)
    for name, value in (("_CHUNK", 7), ("_CHUNK_BYTES", 30_000), ("_CHUNK_BYTES", 1)):
        monkeypatch.setattr(video, name, value)
        parts = read_frames(clip, fps=8.0)
        assert parts.digest == whole.digest
        np.testing.assert_array_equal(parts.pixels_THWC, whole.pixels_THWC)
    assert len(whole.indices) == 202


def test_frames_are_fitted_as_they_come(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "_CHUNK", 7)
    seen: list[tuple[int, int]] = []

    def half(pixels_THWC: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
        seen.append((len(pixels_THWC), count))
        return pixels_THWC[:, ::2, ::2]

    whole, fitted = read_frames(clip), read_frames(clip, fit=half)
    np.testing.assert_array_equal(fitted.pixels_THWC, whole.pixels_THWC[:, ::2, ::2])
    assert fitted.digest == whole.digest and fitted.indices == whole.indices
    assert seen == [(7, 50)] * 7 + [(1, 50)]


def test_an_error_of_what_fits_is_not_the_videos(clip: Path) -> None:
    def full(*_: object) -> NDArray[np.uint8]:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        read_frames(clip, fit=full)


def test_the_digest_tells_different_inputs_apart(clip: Path, tmp_path: Path) -> None:
    again, fewer, later = (
        read_frames(clip, max_frames=8),
        read_frames(clip, max_frames=6),
        read_frames(clip, max_frames=8, start_s=1.0),
    )
    assert again.digest == read_frames(str(clip), max_frames=8).digest
    assert len({again.digest, fewer.digest, later.digest}) == 3


def test_a_still_video_read_at_two_places_has_two_digests(tmp_path: Path) -> None:
    path = tmp_path / "still.mp4"
    path.write_bytes(encode_video(np.full((64, 32, 32, 3), 90, np.uint8)))
    first, second = read_frames(path, end_s=2.0), read_frames(path, start_s=5.0, end_s=7.0)
    np.testing.assert_array_equal(first.pixels_THWC, second.pixels_THWC)
    assert first.digest != second.digest


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"no video at .*gone\.mp4.*world build"):
        read_frames(tmp_path / "gone.mp4")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.mp4"
    path.touch()
    with pytest.raises(VideoError, match=r"empty\.mp4 is empty"):
        read_frames(path)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="is not a file"):
        read_frames(tmp_path)


def test_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "notes.mp4"
    path.write_text("These are my notes.\n" * 50)
    with pytest.raises(VideoError, match=r"cannot read the video .*notes\.mp4") as caught:
        read_frames(path)
    assert caught.value.__cause__ is not None


def test_truncated_file(clip: Path, tmp_path: Path) -> None:
    whole = clip.read_bytes()
    path = tmp_path / "cut.mp4"
    for share in (0.05, 0.5, 0.99):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(VideoError, match=r"cannot read the video .*cut\.mp4"):
            read_frames(path)


def test_sound_without_picture(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    _write_sound(path)
    with pytest.raises(VideoError, match=r"no picture.*audio"):
        read_frames(path)


def test_one_frame_is_too_short(tmp_path: Path) -> None:
    path = tmp_path / "photo.mp4"
    path.write_bytes(encode_video(moving_square(1)))
    with pytest.raises(VideoError, match=r"1 frame\(s\), and at least 2"):
        read_frames(path)


def test_a_clip_after_the_end(clip: Path) -> None:
    with pytest.raises(VideoError, match="fewer than two frames; the video lasts 25.3"):
        read_frames(clip, start_s=60.0, end_s=70.0)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_senseless_rate(clip: Path, fps: float) -> None:
    with pytest.raises(ValueError, match="fps must be a positive number"):
        read_frames(clip, fps=fps)


def test_senseless_frame_limit(clip: Path) -> None:
    with pytest.raises(ValueError, match="max_frames must be at least 2, got 1"):
        read_frames(clip, max_frames=1)


def test_frames_that_would_not_fit_in_memory(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_BYTES", 100_000)
    with pytest.raises(VideoError, match="50 frames of 64x64 need .* Lower max_frames"):
        read_frames(clip)
    assert len(read_frames(clip, fit=lambda pixels_THWC, _: pixels_THWC[:, ::8, ::8]).indices) == 50


def test_a_decoder_that_never_returns_ends_at_the_limit(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(video, "read_reel", lambda *_, **__: release.wait(60))
    started = time.monotonic()
    with pytest.raises(VideoError, match="reached its time limit"):
        read_frames(clip, time_limit_s=0.2)
    assert time.monotonic() - started < 5
    release.set()


def test_a_slow_decoder_notices_the_limit_itself(clip: Path) -> None:
    with pytest.raises(VideoError, match=r"limit of -1 s.*--decode-limit of eval, time_limit_s"):
        read_frames(clip, time_limit_s=-1.0)


@pytest.mark.parametrize(
    ("given", "lasts_s", "limit_s"),
    [(None, 10, 300), (None, 3600, 7200), (None, 1e9, 21_600), (40.0, 3600, 40)],
)
def test_a_long_video_may_take_twice_as_long_as_it_lasts(
    given: float | None, lasts_s: float, limit_s: float
) -> None:
    """Unless told otherwise; and what a header claims does not keep a decoder for days."""
    clock = Clock.of(given)
    clock.allow(lasts_s)
    assert clock.limit_s == limit_s
    assert limit_s - 1 < clock.left_s() <= limit_s


def test_fitting_takes_no_time_of_decoding(clip: Path) -> None:
    def slow(pixels_THWC: NDArray[np.uint8], _: int) -> NDArray[np.uint8]:
        time.sleep(1.5)
        return pixels_THWC

    assert len(read_frames(clip, fit=slow, time_limit_s=1.0).indices) == 50


def test_an_interrupt_in_the_decoder_reaches_the_caller(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "read_reel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_frames(clip)


def test_mutated_files_give_frames_or_a_video_error(clip: Path, tmp_path: Path) -> None:
    """120 damaged files: every one is read or refused by name, quickly, and the process lives."""
    whole, rng, path = clip.read_bytes(), random.Random(7), tmp_path / "hurt.mp4"
    refused = 0
    for round_index in range(120):
        path.write_bytes(_damage(whole, rng, round_index % 4))
        started = time.monotonic()
        try:
            frames = read_frames(path, time_limit_s=20.0)
        except VideoError as error:
            refused += 1
            assert "hurt.mp4" in str(error)
        else:
            assert frames.pixels_THWC.shape[0] == len(frames.indices) >= 2
        assert time.monotonic() - started < 15
    assert refused > 40


def _damage(whole: bytes, rng: random.Random, kind: int) -> bytes:
    data = bytearray(whole)
    place = rng.randrange(len(data))
    if kind == 0:
        return whole[: place + 1]
    if kind == 1:
        del data[place : place + rng.randrange(1, 3000)]
    elif kind == 2:
        for _ in range(rng.choice((1, 5, 50))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
        index = whole.rfind(b"moov")
        for _ in range(rng.choice((1, 4, 20))):
            data[rng.randrange(index, len(data))] = rng.randrange(256)
    return bytes(data)


def _write_sound(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        samples = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_sound_track_does_not_change_the_frames(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "loud.mp4"
    path.write_bytes(encode_video(moving_square(203), tones=[Tone(1.0, 0.5, 440.0)]))
    assert path.stat().st_size > clip.stat().st_size
    assert read_frames(path).digest == read_frames(clip).digest
