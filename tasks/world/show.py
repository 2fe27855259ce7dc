"""One question of the scale world as a picture: frames and their times, options, answer."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from internvideo3.tasks.brief import EVALUABLE, form_of
from internvideo3.tasks.sampling import frame_indices
from internvideo3.tasks.video import read_frames
from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world import visits
from internvideo3.tasks.world.build import BuildError, checked_split, checked_suite, world_root
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.suites import Split, Suite, deal_lengths, video_seed

TILES: Final = 18
COLUMNS: Final = 6
TILE_PX: Final = 192
_GAP: Final = 12
_LABEL: Final = 26
_INK: Final = (30, 34, 40)
_FAINT: Final = (120, 126, 135)
_PAPER: Final = (250, 250, 248)
_RIGHT: Final = (22, 130, 70)
_BAR: Final = (222, 224, 228)


@dataclass(frozen=True, slots=True)
class _Tiles:
    pixels_THWC: NDArray[np.uint8]
    times_s: tuple[float, ...]
    source: str
    """Where the frames come from, for the sheet's heading."""


def world_show(
    suite: str,
    *,
    index: int = 0,
    sample_id: str | None = None,
    root: str | Path | None = None,
    split: str = "test",
    out: str | Path | None = None,
) -> Path:
    """Write a contact sheet of one question.

    The frames come from the video file where the suite is built, else they are drawn on the spot.

    Args:
        suite: The suite's name.
        index: Which question of the suite, counted from 0.
        sample_id: The question's id instead of its index, e.g. `world_long/000123`.
        root: See `build.world_root`.
        split: train, validation or test.
        out: The PNG file; by default named after the question, in the working directory.

    Returns:
        The file written.

    Raises:
        BuildError: Unknown suite, split, index or id.
        VideoError: The suite's video file is damaged.
    """
    recipe, part = checked_suite(suite, EVALUABLE), checked_split(split)
    doc = _find(recipe, part, index, sample_id)
    tiles = _tiles(recipe, part, doc, world_root(root) / part)
    target = Path(out) if out is not None else Path(doc["id"].replace("/", "-") + ".png")
    target.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(doc, tiles.pixels_THWC, tiles.times_s, tiles.source).save(target, format="PNG")
    return target


def _find(suite: Suite, split: Split, index: int, sample_id: str | None) -> dict[str, Any]:
    rows = form_of(suite).documents(suite, split, None)
    if sample_id is None:
        number = -1
        for number, doc in enumerate(rows):
            if number == index:
                return doc
        raise BuildError(f"{suite.name} has questions 0 to {number}, got {index}")
    docs = {doc["id"]: doc for doc in rows}
    if sample_id not in docs:
        close = get_close_matches(sample_id, docs, n=3)
        hint = f"near: {', '.join(close)}" if close else f"for example: {next(iter(docs))}"
        raise BuildError(f"unknown question {sample_id!r} of {suite.name}; {hint}")
    return docs[sample_id]


def _tiles(suite: Suite, split: Split, doc: dict[str, Any], folder: Path) -> _Tiles:
    sampled = frame_indices(round(doc["length_s"] * d.FILE_FPS), float(d.FILE_FPS))
    picked = pick([index / d.FILE_FPS for index in sampled], doc["evidence"])
    path = folder / doc["video"]
    if path.is_file():
        frames = read_frames(path)
        pixels_THWC = frames.pixels_THWC[list(picked)]
        times_s = tuple(frames.indices[n] / frames.source_fps for n in picked)
        return _Tiles(pixels_THWC, times_s, str(path))
    video = int(doc["video_id"].rsplit("-", 1)[1])
    seed, length_s = video_seed(suite, split, video), deal_lengths(suite)[video]
    spec = visits.draw(seed, length_s, suite.profile, form_of(suite).visit_s)
    times_s = tuple(sampled[n] / d.FILE_FPS for n in picked)
    return _Tiles(paint(spec, times_s), times_s, "drawn now; not built")


def pick(times_s: list[float], evidence: list[list[float]], most: int = TILES) -> tuple[int, ...]:
    """Numbers of the frames to show: one for each span of the evidence, the rest evenly spaced.

    Args:
        times_s: Times of the frames that the model sees.
        evidence: Spans in seconds.
        most: Frames to pick at most.
    """
    chosen = set()
    for start, end in evidence[:most]:
        middle = (start + end) / 2
        chosen.add(min(range(len(times_s)), key=lambda n: abs(times_s[n] - middle)))
    spare = max(0, min(most, len(times_s)) - len(chosen))
    others = [n for n in range(len(times_s)) if n not in chosen]
    even = np.linspace(0, max(0, len(others) - 1), spare).round().astype(int)
    return tuple(sorted(chosen | {others[n] for n in even}))


def contact_sheet(
    doc: dict[str, Any], pixels_THWC: NDArray[np.uint8], times_s: tuple[float, ...], source: str
) -> Image.Image:
    """A picture of a document: heading, question, options, time line, frames.

    Args:
        doc: The document.
        pixels_THWC: Frames, RGB.
        times_s: Their times.
        source: A line on where the frames come from.
    """
    rows = -(-len(times_s) // COLUMNS)
    lines = _text_lines(doc, source)
    top = _GAP + sum(size + 8 for _, size, _ in lines) + 44
    width = COLUMNS * (TILE_PX + _GAP) + _GAP
    sheet = Image.new("RGB", (width, top + rows * (TILE_PX + _LABEL + _GAP)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    y = _GAP
    for text, size, colour in lines:
        pen.text((_GAP, y), text, fill=colour, font=ImageFont.load_default(size))
        y += size + 8
    _draw_time_line(pen, doc, times_s, (_GAP, y + 6, width - _GAP, y + 20))
    for n, (time_s, pixels_HWC) in enumerate(zip(times_s, pixels_THWC, strict=True)):
        x = _GAP + (n % COLUMNS) * (TILE_PX + _GAP)
        corner = (x, top + (n // COLUMNS) * (TILE_PX + _LABEL + _GAP))
        _draw_tile(sheet, pen, pixels_HWC, corner, f"{time_s:.2f} s", _inside(doc, time_s))
    return sheet


def _text_lines(doc: dict[str, Any], source: str) -> list[tuple[str, int, tuple[int, int, int]]]:
    """Text, size in pixels and colour of each line of the heading."""
    heading = f"{doc['id']}   {doc['family']}   {doc['length_s']:g} s   {doc['video_id']}"
    lines = [(f"{heading}   ({source})", 14, _FAINT)]
    lines += [(line, 24, _INK) for line in textwrap.wrap(doc["question"], 96)]
    for letter, option in zip("ABCDE", doc["options"] or (), strict=False):
        right = option == doc["answer"]
        mark = "   <- answer" if right else ""
        lines.append((f"{letter}.  {option}{mark}", 18, _RIGHT if right else _INK))
    if not doc["options"]:
        unit = " s" if doc["answer_type"] == "span" else ""
        lines.append((f"answer: {doc['answer']}{unit}", 18, _RIGHT))
    spans = ", ".join(f"{start:g} - {end:g} s" for start, end in doc["evidence"])
    return [*lines, (f"evidence (green): {spans}", 14, _FAINT)]


def _draw_time_line(
    pen: ImageDraw.ImageDraw,
    doc: dict[str, Any],
    times_s: tuple[float, ...],
    box: tuple[int, int, int, int],
) -> None:
    left, top, right, bottom = box
    scale = (right - left) / doc["length_s"]
    pen.rectangle(box, fill=_BAR)
    for start, end in doc["evidence"]:
        pen.rectangle((left + start * scale, top, left + end * scale, bottom), fill=_RIGHT)
    for time_s in times_s:
        x = left + time_s * scale
        pen.line((x, top - 4, x, bottom + 4), fill=_INK)


def _draw_tile(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    pixels_HWC: NDArray[np.uint8],
    corner: tuple[int, int],
    label: str,
    evidence: bool,
) -> None:
    x, y = corner
    picture = Image.fromarray(pixels_HWC).resize((TILE_PX, TILE_PX), Image.Resampling.NEAREST)
    if evidence:
        pen.rectangle((x - 4, y - 4, x + TILE_PX + 3, y + TILE_PX + 3), fill=_RIGHT)
    sheet.paste(picture, corner)
    colour = _RIGHT if evidence else _FAINT
    pen.text((x, y + TILE_PX + 6), label, fill=colour, font=ImageFont.load_default(14))


def _inside(doc: dict[str, Any], time_s: float) -> bool:
    return any(start <= time_s < end for start, end in doc["evidence"])
