"""What the scale model sees when: short before long, two options before four."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from internvideo3.training.scale.batches import Difficulty


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A part of training with one mixture of lengths."""

    until: float
    """End of the stretch as a share of all steps."""
    lengths: Mapping[int, float]
    easy_share: float


STRETCHES: tuple[Stretch, ...] = (
    Stretch(until=0.12, lengths={2: 0.3, 4: 0.7}, easy_share=1.0),
    Stretch(until=0.30, lengths={4: 0.4, 8: 0.6}, easy_share=0.8),
    Stretch(until=0.50, lengths={4: 0.2, 8: 0.5, 16: 0.3}, easy_share=0.5),
    Stretch(until=0.70, lengths={2: 0.05, 4: 0.1, 8: 0.3, 16: 0.4, 32: 0.15}, easy_share=0.3),
    Stretch(
        until=1.01,
        lengths={2: 0.05, 4: 0.1, 8: 0.2, 16: 0.3, 32: 0.2, 64: 0.09, 120: 0.06},
        easy_share=0.1,
    ),
)


def difficulty_at(progress: float) -> Difficulty:
    """The mixture at a share of training in 0-1."""
    stretch = next(stretch for stretch in STRETCHES if progress < stretch.until)
    return Difficulty(lengths=stretch.lengths, easy_share=stretch.easy_share)


def learning_rate_factor(step: int, steps: int, warmup: int, decay_share: float = 0.35) -> float:
    """Warm-up, plateau, then linear decay to 2 % over the last `decay_share` of the steps."""
    rise = min(1.0, (step + 1) / warmup)
    left = (steps - step) / max(1.0, decay_share * steps)
    return rise * max(0.02, min(1.0, left))
