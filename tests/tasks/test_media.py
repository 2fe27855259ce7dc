"""Media files of the world: bytes that repeat, pictures that survive, sound and subtitles.

Run: python -m pytest tests/tasks/test_media.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pysubs2
import pytest

from internvideo3.tasks.video import read_frames
from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world.media import (
    SAMPLE_RATE,
    TONE_S,
    Cue,
    Tone,
    cues_of,
    encode_subtitles,
    encode_video,
    mix_tones,
    tones_of,
)
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.render import frame_times
from internvideo3.tasks.world.scenes import draw_video

_DIGESTS = """
import hashlib
from internvideo3.tasks.world.media import encode_video, tones_of
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.render import frame_times
from internvideo3.tasks.world.scenes import draw_video
for seed, length_s, profile in [(2 * 10**12 + 2 * 10**6 + 8, 4, "main"), (11, 8, "main"),
                                (3, 6, "ego"), (5, 4, "spatial"), (6, 4, "spatial")]:
    spec = draw_video(seed, length_s, profile)
    pixels = paint(spec, frame_times(spec))
    for tones in (None, tones_of(spec)):
        print(hashlib.sha256(encode_video(pixels, tones=tones)).hexdigest())
"""


def test_equal_seeds_give_equal_bytes_whatever_memory_holds() -> None:
    """An encoder that reads memory before writing it gives other bytes under MALLOC_PERTURB_."""
    first, second = (_digests(PYTHONHASHSEED=seed, MALLOC_PERTURB_=seed) for seed in ("0", "171"))
    assert first == second
    assert len(set(first)) == len(first) == 10


def _digests(**environment: str) -> list[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.run(
        [sys.executable, "-c", _DIGESTS],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return process.stdout.split()


@pytest.mark.parametrize(("profile", "limit"), [("main", 3.0), ("ego", 3.0), ("spatial", 3.0)])
def test_pictures_survive_the_encoder(tmp_path: Path, profile: str, limit: float) -> None:
    """Mean error of 8-bit values; nearly all of it is colour at half resolution."""
    spec = draw_video(3, 8, profile)
    pixels = paint(spec, frame_times(spec))
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video(pixels))
    frames = read_frames(path, fps=d.FILE_FPS)
    assert frames.source_fps == d.FILE_FPS
    assert frames.pixels_THWC.shape == pixels.shape
    assert np.abs(frames.pixels_THWC.astype(int) - pixels).mean() < limit


def test_the_file_is_h264_in_yuv420p(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video(np.zeros((9, 32, 48, 3), np.uint8), fps=8))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.frames) == (48, 32, 9)
        assert not container.streams.audio


def test_tones_sound_where_they_should(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    tones = [Tone(1.0, 0.5, 880.0), Tone(2.5, 0.25, 220.0)]
    path.write_bytes(encode_video(np.zeros((32, 32, 32, 3), np.uint8), tones=tones))
    with av.open(str(path)) as container:
        samples = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    wave = np.concatenate(samples)
    assert len(wave) / SAMPLE_RATE == pytest.approx(4.0, abs=0.15)
    assert _pitch(wave, 1.1, 1.4) == pytest.approx(880, abs=15)
    assert _pitch(wave, 2.55, 2.7) == pytest.approx(220, abs=15)
    assert np.abs(wave[: SAMPLE_RATE // 2]).max() < 0.02


def _pitch(wave: np.ndarray, start_s: float, end_s: float) -> float:
    piece = wave[round(start_s * SAMPLE_RATE) : round(end_s * SAMPLE_RATE)]
    spectrum = np.abs(np.fft.rfft(piece * np.hanning(len(piece)), 1 << 15))
    return float(spectrum.argmax() * SAMPLE_RATE / (1 << 15))


def test_a_tone_past_the_end_is_cut() -> None:
    wave = mix_tones([Tone(0.9, 1.0, 440.0), Tone(5.0, 1.0, 440.0)], 1.0)
    assert wave.shape == (SAMPLE_RATE,)
    assert np.abs(wave[: round(0.9 * SAMPLE_RATE)]).max() == 0
    assert np.abs(wave).max() > 0.1


def test_sound_follows_the_events() -> None:
    spec = draw_video(4, 16)
    starts = sorted(tone.start_s for tone in tones_of(spec))
    events = [t.enter_s for t in spec.things] + [f.start_s for f in spec.flashes]
    assert starts == sorted(events)
    assert {tone.length_s for tone in tones_of(spec)} == {TONE_S}
    pitches = {tone.frequency_hz for tone in tones_of(spec)}
    assert len(pitches) == len({thing.colour for thing in spec.things}) + 1


def test_subtitles_read_back() -> None:
    spec = draw_video(4, 16)
    cues = cues_of(spec)
    back = pysubs2.SSAFile.from_string(encode_subtitles(cues), format_="srt")
    assert [(e.start / 1000, e.end / 1000, e.text) for e in back] == [
        (cue.start_s, cue.end_s, cue.text) for cue in cues
    ]
    for cue, thing in zip(cues, spec.things, strict=True):
        assert thing.enter_s == cue.start_s < cue.end_s <= thing.leave_s
        assert thing.name in cue.text.lower()


def test_subtitles_of_nothing() -> None:
    assert encode_subtitles([]) == ""
    assert "00:00:01,250 --> 00:00:02,000" in encode_subtitles([Cue(1.25, 2.0, "Hello.")])


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((0, 32, 32, 3), np.uint8), "T >= 1"),
        (np.zeros((4, 32, 32), np.uint8), r"\[T,H,W,3\]"),
        (np.zeros((4, 32, 32, 3), np.float32), "float32"),
        (np.zeros((4, 33, 32, 3), np.uint8), "even sides, got 33x32"),
    ],
)
def test_impossible_frames_are_refused(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_video(pixels)
