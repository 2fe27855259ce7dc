"""What the scale model sees when: short before long, two options before four."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from internvideo3.tasks.world.scenes import Profile
from internvideo3.training.scale.batches import PROFILE_SHARES, Difficulty


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A part of training with one mixture of lengths."""

    until: float
    """Share of all steps at which the stretch ends."""
    lengths: Mapping[int, float]
    easy_share: float
    profiles: Mapping[Profile, float] = field(default_factory=lambda: PROFILE_SHARES)


MORE_SPATIAL: Mapping[Profile, float] = {"main": 0.52, "ego": 0.10, "spatial": 0.38}
"""From the third stretch on: at step 2400 of 7000 validation showed relation, distance and locate
at chance and the families of the other videos learned or rising."""

STRETCHES: tuple[Stretch, ...] = (
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
        lengths={2: 0.08, 4: 0.17, 8: 0.26, 16: 0.25, 32: 0.14, 64: 0.06, 120: 0.04},
        easy_share=0.1,
        profiles=MORE_SPATIAL,
    ),
)


def difficulty_at(done: float) -> Difficulty:
    """The mixture after a share of base training (0-1); 1 gives the final one."""
    stretch = next((s for s in STRETCHES if done < s.until), STRETCHES[-1])
    return Difficulty(
        lengths=stretch.lengths, easy_share=stretch.easy_share, profiles=stretch.profiles
    )


def learning_rate_factor(step: int, steps: int, warmup: int, decay_share: float = 0.35) -> float:
    """Warm-up, plateau, then linear decay to 2 % over the last `decay_share` of the steps."""
    rise = min(1.0, (step + 1) / warmup)
    left = (steps - step) / max(1.0, decay_share * steps)
    return rise * max(0.02, min(1.0, left))
