"""The scale world's difficulty: every number that decides how hard its videos and questions are.

Fixed before the scale model was trained. Changing anything here voids every number measured with
the old values, so the build cache and each run record `digest()`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

VERSION: Final = 1

COLOURS: Final[Mapping[str, tuple[float, float, float]]] = MappingProxyType(
    {
        "red": (0.92, 0.10, 0.10),
        "green": (0.10, 0.75, 0.15),
        "blue": (0.15, 0.25, 0.95),
        "yellow": (0.95, 0.90, 0.10),
        "purple": (0.65, 0.15, 0.80),
        "cyan": (0.10, 0.85, 0.90),
        "orange": (0.98, 0.52, 0.05),
        "white": (0.97, 0.97, 0.97),
    }
)
"""Object and flash colours, linear 0-1 RGB."""

SHAPES: Final = ("circle", "square", "triangle", "cross", "ring", "diamond")
PLACES: Final = ("plain", "stripes", "checks", "dots", "waves")
"""Backgrounds: grey textures of low contrast, named as places in the questions."""

DIRECTIONS: Final = ("left", "right", "up", "down")
DEPTHS: Final = ("nearer", "farther")
DEPTH_ANSWERS: Final = (*DEPTHS, "same")
MOTIONS: Final = ("still", *DIRECTIONS, *DEPTHS)
RELATIONS: Final = ("left", "right", "above", "below")

FILE_FPS: Final = 8
"""Frames a second in the mp4 files; a grid that 2 fps sampling hits exactly."""
FRAME_SIZES_PX: Final = (64, 96, 128)
FRAME_SIZE_WEIGHTS: Final = (0.6, 0.2, 0.2)

SCENES_BY_LENGTH: Final = ((3, 1, 1), (6, 1, 2), (12, 2, 3), (24, 3, 5), (48, 4, 6), (96, 5, 7))
"""Rows (longest length in seconds, fewest scenes, most scenes)."""
SCENES_BEYOND: Final = (6, 8)
MIN_SCENE_S: Final = 2
DISSOLVE_SHARE: Final = 0.3
"""Share of scene changes that are half-second dissolves; the others are hard cuts."""

MAX_OBJECTS: Final = len(COLOURS)
"""Objects in one video; each has a colour of its own, so a colour names one object."""
EXTRA_OBJECT_SHARE: Final = 0.3
"""Share of scenes with a second object."""
PARTIAL_VISIT_SHARE: Final = 0.5
"""Share of objects that enter after their scene starts or leave before it ends."""
RADII: Final = (0.14, 0.17, 0.20)
RADIUS_FAR: Final = 0.10
RADIUS_NEAR: Final = 0.24
JOURNEY: Final = (0.25, 0.75)
"""Where moving objects start and end along their axis."""
STATIONS: Final = (0.25, 0.375, 0.5, 0.625, 0.75)
"""Coordinates where objects rest and journeys start and end (`main` and `ego` videos)."""
LANES: Final = (0.25, 0.75)
"""Where two objects of one scene keep to."""

FLASHES: Final = (1, 2, 3, 4)
FLASH_S: Final = (0.5, 1.0)
"""Durations; the shorter is one frame at 2 fps, and both vanish under sparser sampling."""
FLASH_BORDER: Final = 0.06
"""Width of the flashing frame, in picture widths."""
FLASH_GAP_S: Final = 1.0

SPATIAL_OBJECTS: Final = (2, 4)
SPATIAL_SCENES: Final = 2
"""Scenes of a spatial video at most, so that four objects each have a colour of their own."""
SPATIAL_RADIUS: Final = (0.11, 0.13)
SPATIAL_TENTHS: Final = (3, 4, 5, 6, 7)
"""Distances asked about, in tenths of the picture width."""
SPATIAL_GAP: Final = 0.27

EGO_LEAD: Final = 0.15
"""The place with most time leads the second by at least this share of the video."""
EGO_SWAY: Final = 0.05
"""Amplitude of the head-mounted camera's sway, in picture widths."""

OPTIONS: Final = 4
"""Answer options, except where the question names fewer (depth) or all places (five)."""


def digest() -> str:
    """SHA-256 (16 hex digits) of the five source files that define the world."""
    here = Path(__file__).parent
    sha = hashlib.sha256()
    for name in ("difficulty.py", "scenes.py", "render.py", "questions.py", "suites.py"):
        sha.update((here / name).read_bytes())
    return sha.hexdigest()[:16]
