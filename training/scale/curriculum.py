"""What the scale model sees when: short before long, two options before four.

Four curricula: `base` from random weights, `late` for what validation then shows unlearnt,
`final`, the end of `late` unchanged, for the equal extra training of base and conversion, and
`teacher`, for a deeper model that starts where that ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from internvideo3.tasks.world.scenes import Profile
from internvideo3.training.scale.batches import (
    PROFILE_FAMILIES,
    PROFILE_SHARES,
    Difficulty,
    FamilyShares,
)


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A part of training with one mixture of lengths."""

    until: float
    """Share of all steps at which the stretch ends."""
    lengths: Mapping[int, float]
    easy_share: float
    profiles: Mapping[Profile, float] = field(default_factory=lambda: PROFILE_SHARES)
    families: FamilyShares = field(default_factory=lambda: PROFILE_FAMILIES)


MORE_SPATIAL: Mapping[Profile, float] = {"main": 0.52, "ego": 0.10, "spatial": 0.38}
"""From the third stretch on: at step 2400 of 7000 validation showed relation, distance and locate
at chance and the families of the other videos learned or rising."""

ALL_LENGTHS: Mapping[int, float] = {
    2: 0.08, 4: 0.17, 8: 0.26, 16: 0.25, 32: 0.14, 64: 0.06, 120: 0.04,
}  # fmt: skip

BASE: tuple[Stretch, ...] = (
    Stretch(until=0.07, lengths={2: 0.4, 4: 0.6}, easy_share=1.0),
    Stretch(until=0.20, lengths={2: 0.15, 4: 0.4, 8: 0.45}, easy_share=0.7),
    Stretch(until=0.40, lengths={2: 0.1, 4: 0.25, 8: 0.4, 16: 0.25}, easy_share=0.4),
    Stretch(
        until=0.65,
        lengths={2: 0.08, 4: 0.2, 8: 0.3, 16: 0.27, 32: 0.15},
        easy_share=0.2,
        profiles=MORE_SPATIAL,
    ),
    Stretch(
        until=1.0,
        lengths=ALL_LENGTHS,
        easy_share=0.1,
        profiles=MORE_SPATIAL,
    ),
)

UNLEARNT: FamilyShares = {
    "main": {
        "needle": 0.5, "order": 4.0, "count": 1.0, "attime": 4.0, "whereabouts": 0.3,
        "motion": 1.0, "depth": 1.0, "shape": 0.5, "colour": 1.0, "ground_object": 3.0,
        "ground_flash": 2.0, "holistic": 0.4, "describe": 1.5,
    },
    "ego": PROFILE_FAMILIES["ego"],
    "spatial": {
        "relation": 4.0, "distance": 1.5, "objects": 0.5, "shape": 0.2, "colour": 0.2,
        "locate": 3.0,
    },
}  # fmt: skip
"""After 7000 steps needle, shape, depth, motion and colour were at .97-1.0 and order, at-time,
grounding and relations below .4 on validation."""

LATE: tuple[Stretch, ...] = (
    Stretch(
        until=0.4,
        lengths={2: 0.3, 4: 0.25, 8: 0.2, 16: 0.15, 32: 0.1},
        easy_share=0.4,
        profiles={"main": 0.48, "ego": 0.07, "spatial": 0.45},
        families=UNLEARNT,
    ),
    Stretch(
        until=1.0,
        lengths=ALL_LENGTHS,
        easy_share=0.1,
        profiles=MORE_SPATIAL,
        families=UNLEARNT,
    ),
)

HARDEST: FamilyShares = {
    "main": {
        "needle": 0.5, "order": 4.0, "count": 1.5, "attime": 6.0, "whereabouts": 0.3,
        "motion": 0.7, "depth": 0.7, "shape": 0.3, "colour": 0.7, "ground_object": 4.0,
        "ground_flash": 4.0, "holistic": 0.4, "describe": 1.5,
    },
    "ego": PROFILE_FAMILIES["ego"],
    "spatial": {
        "relation": 2.0, "distance": 3.0, "objects": 1.0, "shape": 0.2, "colour": 0.2,
        "locate": 3.0,
    },
}  # fmt: skip
"""On validation `scale:control` answers questions about a moment at .60, flashes at .30, objects
at .51 and videos of 64 s at .65, and what has a small share here at .9 and more."""

TEACHER: tuple[Stretch, ...] = (
    Stretch(
        until=1.0,
        lengths={2: 0.04, 4: 0.10, 8: 0.20, 16: 0.27, 32: 0.22, 64: 0.11, 120: 0.06},
        easy_share=0.05,
        profiles={"main": 0.62, "ego": 0.06, "spatial": 0.32},
        families=HARDEST,
    ),
)

CURRICULA: Mapping[str, tuple[Stretch, ...]] = {
    "base": BASE, "late": LATE, "final": LATE[-1:], "teacher": TEACHER,
}  # fmt: skip


def difficulty_at(curriculum: str, done: float) -> Difficulty:
    """The mixture of a curriculum after a share of its steps (0-1)."""
    stretches = CURRICULA[curriculum]
    stretch = next((s for s in stretches if done < s.until), stretches[-1])
    return Difficulty(
        lengths=stretch.lengths,
        easy_share=stretch.easy_share,
        profiles=stretch.profiles,
        families=stretch.families,
    )


def learning_rate_factor(step: int, steps: int, warmup: int, decay_share: float = 0.35) -> float:
    """Warm-up, plateau, then linear decay to 2 % over the last `decay_share` of the steps."""
    rise = min(1.0, (step + 1) / warmup)
    left = (steps - step) / max(1.0, decay_share * steps)
    return rise * max(0.02, min(1.0, left))
