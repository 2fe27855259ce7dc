"""Media files of the scale world: H.264 video, optional tones, SRT subtitles.

Everything is encoded in memory, single-threaded and with bit-exact flags, so that equal frames give
equal bytes and a full disk shows up as an ordinary `OSError` where the bytes are written.

Axes: T frames, H rows, W columns, C colours (red, green, blue).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world.scenes import VideoSpec

ENCODING: Final = "libx264 crf=12 preset=veryfast tune=fastdecode bf=0 yuv420p v2"
"""Part of the build cache's key; the digits at the end change when the bytes would."""
SAMPLE_RATE: Final = 16000
TONE_S: Final = 0.25
CUE_S: Final = 1.5

# No B-frames: with them libx264's macroblock tree reads memory that it has not written, and one
# video in ten came out with other bytes (seen with MALLOC_PERTURB_; without B-frames 0 of 206 did).
# Against preset medium encoding takes half the time; the mean error is the same, about 1 to 2 of
# 255, nearly all of it from colour at half resolution.
_VIDEO_OPTIONS: Final = {
    "crf": "12",
    "preset": "veryfast",
    "tune": "fastdecode",
    "bf": "0",
    "threads": "1",
}
_AUDIO_FRAME: Final = 1024
"""Samples in one AAC frame."""
_LOUDNESS: Final = 0.2


@dataclass(frozen=True, slots=True)
class Tone:
    """A sine tone."""

    start_s: float
    length_s: float
    frequency_hz: float


@dataclass(frozen=True, slots=True)
class Cue:
    """One subtitle."""

    start_s: float
    end_s: float
    text: str


def encode_video(
    pixels_THWC: NDArray[np.uint8], *, fps: int = d.FILE_FPS, tones: Sequence[Tone] | None = None
) -> bytes:
    """An mp4 file of the frames, with an AAC track of the tones where `tones` is not None.

    Args:
        pixels_THWC: RGB frames, 0 to 255; height and width even.
        fps: Frames a second.
        tones: Tones to mix into the sound track (silence where it is empty); None for no track.

    Raises:
        ValueError: If there are no frames, or they are not `[T,H,W,3]` of 8 bits with even sides.
    """
    _check_pixels(pixels_THWC)
    import av  # here: only a build writes files

    target = io.BytesIO()
    with av.open(target, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        video: Any = container.add_stream("libx264", rate=fps, options=_VIDEO_OPTIONS)
        video.height, video.width = pixels_THWC.shape[1:3]
        video.pix_fmt = "yuv420p"
        sound = None
        if tones is not None:
            sound = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        for pixels_HWC in pixels_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_HWC), format="rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if sound is not None:
            for samples in _audio_frames(tones or (), len(pixels_THWC) / fps):
                container.mux(sound.encode(samples))
            container.mux(sound.encode())
    return target.getvalue()


def _check_pixels(pixels_THWC: NDArray[np.uint8]) -> None:
    shape = pixels_THWC.shape
    if pixels_THWC.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] == 0:
        raise ValueError(
            f"frames must be [T,H,W,3] of 8 bits with T >= 1, got {pixels_THWC.dtype} {shape}"
        )
    if shape[1] % 2 or shape[2] % 2:
        raise ValueError(f"H.264 in yuv420p needs even sides, got {shape[1]}x{shape[2]} pixels")


def _audio_frames(tones: Sequence[Tone], length_s: float) -> Iterator[Any]:
    import av

    wave = mix_tones(tones, length_s)
    for start in range(0, len(wave), _AUDIO_FRAME):
        frame = av.AudioFrame.from_ndarray(
            wave[None, start : start + _AUDIO_FRAME], format="fltp", layout="mono"
        )
        frame.sample_rate = SAMPLE_RATE
        frame.pts = start
        yield frame


def mix_tones(tones: Sequence[Tone], length_s: float) -> NDArray[np.float32]:
    """The sound track: samples in -1 to 1 at `SAMPLE_RATE`."""
    wave = np.zeros(round(length_s * SAMPLE_RATE), np.float32)
    for tone in tones:
        first = round(tone.start_s * SAMPLE_RATE)
        count = max(0, min(round(tone.length_s * SAMPLE_RATE), len(wave) - first))
        phase = 2 * np.pi * tone.frequency_hz / SAMPLE_RATE * np.arange(count)
        wave[first : first + count] += (_LOUDNESS * np.sin(phase)).astype(np.float32)
    return np.clip(wave, -1.0, 1.0)


def tones_of(spec: VideoSpec) -> list[Tone]:
    """A tone as each object enters (its pitch tells the colour) and a low one for each flash."""
    pitch = {colour: 440.0 * 2 ** (step / 6) for step, colour in enumerate(d.COLOURS)}
    tones = [Tone(thing.enter_s, TONE_S, pitch[thing.colour]) for thing in spec.things]
    return tones + [Tone(flash.start_s, TONE_S, 220.0) for flash in spec.flashes]


def cues_of(spec: VideoSpec) -> list[Cue]:
    """What the objects say: each gives its name as it enters."""
    return [
        Cue(
            thing.enter_s,
            min(thing.enter_s + CUE_S, thing.leave_s),
            f"{thing.colour.capitalize()} {thing.shape}: I am here.",
        )
        for thing in spec.things
    ]


def encode_subtitles(cues: Sequence[Cue]) -> str:
    """The text of an SRT file."""
    import pysubs2

    events = [
        pysubs2.SSAEvent(
            start=round(cue.start_s * 1000), end=round(cue.end_s * 1000), text=cue.text
        )
        for cue in cues
    ]
    subtitles = pysubs2.SSAFile()
    subtitles.events = events
    return subtitles.to_string("srt")
