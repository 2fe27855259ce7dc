"""Decoding in another process: same frames, and crashes and hangs that cost one file.

pytest tests/tasks/test_decoder.py
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from internvideo3.tasks import decoder
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import Frames, VideoError, read_frames
from internvideo3.tasks.world.media import encode_video


def a_video(path: Path, seed: int = 0) -> Path:
    pixels_THWC = np.random.default_rng(seed).integers(0, 255, (24, 64, 64, 3), np.uint8)
    path.write_bytes(encode_video(pixels_THWC, fps=8))
    return path


def process_of(reader: IsolatedReader) -> "subprocess.Popen[bytes] | None":
    """The process of a reader that has one."""
    return reader._workers[0].process


@pytest.fixture(scope="module")
def reader() -> IsolatedReader:
    return IsolatedReader()


@pytest.mark.parametrize("options", [{}, {"fps": 8.0, "max_frames": 6}, {"start_s": 1.0}])
def test_frames_are_those_of_reading_here(
    options: dict[str, float], reader: IsolatedReader, tmp_path: Path
) -> None:
    video = a_video(tmp_path / "a.mp4")
    here, there = read_frames(video, **options), reader.read(video, **options)  # type: ignore[arg-type]
    assert np.array_equal(here.pixels_THWC, there.pixels_THWC)
    for name in ("indices", "source_fps", "total_frames", "duration_s", "digest"):
        assert getattr(here, name) == getattr(there, name)


def test_errors_are_those_of_reading_here(reader: IsolatedReader, tmp_path: Path) -> None:
    torn = tmp_path / "torn.mp4"
    torn.write_bytes(a_video(tmp_path / "a.mp4").read_bytes()[:900])
    for path in (torn, tmp_path / "gone.mp4"):
        with pytest.raises(VideoError) as here:
            read_frames(path)
        with pytest.raises(VideoError) as there:
            reader.read(path)
        assert str(here.value) == str(there.value)
    with pytest.raises(ValueError, match="fps must be"):
        reader.read(torn, fps=0)


def test_a_closed_reader_has_no_process_and_starts_another(tmp_path: Path) -> None:
    video, own = a_video(tmp_path / "a.mp4"), IsolatedReader()
    own.close()
    own.read(video)
    first = process_of(own)
    assert first is not None
    own.close()
    assert first.poll() == 0
    assert own.read(video).indices and process_of(own) is not first
    own.close()


def test_a_crash_is_an_error_of_that_file_and_the_next_one_is_read(tmp_path: Path) -> None:
    video, own = a_video(tmp_path / "a.mp4"), IsolatedReader()
    own.read(video)
    process = process_of(own)
    assert process is not None
    os.kill(process.pid, signal.SIGSEGV)
    process.wait()
    assert own.read(video).indices

    # A pipe in place of a file keeps the process waiting, so that it dies in the middle.
    stuck = tmp_path / "stuck.mp4"
    ask = decoder._ask

    def killed(by: signal.Signals) -> str:
        def die(process: "subprocess.Popen[bytes]", *request: Any) -> Frames:
            process.send_signal(by)
            process.wait()
            return ask(process, *request)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "_ask", die)
            with pytest.raises(VideoError, match=r"cannot read the video .*stuck\.mp4") as raised:
                own.read(stuck)
        assert own.read(video).indices
        return str(raised.value)

    assert "the decoder crashed on it (SIGSEGV)" in killed(signal.SIGSEGV)
    by_the_system = killed(signal.SIGKILL)
    assert "the decoder was killed (SIGKILL)" in by_the_system and "memory" in by_the_system
    assert "limit" not in by_the_system and " s." not in by_the_system
    own.close()


def test_the_length_of_a_video_gives_its_decoding_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process says so, and is then waited for; a limit of the reader's own holds instead."""
    video = tmp_path / "long.mp4"
    video.write_bytes(encode_video(np.zeros((800, 32, 32, 3), np.uint8), fps=1))
    limits: list[float] = []
    allow = decoder._Replies.allow
    monkeypatch.setattr(
        decoder._Replies, "allow", lambda self, s: (limits.append(s), allow(self, s))
    )
    for limit_s in (None, 50.0):
        with contextlib.closing(IsolatedReader(time_limit_s=limit_s)) as own:
            own.read(video, max_frames=4)
    assert limits == [1600.0, 50.0]


def test_frames_are_fitted_on_this_side_a_few_at_a_time(
    reader: IsolatedReader, tmp_path: Path
) -> None:
    pixels_THWC = np.random.default_rng(0).integers(0, 255, (130, 64, 64, 3), np.uint8)
    video = tmp_path / "a.mp4"
    video.write_bytes(encode_video(pixels_THWC, fps=8))
    seen: list[int] = []

    def quarter(pixels_THWC: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
        assert count == 130
        seen.append(len(pixels_THWC))
        return pixels_THWC[:, ::4, ::4]

    fitted, whole = reader.read(video, fps=8.0, fit=quarter), read_frames(video, fps=8.0)
    assert seen == [64, 64, 2]
    assert np.array_equal(fitted.pixels_THWC, whole.pixels_THWC[:, ::4, ::4])
    assert fitted.digest == whole.digest


def test_an_error_while_fitting_does_not_spoil_the_next_video(tmp_path: Path) -> None:
    video, own = a_video(tmp_path / "a.mp4"), IsolatedReader()

    def full(*_: object) -> NDArray[np.uint8]:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        own.read(video, fit=full)
    assert own.read(video).digest == read_frames(video).digest
    own.close()


def test_damaged_headers_never_end_this_process(tmp_path: Path) -> None:
    """Bits flipped in the index of the file, where a decoder has crashed."""
    whole, rng, own = a_video(tmp_path / "a.mp4").read_bytes(), random.Random(5), IsolatedReader()
    path, start = tmp_path / "hurt.mp4", whole.rfind(b"moov")
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 4, 8))):
            data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            assert own.read(path, fps=4, max_frames=8, time_limit_s=20).indices
        except VideoError as error:
            assert "hurt.mp4" in str(error)
    own.close()


def test_what_never_returns_is_killed_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "_GRACE_S", 0.2)
    video, own = a_video(tmp_path / "a.mp4"), IsolatedReader()
    own.read(video)
    process = process_of(own)
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(VideoError, match=r"time limit of 0\.3 s.*--decode-limit"):
        own.read(video, time_limit_s=0.3)
    assert time.monotonic() - started < 5
    assert own.read(video).indices
    own.close()


def test_threads_take_turns(reader: IsolatedReader, tmp_path: Path) -> None:
    videos = [a_video(tmp_path / f"{seed}.mp4", seed) for seed in range(4)]
    expected = [read_frames(video).digest for video in videos]
    found: list[str] = [""] * 4

    def run(number: int) -> None:
        found[number] = reader.read(videos[number]).digest

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("[matroska,webm @ 0x55d] File ended prematurely", "File ended prematurely"),
        (
            "a line\n[mov,mp4 @ 0x1] stream 0, offset 0x9: partial file\n",
            "stream 0, offset 0x9: partial file",
        ),
        ("[h264 @ 0xab] mmco: unref short failure", None),
        ("[h264 @ 0xab] reference picture missing during reorder", None),
        ("[mov,mp4,m4a,3gp,3g2,mj2 @ 0xab] atom is invalid", None),
        ("", None),
    ],
)
def test_only_what_a_file_lacks_is_damage(written: str, found: str | None) -> None:
    assert decoder.damage(written) == found


def test_several_processes_decode_at_once_and_no_more(tmp_path: Path) -> None:
    videos = [a_video(tmp_path / f"{seed}.mp4", seed) for seed in range(6)]
    expected = [read_frames(video).digest for video in videos]
    with contextlib.closing(IsolatedReader(2)) as several, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda video: several.read(video).digest, videos))
        started = [worker.process for worker in several._workers if worker.process]
        assert found == expected and len({process.pid for process in started}) == 2
    assert not any(worker.process for worker in several._workers)
    with pytest.raises(ValueError, match="at least one process"):
        IsolatedReader(0)


def test_the_process_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    video = a_video(tmp_path / "a.mp4")
    code = (
        "import os\n"
        "from internvideo3.tasks.decoder import IsolatedReader\n"
        f"reader = IsolatedReader()\nreader.read({str(video)!r})\n"
        "print(reader._workers[0].process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid, until = int(done.stdout), time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
