"""What happens in a video of the scale world: drawn from a seed, no pixels yet.

Times are seconds; every boundary (scene, entry, exit, start of a flash) is a whole second, so that
a question's answer is known by construction and 2 fps sampling can see it.
Positions are picture widths, origin top left, y down.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from internvideo3.tasks.world import difficulty as d

Profile = Literal["main", "ego", "spatial"]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what it is, when it is visible, and how it moves while it is."""

    colour: str
    shape: str
    motion: str
    enter_s: float
    leave_s: float
    start_xy: tuple[float, float]
    end_xy: tuple[float, float]
    start_radius: float
    end_radius: float

    @property
    def name(self) -> str:
        """Colour and shape, as questions name it."""
        return f"{self.colour} {self.shape}"

    def state(self, time_s: float) -> tuple[float, float, float]:
        """Centre x, centre y and radius at a time, held constant outside the visit."""
        share = (time_s - self.enter_s) / (self.leave_s - self.enter_s)
        share = min(max(share, 0.0), 1.0)
        x, y = (a + (b - a) * share for a, b in zip(self.start_xy, self.end_xy, strict=True))
        return x, y, self.start_radius + (self.end_radius - self.start_radius) * share


@dataclass(frozen=True, slots=True)
class Scene:
    """A stretch of one place between two changes."""

    start_s: float
    end_s: float
    place: str
    brightness: float
    dissolve_in: bool
    things: tuple[Thing, ...]


@dataclass(frozen=True, slots=True)
class Flash:
    """A coloured frame around the picture for `[start_s, end_s)`."""

    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """A whole video. Equal seeds, lengths and profiles give equal specs."""

    seed: int
    profile: Profile
    length_s: float
    size_px: int
    scenes: tuple[Scene, ...]
    flash_colour: str
    flashes: tuple[Flash, ...]
    sway_phase: float

    @property
    def things(self) -> tuple[Thing, ...]:
        """All objects in order of entry."""
        found = [thing for scene in self.scenes for thing in scene.things]
        return tuple(sorted(found, key=lambda thing: thing.enter_s))

    def sway(self, time_s: float) -> tuple[float, float]:
        """Camera offset (x, y) at a time; zero unless the profile is `ego`."""
        if self.profile != "ego":
            return 0.0, 0.0
        phase = self.sway_phase
        return (
            d.EGO_SWAY * math.sin(2.1 * time_s + phase),
            d.EGO_SWAY * math.sin(2.9 * time_s + 2 * phase),
        )


def draw_video(seed: int, length_s: float, profile: Profile = "main") -> VideoSpec:
    """Draw the video of a seed.

    Args:
        seed: Any integer; equal arguments give equal videos.
        length_s: Length in whole seconds, at least 2.
        profile: `main` (one or two objects a scene), `ego` (swaying camera, one place leads) or
            `spatial` (two to four resting objects a scene).

    Raises:
        ValueError: If the length is not a whole number of seconds of at least 2.
    """
    if length_s < d.MIN_SCENE_S or length_s != int(length_s):
        raise ValueError(f"length_s must be a whole number of seconds >= 2, got {length_s}")
    rng = random.Random(f"{seed}/{length_s:g}/{profile}")
    cuts = _draw_cuts(rng, int(length_s), d.SPATIAL_SCENES if profile == "spatial" else None)
    spans = list(zip(cuts[:-1], cuts[1:], strict=True))
    places = _draw_places(rng, spans, profile)
    groups = _draw_spatial(rng, spans) if profile == "spatial" else _draw_things(rng, spans)
    scenes = tuple(
        Scene(
            start_s=float(start),
            end_s=float(end),
            place=place,
            brightness=rng.uniform(0.13, 0.24),
            dissolve_in=index > 0 and rng.random() < d.DISSOLVE_SHARE,
            things=tuple(things),
        )
        for index, ((start, end), place, things) in enumerate(
            zip(spans, places, groups, strict=True)
        )
    )
    return VideoSpec(
        seed=seed,
        profile=profile,
        length_s=float(length_s),
        size_px=rng.choices(d.FRAME_SIZES_PX, d.FRAME_SIZE_WEIGHTS)[0],
        scenes=scenes,
        flash_colour=rng.choice(tuple(d.COLOURS)),
        flashes=_draw_flashes(rng, int(length_s)),
        sway_phase=rng.uniform(0.0, 6.28),
    )


def _draw_cuts(rng: random.Random, length_s: int, most: int | None) -> list[int]:
    low, high = next(
        ((low, high) for top, low, high in d.SCENES_BY_LENGTH if length_s <= top), d.SCENES_BEYOND
    )
    high = min(high, length_s // d.MIN_SCENE_S, most or high)
    count = rng.randint(min(low, high), high)
    spare = length_s - d.MIN_SCENE_S * count
    extra = sorted(rng.randint(0, spare) for _ in range(count - 1))
    return [0, *(d.MIN_SCENE_S * (i + 1) + e for i, e in enumerate(extra)), length_s]


def _draw_places(
    rng: random.Random, spans: Sequence[tuple[int, int]], profile: Profile
) -> list[str]:
    if profile != "ego":
        return _no_repeats(rng, len(spans))
    while True:
        places = [rng.choice(d.PLACES) for _ in spans]
        times = seconds_by_place(spans, places)
        ranked = sorted(times.values(), reverse=True) + [0.0]
        if ranked[0] - ranked[1] >= d.EGO_LEAD * spans[-1][1]:
            # The draw above favours no place; the relabelling makes that exact.
            relabel = dict(zip(d.PLACES, rng.sample(d.PLACES, len(d.PLACES)), strict=True))
            return [relabel[place] for place in places]


def _no_repeats(rng: random.Random, count: int) -> list[str]:
    """Places in which neighbours differ, so that every cut shows."""
    places = [rng.choice(d.PLACES)]
    while len(places) < count:
        places.append(rng.choice([place for place in d.PLACES if place != places[-1]]))
    return places


def seconds_by_place(
    spans: Sequence[tuple[float, float]], places: Sequence[str]
) -> dict[str, float]:
    """Total seconds of each place that occurs."""
    times: dict[str, float] = {}
    for (start, end), place in zip(spans, places, strict=True):
        times[place] = times.get(place, 0.0) + end - start
    return times


def _draw_things(rng: random.Random, spans: Sequence[tuple[int, int]]) -> list[list[Thing]]:
    colours = rng.sample(tuple(d.COLOURS), d.MAX_OBJECTS)
    spare = d.MAX_OBJECTS - len(spans)
    groups = []
    for start, end in spans:
        extra = spare > 0 and rng.random() < d.EXTRA_OBJECT_SHARE
        spare -= extra
        motions = [rng.choice(d.MOTIONS) for _ in range(1 + extra)]
        lanes = rng.sample(d.LANES, 1 + extra)
        groups.append(
            [
                _draw_thing(rng, colours.pop(), motion, lane if extra else None, (start, end))
                for motion, lane in zip(motions, lanes, strict=True)
            ]
        )
    return groups


def _draw_thing(
    rng: random.Random, colour: str, motion: str, lane: float | None, span: tuple[int, int]
) -> Thing:
    """One object; with a lane (two objects a scene) it keeps to that half of the picture."""
    enter, leave = _draw_visit(rng, span)
    x, y = rng.choice(d.STATIONS), rng.choice(d.STATIONS)
    start_radius = end_radius = rng.choice(d.RADII)
    first, last = d.JOURNEY
    if motion in ("left", "right"):
        y = y if lane is None else lane
        start, end = (first, y), (last, y)
    elif motion in ("up", "down"):
        x = x if lane is None else lane
        start, end = (x, first), (x, last)
    else:
        x = x if lane is None else lane
        start = end = (x, y)
    if motion in ("left", "up"):
        start, end = end, start
    if motion in d.DEPTHS:
        start_radius, end_radius = d.RADIUS_FAR, d.RADIUS_NEAR
    if motion == "farther":
        start_radius, end_radius = end_radius, start_radius
    shape = rng.choice(d.SHAPES)
    return Thing(
        colour, shape, motion, float(enter), float(leave), start, end, start_radius, end_radius
    )


def _draw_visit(rng: random.Random, span: tuple[int, int]) -> tuple[int, int]:
    start, end = span
    if end - start <= d.MIN_SCENE_S or rng.random() >= d.PARTIAL_VISIT_SHARE:
        return start, end
    enter = rng.randint(start, end - d.MIN_SCENE_S)
    return enter, rng.randint(enter + d.MIN_SCENE_S, end)


def _draw_spatial(rng: random.Random, spans: Sequence[tuple[int, int]]) -> list[list[Thing]]:
    """Two to four resting objects a scene; the first two are at a drawn distance and relation."""
    colours = rng.sample(tuple(d.COLOURS), d.MAX_OBJECTS)
    groups = []
    for span in spans:
        count = rng.randint(*d.SPATIAL_OBJECTS)
        shapes = rng.sample(d.SHAPES, count)
        centres = _draw_centres(rng, count)
        groups.append(
            [
                _resting(rng, colours.pop(), shape, xy, span)
                for shape, xy in zip(shapes, centres, strict=True)
            ]
        )
    return groups


def _resting(
    rng: random.Random, colour: str, shape: str, xy: tuple[float, float], span: tuple[int, int]
) -> Thing:
    radius = rng.uniform(*d.SPATIAL_RADIUS)
    start, end = span
    return Thing(colour, shape, "still", float(start), float(end), xy, xy, radius, radius)


def _draw_centres(rng: random.Random, count: int) -> list[tuple[float, float]]:
    # Relation and distance are drawn before the rejection loop: rejecting them too would favour
    # short distances, and a text-only guess would beat chance.
    relation = rng.choice(d.RELATIONS)
    along = rng.choice(d.SPATIAL_TENTHS) / 10
    while True:
        centres = _place_pair(rng, relation, along + rng.uniform(-0.03, 0.03))
        for _ in range(40):
            if len(centres) == count:
                return centres
            xy = (rng.uniform(0.13, 0.87), rng.uniform(0.13, 0.87))
            if all(math.dist(xy, other) >= d.SPATIAL_GAP for other in centres):
                centres.append(xy)


def _place_pair(rng: random.Random, relation: str, along: float) -> list[tuple[float, float]]:
    """Two centres inside the picture, the first in the given relation to the second."""
    while True:
        angle = rng.uniform(-0.45, 0.45)  # radians off the axis: the relation stays plain
        step = (along * math.cos(angle), along * math.sin(angle))
        if relation in ("above", "below"):
            step = (step[1], step[0])
        if relation in ("left", "above"):
            step = (-step[0], -step[1])
        second = (rng.uniform(0.13, 0.87), rng.uniform(0.13, 0.87))
        first = (second[0] + step[0], second[1] + step[1])
        if all(0.13 <= value <= 0.87 for value in first):
            return [first, second]


def _draw_flashes(rng: random.Random, length_s: int) -> tuple[Flash, ...]:
    """One to four flashes, the count uniform where the length allows it."""
    most = min(d.FLASHES[-1], max(1, length_s // 4))
    count = rng.randint(d.FLASHES[0], most)
    flashes: list[Flash] = []
    while len(flashes) < count:
        duration = rng.choice(d.FLASH_S)
        start = float(rng.randint(0, length_s - 1))
        gap = d.FLASH_GAP_S
        if all(start >= f.end_s + gap or start + duration + gap <= f.start_s for f in flashes):
            flashes.append(Flash(start, start + duration))
    return tuple(sorted(flashes, key=lambda flash: flash.start_s))
