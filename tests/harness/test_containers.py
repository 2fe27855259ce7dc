"""Which files the server gives to its decoder.

pytest tests/harness/test_containers.py
"""

import base64
import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from internvideo3.harness.serving.containers import HEAD_BYTES, problem, problem_of
from internvideo3.harness.serving.videos import Shelf
from internvideo3.harness.serving.wire import ApiError
from internvideo3.tasks.video import VideoError, read_frames

HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10.0,\n/somewhere/film.ts\n#EXT-X-ENDLIST\n"
SDP = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nc=IN IP4 127.0.0.1\r\nm=video 5000 RTP/AVP 96\r\n"
DASH = b'<?xml version="1.0"?><mpd xmlns="urn:mpeg:dash:schema"><BaseURL>/x</BaseURL></mpd>'
TAG = b"ID3\x04\x47\x00\x00\x00\x00\x20" + b"\0" * 32
"""An ID3 tag, which FFmpeg skips, with a transport stream's byte where one would have it."""
PACKETS = (b"G" + b"\xff" * 187) * 8


def write_film(path: Path, form: str, codec: str, **options: str) -> Path:
    pixels = "rgb8" if codec == "gif" else "yuv420p"
    with av.open(str(path), "w", format=form, options=options) as film:
        stream = film.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixels
        for number in range(32):
            picture = np.full((64, 64, 3), number * 7, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("form", "codec", "options"),
    [
        ("mp4", "mpeg4", {}),
        ("mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}),
        ("mov", "mpeg4", {}),
        ("3gp", "mpeg4", {}),
        ("matroska", "mpeg4", {}),
        ("webm", "libvpx", {}),
        ("avi", "mpeg4", {}),
        ("flv", "flv", {}),
        ("mpegts", "mpeg2video", {}),
        ("mpegts", "mpeg2video", {"mpegts_m2ts_mode": "1"}),
        ("mpeg", "mpeg2video", {}),
        ("mpeg1video", "mpeg1video", {}),
        ("asf", "wmv2", {}),
        ("gif", "gif", {}),
    ],
)
def test_the_kinds_that_are_named_pass_and_can_be_read(
    tmp_path: Path, form: str, codec: str, options: dict[str, str]
) -> None:
    film = write_film(tmp_path / "film.video", form, codec, **options)
    assert problem_of(film) is None
    assert read_frames(film, max_frames=4).pixels_THWC.shape == (4, 64, 64, 3)


@pytest.mark.parametrize(
    "head",
    [
        HLS,
        b"ffconcat version 1.0\nfile /somewhere/film.mp4\n",
        DASH,
        DASH.replace(b"mpd", b"CompositionPlaylist"),
        SDP,
        TAG + HLS,
        TAG + PACKETS,
        PACKETS.replace(b"G\xff\xff\xff\xff", b"G<MPD"),
        PACKETS + b"\nc=IN IP4 127.0.0.1\n",
        b"\x00\x00\x00\x18ftypmp42" + b"\0" * 90_000 + b"\r\n\rc=IN IP4 127.0.0.1\r\n",
    ],
)
def test_lists_of_other_files_are_none_whatever_they_begin_like(head: bytes) -> None:
    assert "a list that names other files" in str(problem(head))


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"hello",
        b"G" * 100,
        PACKETS[: 4 * 188],
        b"RIFF\x24\x22\x00\x00WAVEfmt ",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"# VobSub index file, v7\n",
        b"MLVIv2.0",
        b"x" + HLS,
    ],
)
def test_what_is_no_known_container_is_refused(head: bytes) -> None:
    assert "none of the kinds" in str(problem(head))


def test_a_picture_that_stands_for_a_series_is_refused(tmp_path: Path) -> None:
    assert "Rename it" in str(problem_of(write_film(tmp_path / "a%03d.gif", "gif", "gif")))
    assert problem_of(write_film(tmp_path / "100%d.mp4", "mp4", "mpeg4")) is None


def refused(shelf: Shelf, url: str) -> str:
    with pytest.raises(ApiError) as caught:
        shelf.find(url)
    assert caught.value.status == 400
    return caught.value.message


def test_a_playlist_opens_nothing_whether_it_is_sent_or_lies_in_the_folder(tmp_path: Path) -> None:
    """FFmpeg would read the film that it names: any on this machine."""
    folder, uploads = tmp_path / "folder", tmp_path / "uploads"
    folder.mkdir()
    uploads.mkdir()
    secret = write_film(tmp_path / "secret.ts", "mpegts", "mpeg2video")
    told = set()
    for named in (secret, tmp_path / "none.ts"):
        playlist = HLS.replace(b"/somewhere/film.ts", str(named).encode())
        (folder / "film.mp4").write_bytes(playlist)
        sent = f"data:video/mp4;base64,{base64.b64encode(playlist).decode()}"
        shelf = Shelf(folder, uploads)
        told |= {refused(shelf, sent), refused(shelf, "film.mp4")}
    assert len(told) == 2, "and the error says nothing of what is there"
    assert not [*uploads.iterdir()]


def test_only_the_head_of_a_file_is_read(tmp_path: Path) -> None:
    film = write_film(tmp_path / "film.mkv", "matroska", "mpeg4")
    with film.open("ab") as end:
        end.truncate(HEAD_BYTES)
        end.seek(0, 2)
        end.write(b"\nc=IN IP4 127.0.0.1\n")
    assert problem_of(film) is None


def atoms(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    while data:
        size, kind = struct.unpack(">I4s", data[:8])
        yield kind, data[8:size]
        data = data[size:]


def with_reference(data: bytes, entry: bytes) -> bytes:
    """An MP4 whose pictures lie in another file, and are blanked in its own."""
    made = b""
    for kind, inner in atoms(data):
        if kind in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
            inner = with_reference(inner, entry)
        elif kind == b"dref":
            inner = struct.pack(">II", 0, 1) + entry
        elif kind == b"mdat":
            inner = bytes(len(inner))
        made += struct.pack(">I4s", 8 + len(inner), kind) + inner
    return made


def alias(path: Path) -> bytes:
    """An alias of QuickTime to a file."""
    name = f"Vol{path}".replace("/", ":").encode()
    name += b"\0" * (len(name) % 2)
    body = bytes(10) + b"\3" + b"Vol".ljust(27, b"\0") + bytes(12) + b"\1x".ljust(64, b"\0")
    body += bytes(36) + struct.pack(">HH", 2, len(name)) + name + struct.pack(">hH", -1, 0)
    return struct.pack(">I4sI", 12 + len(body), b"alis", 0) + body


def test_an_mp4_that_names_another_file_shows_nothing_of_it(tmp_path: Path) -> None:
    secret = write_film(tmp_path / "secret.mp4", "mp4", "mpeg4")
    film = tmp_path / "film.mp4"
    film.write_bytes(with_reference(secret.read_bytes(), alias(secret)))
    follow = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(film), options=follow) as container:
        assert next(container.decode(video=0)), "the reference is one that could be followed"
    assert problem_of(film) is None
    with pytest.raises(VideoError):
        read_frames(film)
