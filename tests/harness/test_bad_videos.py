"""A benchmark whose videos are damaged: every question has a record, and the run ends.

pytest tests/harness/test_bad_videos.py
"""

import contextlib
import csv
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from internvideo3.harness import evaluate
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.recorder import ErrorBudgetError
from internvideo3.harness.store import read_rows
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import VideoError, read_frames
from internvideo3.tasks.world.media import encode_video

DAMAGED = 92
"""Files that are cut off, have bits flipped, or lack a part in the middle."""
BADLY = {
    "093.mp4": "sound alone", "094.mp4": "frames at uneven times", "095.mp4": "another format",
    "096.mp4": "wrong extension", "097.mp4": "a page of text", "098.mp4": "no frame rate",
    "099.mp4": "rotated", "100.mp4": "no content",
}  # fmt: skip
MUTATED = DAMAGED + len(BADLY)


def moving() -> NDArray[np.uint8]:
    pixels_THWC = np.full((24, 64, 64, 3), 24, np.uint8)
    for t, frame_HWC in enumerate(pixels_THWC):
        frame_HWC[24:40, 2 * t : 2 * t + 16, t % 3] = 230
    return pixels_THWC


def sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def uneven(path: Path) -> None:
    """Frames at uneven times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(8))
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        clock = 0
        for number, frame_HWC in enumerate(moving()):
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            frame.pts, frame.time_base = clock, Fraction(1, 1000)
            clock += 40 if number < 12 else 300
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def damaged(whole: bytes) -> Iterator[bytes]:
    rng = random.Random(11)
    for number in range(DAMAGED):
        data = bytearray(whole)
        if number % 3 == 0:
            data = data[: rng.randrange(1, len(data))]
        elif number % 3 == 1:
            for _ in range(rng.choice((1, 8, 64))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            start = rng.randrange(len(data))
            del data[start : start + rng.randrange(1, 2000)]
        yield bytes(data)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    videos = root / "nextqa" / "videos"
    videos.mkdir(parents=True)
    whole = encode_video(moving(), fps=8)
    (videos / "000.mp4").write_bytes(whole)
    for number, content in enumerate(damaged(whole), start=1):
        (videos / f"{number:03}.mp4").write_bytes(content)
    sound(videos / "093.mp4")
    uneven(videos / "094.mp4")
    (videos / "095.mp4").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (videos / "096.avi").write_bytes(whole)
    (videos / "097.mp4").write_text("<html>404</html>")
    # The frame rate in the header of the track: 0 where it was 8.
    clock = whole.find(b"mdhd") + 16
    (videos / "098.mp4").write_bytes(whole[:clock] + bytes(4) + whole[clock + 4 :])
    turned = whole.find(b"tkhd") + 44
    quarter = (0, 1, 0, -1, 0, 0, 0, 0, 0x40000000)
    matrix = b"".join(
        (v * 65536 if abs(v) == 1 else v).to_bytes(4, "big", signed=True) for v in quarter
    )
    (videos / "099.mp4").write_bytes(whole[:turned] + matrix + whole[turned + 36 :])
    (videos / "100.mp4").write_bytes(b"")
    assert len(list(videos.iterdir())) == 1 + MUTATED == 101
    with (root / "nextqa" / "val.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["video", "question", "answer", "qid", "type", *(f"a{i}" for i in range(5))]
        )
        for number in range(1 + MUTATED):
            writer.writerow([f"{number:03}", "what moves", 0, 0, "DO", *"abcde"])
    return root


@pytest.fixture(scope="module")
def options(data: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalOptions:
    return EvalOptions(
        model=str(checkpoint),
        suites=("nextqa",),
        out=tmp_path_factory.mktemp("runs") / "run",
        data=data,
        max_frames=8,
        min_pixels=4096,
        max_pixels=4096,
        max_new_tokens=2,
    )


def test_a_hundred_bad_videos_give_the_clean_ones_frames_or_a_counted_error(
    options: EvalOptions,
) -> None:
    summary = evaluate.evaluate(options)
    rows = {row["video_id"]: row for row in read_rows(options.out / "samples/nextqa.jsonl")}
    assert len(rows) == 1 + MUTATED == summary.computed
    failed = {name: row["error"] for name, row in rows.items() if row["error"]}
    assert {error["type"] for error in failed.values()} == {"VideoError"}
    assert all(name in error["message"] for name, error in failed.items())
    assert {"093.mp4", "095.mp4", "097.mp4", "100.mp4"} <= set(failed)
    assert not {"000.mp4", "094.mp4", "096.mp4", "099.mp4"} & set(failed)
    assert 20 < len(failed) < 100
    result = json.loads((options.out / "results.json").read_text())["nextqa"]
    assert len(summary.errors) == len(failed) == result["errors"]
    clean = rows["000.mp4"]
    pixels_THWC = read_frames(clean["video"]).pixels_THWC.astype(int)
    for name in rows.keys() - failed.keys() - {"094.mp4", "099.mp4"}:
        found_THWC = read_frames(rows[name]["video"]).pixels_THWC
        assert found_THWC.shape == pixels_THWC.shape, name
        assert np.abs(found_THWC - pixels_THWC).mean() < 0.1, name
        assert rows[name]["tokens"]["prompt"] == clean["tokens"]["prompt"], name
    assert rows["096.mp4"]["prediction"] == clean["prediction"]
    noted = {name: row["notes"] for name, row in rows.items() if "notes" in row}
    assert "uneven frame times" in noted.pop("094.mp4")[0] and "000.mp4" not in noted


def test_a_damaged_video_gives_the_clean_pictures_or_an_error(data: Path, tmp_path: Path) -> None:
    """A clip of much picture and little index, as real ones are; decord hides what is damaged."""
    pixels_THWC = np.random.default_rng(0).integers(0, 255, (128, 160, 3), np.uint8)
    whole = encode_video(np.stack([np.roll(pixels_THWC, 3 * t, axis=1) for t in range(48)]), fps=8)
    (tmp_path / "clean.mp4").write_bytes(whole)
    with contextlib.closing(IsolatedReader()) as reader:
        clean = reader.read(tmp_path / "clean.mp4").pixels_THWC.astype(int)
        found = []
        for number, content in enumerate(damaged(whole)):
            path = tmp_path / f"{number}.mp4"
            path.write_bytes(content)
            with contextlib.suppress(VideoError):
                found.append(reader.read(path, time_limit_s=60).pixels_THWC)
    assert len(found) < DAMAGED / 4
    # A bit of one coefficient may pass unnoticed: such a picture is the clean one but for a block.
    assert all(one.shape == clean.shape and np.abs(one - clean).mean() < 0.1 for one in found)


def test_a_video_of_uneven_times_or_turned_is_read(data: Path) -> None:
    videos = data / "nextqa" / "videos"
    straight = read_frames(videos / "000.mp4")
    turned = read_frames(videos / "099.mp4")
    assert turned.pixels_THWC.shape == straight.pixels_THWC.shape
    assert len(read_frames(videos / "094.mp4").indices) >= 2


def test_a_limit_of_decoding_fails_what_a_higher_one_answers(
    options: EvalOptions, tmp_path: Path
) -> None:
    short = replace(options, out=tmp_path / "run", limit=1, decode_limit_s=1e-6)
    (row,) = evaluate.evaluate(short).errors
    assert "000.mp4 reached its time limit" in row["error"]["message"]
    assert "--decode-limit" in row["error"]["message"]
    summary = evaluate.evaluate(replace(short, decode_limit_s=None, retry_errors=True))
    assert summary.computed == 1 and not summary.errors


def test_the_error_budget_stops_the_run_and_keeps_what_is_answered(
    options: EvalOptions, tmp_path: Path
) -> None:
    few = replace(options, out=tmp_path / "run", max_errors=3)
    with pytest.raises(ErrorBudgetError, match="--max-errors accepts 3") as raised:
        evaluate.evaluate(few)
    assert "--retry-errors" in str(raised.value)
    rows = read_rows(few.out / "samples/nextqa.jsonl")
    assert sum(row["error"] is not None for row in rows) == 4 < len(rows) < MUTATED
    whole = evaluate.evaluate(replace(few, max_errors=None))
    assert whole.kept == len(rows) and whole.computed == 1 + MUTATED - len(rows)
    shutil.rmtree(few.out)
