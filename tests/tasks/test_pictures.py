"""The pictures that are asked for, of files of many kinds: a picture shows its own number.

pytest tests/tasks/test_pictures.py
"""

from __future__ import annotations

import contextlib
import io
import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import pytest
from numpy.typing import NDArray

from internvideo3.tasks import pictures, video
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.pictures import LostError, read_reel
from internvideo3.tasks.video import VideoError, read_frames

FRAMES, RATE, BITS = 200, 25, 8


def numbered(count: int = FRAMES) -> NDArray[np.uint8]:
    """Pictures `[T,H,W,C]` with their number in bars, light for 1 and dark for 0."""
    pixels_THWC = np.full((count, 64, 96, 3), 40, np.uint8)
    for t, bit in itertools.product(range(count), range(BITS)):
        pixels_THWC[t, :, bit * 12 : bit * 12 + 10] = 230 if t >> bit & 1 else 20
    return pixels_THWC


def number_of(pixels_HWC: NDArray[np.uint8]) -> int:
    bars = [pixels_HWC[20:40, bit * 12 + 2 : bit * 12 + 8].mean() > 125 for bit in range(BITS)]
    return sum(bar << bit for bit, bar in enumerate(bars))


def encoded(
    pixels_THWC: NDArray[np.uint8],
    codec: str,
    container: str,
    form: str = "yuv420p",
    times: Sequence[int] | None = None,
    **options: str,
) -> bytes:
    """A file of pictures; `times` in milliseconds, None for even ones."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=RATE, options=options)
        stream.height, stream.width = pixels_THWC.shape[1:3]
        stream.pix_fmt = form
        if times is not None:
            from fractions import Fraction

            stream.codec_context.time_base = Fraction(1, 1000)
        for t, pixels_HWC in enumerate(pixels_THWC):
            frame = av.VideoFrame.from_ndarray(pixels_HWC, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[t], stream.codec_context.time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


OPEN = "open-gop=1:b-adapt=0:scenecut=0"
X265 = "log-level=none:keyint=25:bframes=3"
KINDS: dict[str, tuple[str, str, dict[str, str]]] = {
    "H.264 in mp4": ("libx264", "mp4", {"g": "25", "bf": "3"}),
    "H.264 in mp4, open groups": (
        "libx264", "mp4", {"bf": "2", "x264-params": f"{OPEN}:keyint=23:min-keyint=23"},
    ),
    "H.264 in mp4, no keyframes": (
        "libx264", "mp4", {"g": "25", "bf": "0", "x264-params": "intra-refresh=1"},
    ),
    "H.264 in mkv": ("libx264", "matroska", {"g": "25", "bf": "3"}),
    "H.264 in flv": ("libx264", "flv", {"g": "25", "bf": "3"}),
    "H.264 in ts": ("libx264", "mpegts", {"g": "25", "bf": "3"}),
    "H.264 in avi": ("libx264", "avi", {"g": "25", "bf": "0"}),
    "H.265 in mp4": ("libx265", "mp4", {"x265-params": X265}),
    "MPEG-4 in avi": ("mpeg4", "avi", {"g": "25", "bf": "2"}),
    "MPEG-4 in mp4": ("mpeg4", "mp4", {"g": "25", "bf": "2"}),
    "MPEG-2 in mpg": ("mpeg2video", "mpeg", {"g": "25", "bf": "2"}),
    "MPEG-2 in ts": ("mpeg2video", "mpegts", {"g": "25", "bf": "2"}),
    "VP9 in webm": ("libvpx-vp9", "webm", {"g": "25"}),
    "VP8 in webm": ("libvpx", "webm", {"g": "25"}),
    "WMV in asf": ("wmv2", "asf", {"g": "25"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


def made(folder: Path, kind: str) -> Path:
    codec, container, options = KINDS[kind]
    path = folder / kind
    if not path.exists():
        path.write_bytes(encoded(numbered(), codec, container, **options))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_the_one_asked_for(kind: str, folder: Path) -> None:
    path = made(folder, kind)
    for options in ({}, {"fps": 25.0}, {"start_s": 3.0, "end_s": 5.5}, {"max_frames": 6}):
        frames = read_frames(path, **options)  # type: ignore[arg-type]
        assert frames.total_frames == FRAMES and frames.source_fps == RATE
        assert list(map(number_of, frames.pixels_THWC)) == list(frames.indices), options


@pytest.mark.parametrize("kind", KINDS)
def test_a_jump_gives_the_bits_of_decoding_all(kind: str, folder: Path) -> None:
    path, rng = made(folder, kind), random.Random(kind)
    whole = read_frames(path, fps=25.0, max_frames=FRAMES).pixels_THWC
    for _ in range(5):
        numbers = sorted(rng.sample(range(FRAMES), 4))
        reel, found = read_reel(path, lambda: None), []
        while True:
            try:
                found = list(reel.pictures(numbers, lambda: None))
                break
            except LostError as lost:
                reel = lost.instead
        assert all(map(np.array_equal, found, whole[numbers])), numbers


def cut_at_the_start(whole: bytes, hidden: int) -> bytes:
    """What `ffmpeg -ss ... -c copy` writes: the first pictures are there, and not to be shown."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(whole)) as source,
        av.open(file, "w", format="mp4", options={"avoid_negative_ts": "disabled"}) as out,
    ):
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        assert stream.time_base is not None
        earlier = round(hidden / RATE / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts = packet.pts - earlier, packet.dts - earlier
                packet.stream = copy
                out.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["H.264 in mp4", "H.265 in mp4"])
def test_what_an_edit_list_hides_is_not_counted(kind: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(cut_at_the_start(made(folder, kind).read_bytes(), hidden=12))
    for options in ({"fps": 25.0}, {"start_s": 3.0, "end_s": 5.5}, {"max_frames": 4}):
        frames = read_frames(path, **options)  # type: ignore[arg-type]
        assert frames.total_frames == FRAMES - 12
        assert frames.duration_s == pytest.approx((FRAMES - 12) / RATE)
        assert list(map(number_of, frames.pixels_THWC)) == [12 + i for i in frames.indices]


def test_packets_before_the_first_keyframe_are_no_pictures(folder: Path, tmp_path: Path) -> None:
    """A recording of a broadcast begins anywhere."""
    whole, path = made(folder, "H.264 in ts").read_bytes(), tmp_path / "cut.ts"
    path.write_bytes(whole[len(whole) // 3 // 188 * 188 :])
    with av.open(str(path)) as container:
        shown = [number_of(one.to_ndarray(format="rgb24")) for one in container.decode(video=0)]
    frames = read_frames(path, fps=25.0)
    assert frames.total_frames == len(shown) < FRAMES
    assert list(map(number_of, frames.pixels_THWC)) == [shown[i] for i in frames.indices]


def patterned(height: int, width: int) -> NDArray[np.uint8]:
    fields = np.random.default_rng(0).integers(0, 255, (height // 8 + 2, width // 8 + 2, 3))
    pixels_HWC = fields.repeat(8, 0).repeat(8, 1)[:height, :width].astype(np.uint8)
    return np.stack([np.roll(pixels_HWC, 3 * t, 1) for t in range(12)])


TAGS = "colorprim={0}:transfer={0}:colormatrix={0}"
LOOKS: list[tuple[int, int, str, str]] = [
    (64, 96, "yuv420p", ""),
    (130, 102, "yuv420p", TAGS.format("bt709")),
    (240, 426, "yuv420p", TAGS.format("smpte170m")),
    (64, 96, "yuv420p", "colormatrix=bt2020nc"),
    (64, 96, "yuvj420p", ""),
    (64, 96, "yuvj420p", TAGS.format("bt709") + ":fullrange=on"),
    (65, 97, "yuv444p", ""),
    (64, 96, "yuv422p", TAGS.format("bt709")),
    (64, 96, "yuv420p10le", ""),
    (64, 96, "gray", ""),
]


@pytest.mark.parametrize(("height", "width", "form", "tags"), LOOKS)
def test_colours_are_those_of_decord(
    height: int, width: int, form: str, tags: str, tmp_path: Path
) -> None:
    """Which the stock class shows; it is right where groups are closed."""
    path, options = tmp_path / "a.mp4", {"x264-params": tags} if tags else {}
    path.write_bytes(encoded(patterned(height, width), "libx264", "mp4", form, **options))
    reader = decord.VideoReader(str(path), num_threads=1)
    frames = read_frames(path, fps=25.0)
    theirs_THWC = reader.get_batch(list(frames.indices)).asnumpy()
    np.testing.assert_array_equal(frames.pixels_THWC, theirs_THWC)
    assert (frames.total_frames, frames.source_fps) == (len(reader), reader.get_avg_fps())


TURNS = {
    0: (1, 0, 0, 0, 1, 0, 0, 0), 90: (0, 1, 0, -1, 0, 0, 0, 0),
    180: (-1, 0, 0, 0, -1, 0, 0, 0), 270: (0, -1, 0, 1, 0, 0, 0, 0),
}  # fmt: skip
"""Degrees clockwise → the matrix of the track's header."""


@pytest.mark.parametrize("degrees", TURNS)
def test_a_turned_video_stands_upright(degrees: int, tmp_path: Path) -> None:
    pixels_THWC = np.full((12, 64, 96, 3), 40, np.uint8)
    pixels_THWC[:, :16, :16] = 255, 0, 0
    pixels_THWC[:, -16:, :16] = 0, 0, 255
    whole, path = encoded(pixels_THWC, "libx264", "mp4"), tmp_path / "turned.mp4"
    at = whole.find(b"tkhd") + 44
    matrix = b"".join((v << 16).to_bytes(4, "big", signed=True) for v in TURNS[degrees])
    path.write_bytes(whole[:at] + matrix + b"\x40\0\0\0" + whole[at + 36 :])
    upright_HWC = np.rot90(pixels_THWC[0], -degrees // 90)
    found_THWC = read_frames(path, fps=25.0).pixels_THWC
    assert found_THWC.shape[1:] == upright_HWC.shape
    assert np.abs(found_THWC[0].astype(int) - upright_HWC).mean() < 12
    theirs_THWC = decord.VideoReader(str(path)).get_batch(range(12)).asnumpy()
    np.testing.assert_array_equal(found_THWC, theirs_THWC)


@pytest.mark.parametrize("kind", ["H.264 in mkv", "VP9 in webm", "MPEG-4 in avi", "H.264 in flv"])
def test_a_file_that_was_not_fetched_whole_is_refused(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    """It would be read as a shorter video, of mkv without its first pictures."""
    whole, path = made(folder, kind).read_bytes(), tmp_path / "cut"
    path.write_bytes(whole[: int(len(whole) * 0.61)])
    with contextlib.closing(IsolatedReader()) as reader:
        with pytest.raises(VideoError, match=r"cannot read the video .*cut"):
            reader.read(path)
        assert reader.read(made(folder, kind)).total_frames == FRAMES


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video"])
def test_a_recording_that_begins_between_keyframes(codec: str, tmp_path: Path) -> None:
    """Of H.265 FFmpeg makes up what is shown before the first keyframe, grey and without a word."""
    options = {"x265-params": "log-level=none:keyint=30:min-keyint=30:bframes=2:scenecut=0"}
    whole = encoded(numbered(), codec, "mpegts", **(options if "265" in codec else {"g": "30"}))
    path = tmp_path / "cut.ts"
    path.write_bytes(whole[188 * (len(whole) // 188 // 4) :])
    seen = list(map(number_of, read_frames(path, fps=25.0, max_frames=400).pixels_THWC))
    assert 100 < len(seen) < 180
    # The number of frames is made even by giving the last one again.
    assert [b - a for a, b in itertools.pairwise(dict.fromkeys(seen))] == [1] * (len({*seen}) - 1)
    assert FRAMES - 1 in seen and len(seen) - len({*seen}) <= 1


def test_parts_with_clocks_of_their_own_stand_in_the_order_of_the_file(tmp_path: Path) -> None:
    """By their stamps alone the pictures of both were mixed, and otherwise for each frame rate."""
    first = encoded(numbered(60), "libx264", "mpegts", g="15", bf="0")
    second = io.BytesIO()
    alone = encoded(numbered(120)[60:], "libx264", "mpegts", g="15", bf="0")
    with av.open(io.BytesIO(alone)) as source, av.open(second, "w", format="mpegts") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None and packet.pts is not None:
                packet.pts, packet.dts = packet.pts + 7, packet.dts + 7
                packet.stream = copy
                out.mux(packet)
    path = tmp_path / "joined.ts"
    path.write_bytes(first + second.getvalue())
    # Found by their stamps, with luck they are right: that no stamp leads astray, nobody knows.
    assert read_reel(path, lambda: None).packets is None
    for options in ({"fps": 25.0, "max_frames": 120}, {"max_frames": 8}, {"max_frames": 14}):
        frames = read_frames(path, **options)  # type: ignore[arg-type]
        assert list(map(number_of, frames.pixels_THWC)) == list(frames.indices), options


def test_a_number_that_comes_again_gives_its_picture_again(folder: Path) -> None:
    reel = read_reel(made(folder, "H.264 in mp4"), lambda: None)
    found = map(number_of, reel.pictures([3, 3, 3, 90, 90, 91], lambda: None))
    assert list(found) == [3, 3, 3, 90, 90, 91]


def test_what_was_given_before_a_picture_was_missing_is_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = made(folder, "H.264 in mp4"), []
    by_stamp = pictures.Reel._found

    def losing(self: pictures.Reel, cursor: Any, numbers: Sequence[int]) -> Any:
        yield from itertools.islice(by_stamp(self, cursor, numbers), 3)
        asked.append(len(numbers))
        raise LostError(replace(self, packets=None, times_N=None, total=self.total + 5))

    monkeypatch.setattr(pictures.Reel, "_found", losing)
    monkeypatch.setattr(video, "_CHUNK", 2)
    frames = read_frames(path)
    assert asked and frames.total_frames == FRAMES
    assert list(map(number_of, frames.pixels_THWC)) == list(frames.indices)


def test_how_far_uneven_frames_are_from_their_time(tmp_path: Path, folder: Path) -> None:
    """Half of them in the first second of ten."""
    path = tmp_path / "uneven.mp4"
    times = [20 * t if t < 50 else 1000 + 180 * (t - 50) for t in range(100)]
    path.write_bytes(encoded(numbered(100), "libx264", "mp4", times=times))
    frames = read_frames(path, fps=4.0)
    told_s = [index / frames.source_fps for index in frames.indices]
    true_s = [times[index] / 1000 for index in frames.indices]
    off_s = max(abs(a - b) for a, b in zip(told_s, true_s, strict=True))
    assert frames.off_s == pytest.approx(off_s, abs=1e-3) and off_s > 3
    assert read_frames(made(folder, "H.264 in mp4")).off_s < 0.1
