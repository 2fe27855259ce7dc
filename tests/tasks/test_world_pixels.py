"""The world's answers, found again by looking at the decoded video files.

Run: python -m pytest tests/tasks/test_world_pixels.py

The looking uses nothing of the world's drawing code, only its palette. Axes: T frames, H rows,
W columns, C colours.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from internvideo3.tasks.video import read_frames
from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world.media import encode_video
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.questions import Question, draw_question
from internvideo3.tasks.world.render import frame_times
from internvideo3.tasks.world.scenes import Profile, VideoSpec, draw_video

SIDE = 128
FPS = d.FILE_FPS
Video = NDArray[np.uint8]
"""`[T,H,W,C]`."""

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_BORDER = 0.06
_NEAR = 0.22
"""Distance in RGB (0 to 1 a channel) within which a pixel has a palette's colour."""
_LEAST_PX = 24
"""Pixels of a colour that make an object."""

# Width of a shape's rows at a quarter, a half and three quarters of its height, over its full
# width, counting only pixels of the shape.
PROFILES = {
    "circle": (0.87, 1.0, 0.87),
    "square": (1.0, 1.0, 1.0),
    "triangle": (0.25, 0.5, 0.75),
    "cross": (0.36, 1.0, 0.36),
    "ring": (0.87, 0.5, 0.87),
    "diamond": (0.5, 1.0, 0.5),
}


def mask_of(pixels: Pixels, colour: str) -> Mask:
    """Pixels inside the border that have a colour; `[H,W]` of a picture, `[T,H,W]` of a video."""
    wanted_C = np.rint(255 * np.array(d.COLOURS[colour])).astype(np.int16)
    edge = int(np.ceil(_BORDER * pixels.shape[-2])) + 1
    inside = slice(edge, -edge)
    error = pixels[..., inside, inside, :].astype(np.int16) - wanted_C
    mask = np.zeros(pixels.shape[:-1], bool)
    mask[..., inside, inside] = np.square(error, dtype=np.int32).sum(-1) < (255 * _NEAR) ** 2
    return mask


def sees(pixels: Pixels, colour: str) -> Mask:
    """Whether an object of a colour is there; one value for each picture."""
    return np.asarray(mask_of(pixels, colour).sum((-2, -1)) >= _LEAST_PX)


def centre_of(pixels_HWC: Pixels, colour: str) -> tuple[float, float]:
    """Middle x, y of the box around a colour's pixels, in picture widths."""
    rows, columns = np.nonzero(mask_of(pixels_HWC, colour))
    side = len(pixels_HWC)
    return (
        (columns.min() + columns.max() + 1) / 2 / side,
        (rows.min() + rows.max() + 1) / 2 / side,
    )


def area_of(pixels_HWC: Pixels, colour: str) -> int:
    """Pixels of a colour."""
    return int(mask_of(pixels_HWC, colour).sum())


def shape_of(pixels_HWC: Pixels, colour: str) -> str:
    """The shape whose profile of row widths is nearest."""
    rows, columns = np.nonzero(mask_of(pixels_HWC, colour))
    box_HW = mask_of(pixels_HWC, colour)[
        rows.min() : rows.max() + 1, columns.min() : columns.max() + 1
    ]
    height, width = box_HW.shape
    profile = [box_HW[int(height * share)].sum() / width for share in (0.25, 0.5, 0.75)]
    return min(PROFILES, key=lambda name: float(np.abs(np.subtract(PROFILES[name], profile)).sum()))


def flash_of(pixels_HWC: Pixels) -> str | None:
    """Colour of the flashing frame, None where there is none."""
    strip_NC = np.concatenate([pixels_HWC[1], pixels_HWC[-2], pixels_HWC[:, 1], pixels_HWC[:, -2]])
    mean_C = strip_NC.mean(0) / 255
    distances = {name: np.linalg.norm(mean_C - np.array(rgb)) for name, rgb in d.COLOURS.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] < _NEAR else None


def place_of(pixels_HWC: Pixels) -> str:
    """The background's texture, from pixels that are grey."""
    image_HWC = pixels_HWC.astype(np.float32)
    grey_HW = image_HWC.mean(-1)
    valid_HW = (image_HWC.max(-1) - image_HWC.min(-1) < 24) & (grey_HW < 110)
    low, high = np.percentile(grey_HW[valid_HW], (5, 95))
    if high - low < 12:
        return "plain"
    bright_HW = grey_HW > (low + high) / 2

    def same(down: int, right: int) -> float:
        """Share of valid pixel pairs, so far apart, that are both bright or both dark."""
        shift = (down, right)
        other_HW, there_HW = np.roll(bright_HW, shift, (0, 1)), np.roll(valid_HW, shift, (0, 1))
        both_HW = valid_HW & there_HW
        both_HW[:down] = False
        both_HW[:, :right] = False
        return float((bright_HW == other_HW)[both_HW].mean())

    step = len(grey_HW) // 10
    if same(0, step) > 0.93:
        return "stripes"
    if _slanted(bright_HW, valid_HW) > 0.85:
        return "waves"
    return "dots" if bright_HW[valid_HW].mean() < 0.38 else "checks"


def _slanted(bright_HW: Mask, valid_HW: Mask, step: int = 6) -> float:
    """Share of valid pixels that agree with the one so many rows up and columns right."""
    agree_HW = bright_HW[step:, :-step] == bright_HW[:-step, step:]
    both_HW = valid_HW[step:, :-step] & valid_HW[:-step, step:]
    return float(agree_HW[both_HW].mean())


PROFILE: dict[str, Profile] = {
    "holistic": "ego", "ends": "ego", "whereabouts": "ego",
    "relation": "spatial", "distance": "spatial", "objects": "spatial",
}  # fmt: skip
LENGTHS = {"main": (8, 16), "ego": (8, 16), "spatial": (4, 8)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pixels")


def load(folder: Path, spec: VideoSpec) -> Video:
    """All frames of the spec's file, written and read back."""
    return _load(folder, spec.seed, spec.length_s, spec.profile)


@cache
def _load(folder: Path, seed: int, length_s: float, profile: Profile) -> Video:
    spec = draw_video(seed, length_s, profile)
    path = folder / f"{profile}-{length_s:g}-{seed}.mp4"
    path.write_bytes(encode_video(paint(spec, frame_times(spec), SIDE)))
    frames = read_frames(path, fps=FPS)
    assert frames.indices == tuple(range(round(length_s * FPS)))
    return frames.pixels_THWC


def seconds(video: Video, colour: str) -> list[float]:
    """Times at which an object of a colour is in the picture."""
    return [float(t) / FPS for t in np.flatnonzero(sees(video, colour))]


def clear(video: Video, colour: str) -> list[Video]:
    """Pictures that show a colour and no flash."""
    return [picture for picture in video[sees(video, colour)] if flash_of(picture) is None]


def colour_in(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text) if word in d.COLOURS]


def needle(video: Video, question: Question) -> str:
    return Counter(filter(None, map(flash_of, video))).most_common(1)[0][0]


def count(video: Video, question: Question) -> str:
    on = [flash_of(picture) is not None for picture in video]
    return str(sum(now and not before for before, now in zip([False, *on], on, strict=False)))


def order(video: Video, question: Question) -> str:
    first = {name: seconds(video, colour_in(name)[0])[0] for name in question.options or ()}
    pick = min if "first" in question.question else max
    return pick(first, key=first.__getitem__)


def attime(video: Video, question: Question) -> str:
    at = int(re.findall(r"\d+", question.question)[0])
    seen = [n for n in question.options or () if sees(video[at * FPS], colour_in(n)[0])]
    assert len(seen) == 1
    return seen[0]


def holistic(video: Video, question: Question) -> str:
    # Late in each second, when no scene dissolves.
    return Counter(place_of(picture) for picture in video[FPS - 2 :: FPS]).most_common(1)[0][0]


def ends(video: Video, question: Question) -> str:
    return place_of(video[0] if "start" in question.question else video[-1])


def whereabouts(video: Video, question: Question) -> str:
    pictures = clear(video, colour_in(question.question)[0])
    return Counter(map(place_of, pictures)).most_common(1)[0][0]


def motion(video: Video, question: Question) -> str:
    colour = colour_in(question.question)[0]
    pictures = clear(video, colour)
    (x0, y0), (x1, y1) = centre_of(pictures[0], colour), centre_of(pictures[-1], colour)
    across = abs(x1 - x0) > abs(y1 - y0)
    return ("left", "right")[int(x1 > x0)] if across else ("up", "down")[int(y1 > y0)]


def depth(video: Video, question: Question) -> str:
    colour = colour_in(question.question)[0]
    pictures = clear(video, colour)
    growth = area_of(pictures[-1], colour) / area_of(pictures[0], colour)
    return "nearer" if growth > 1.5 else "farther" if growth < 0.67 else "same"


def shape(video: Video, question: Question) -> str:
    colour = colour_in(question.question)[0]
    pictures = sorted(clear(video, colour), key=lambda picture: area_of(picture, colour))
    found = Counter(shape_of(picture, colour) for picture in pictures[len(pictures) // 2 :])
    return found.most_common(1)[0][0]


def colour(video: Video, question: Question) -> str:
    wanted = question.question.rstrip("?").split()[-1]
    for name in question.options or ():
        if seconds(video, name) and shape(video, _about(name)) == wanted:
            return name
    raise AssertionError("no option has that shape")


def _about(name: str) -> Question:
    return Question("shape", f"What shape is the {name} object?", None, "", "choice", ())


def ground_object(video: Video, question: Question) -> str:
    times = seconds(video, colour_in(question.question)[0])
    return f"{times[0]} - {times[-1] + 1 / FPS}"


def ground_flash(video: Video, question: Question) -> str:
    times = [t / FPS for t, picture in enumerate(video) if flash_of(picture) is not None]
    return f"{times[0]:g} - {times[-1] + 1 / FPS:g}"


def _places(video: Video, question: Question) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centres of the two objects that the question names."""
    one, other = colour_in(question.question)
    picture = next(p for p in clear(video, one) if sees(p, other))
    return centre_of(picture, one), centre_of(picture, other)


def relation(video: Video, question: Question) -> str:
    (x0, y0), (x1, y1) = _places(video, question)
    across = abs(x1 - x0) > abs(y1 - y0)
    return ("right", "left")[int(x0 < x1)] if across else ("below", "above")[int(y0 < y1)]


def distance(video: Video, question: Question) -> str:
    (x0, y0), (x1, y1) = _places(video, question)
    return f"{10 * np.hypot(x1 - x0, y1 - y0)}"


def objects(video: Video, question: Question) -> str:
    at = int(re.findall(r"\d+", question.question)[0])
    return str(sum(sees(video[at * FPS], name) for name in d.COLOURS))


EYES: dict[str, Callable[[Video, Question], str]] = {
    f.__name__: f
    for f in (
        needle, count, order, attime, holistic, ends, whereabouts, motion, depth, shape, colour,
        ground_object, ground_flash, relation, distance, objects,
    )
}  # fmt: skip


def agrees(family: str, seen: str, answer: str) -> bool:
    if family == "ground_object":
        # While a scene dissolves an object is half there: half a second of doubt at either end.
        return np.allclose(_numbers(seen), _numbers(answer), atol=0.51)
    if family == "distance":
        return abs(float(seen) - float(answer)) < 0.9
    return seen == answer


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(" - ")]


@pytest.mark.parametrize("family", EYES)
def test_answers_are_what_the_video_shows(family: str, folder: Path) -> None:
    profile = PROFILE.get(family, "main")
    asked = 0
    for seed in range(40):
        length_s = LENGTHS[profile][seed % 2]
        spec = draw_video(seed, length_s, profile)
        question = draw_question(spec, random.Random(seed), family)
        if question is None:
            continue
        seen = EYES[family](load(folder, spec), question)
        assert agrees(family, seen, question.answer), (
            f"seed {seed}, {length_s} s: {question.question} answer {question.answer!r}, "
            f"but the pixels say {seen!r}"
        )
        asked += 1
        if asked == 6:
            break
    assert asked == 6
