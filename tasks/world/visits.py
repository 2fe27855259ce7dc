"""Videos whose objects stay for a moment only: `world_brief` (tasks/brief.py)."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

from internvideo3.tasks.world.scenes import Profile, Scene, VideoSpec, draw_video


def draw(seed: int, length_s: float, profile: Profile, visit_s: float | None) -> VideoSpec:
    """The world's video of a seed, with every visit cut down to `visit_s` within its scene.

    Args:
        seed: As `draw_video`, like the next two.
        length_s: Whole seconds.
        profile: Kind of video.
        visit_s: How long an object is on screen; None for as long as the world has it.
    """
    spec = draw_video(seed, length_s, profile)
    if visit_s is None:
        return spec
    rng = random.Random(f"brief/{seed}")
    return replace(spec, scenes=tuple(_shortened(scene, visit_s, rng) for scene in spec.scenes))


def _shortened(scene: Scene, visit_s: float, rng: random.Random) -> Scene:
    # Not the first second of a scene: the one before may still shine through.
    first, last = int(scene.start_s) + 1, int(scene.end_s - visit_s)
    starts = [float(rng.randint(min(first, last), last)) for _ in scene.things]
    things = (
        replace(thing, enter_s=start, leave_s=start + visit_s)
        for thing, start in zip(scene.things, starts, strict=True)
    )
    return replace(scene, things=tuple(things))


def digest() -> str:
    """SHA-256 (16 hex digits) of this file, as `difficulty.digest` has the world's."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
