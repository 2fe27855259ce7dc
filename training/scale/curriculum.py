"""What the scale model sees when: short before long, two options before four."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from internvideo3.training.scale.batches import Difficulty


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A part of training with one mixture of lengths."""

    until: int | None
    """First step after the stretch; None for the last one."""
    lengths: Mapping[int, float]
    easy_share: float
    late: bool = False
    """Whether `EMPHASIS` and the speed head apply."""
    token: bool = False
    """Whether the token head applies."""
    last: bool = False
    """Whether `LAST_EMPHASIS` replaces `EMPHASIS`."""


EMPHASIS: dict[str, float] = {
    "needle": 3.0, "motion": 2.0, "depth": 2.0, "order": 1.5, "attime": 1.5, "relation": 2.0,
    "distance": 2.0, "objects": 1.5, "ground_object": 1.5, "ground_flash": 2.0, "count": 1.5,
    "shape": 0.7, "whereabouts": 0.3, "holistic": 0.5, "ends": 0.5, "describe": 0.5,
}  # fmt: skip
"""Later training asks more of what validation showed as not learned at `STEP_REVIEW`."""
LAST_EMPHASIS: Mapping[str, float] = EMPHASIS | {
    "motion": 4.0, "depth": 4.0, "relation": 4.0, "distance": 3.0, "needle": 1.0, "count": 1.0,
    "shape": 0.5,
}  # fmt: skip
"""The same at `STEP_THIRD_REVIEW`, when most look-ups had been learned."""
STEP_REVIEW = 2438
STEP_SECOND_REVIEW = 3149
STEP_THIRD_REVIEW = 4818
"""Where the mixture and heads were changed after looking at validation; the run went on from
these states."""

STRETCHES: tuple[Stretch, ...] = (
    Stretch(until=552, lengths={2: 0.3, 4: 0.7}, easy_share=1.0),
    Stretch(until=1380, lengths={4: 0.4, 8: 0.6}, easy_share=0.8),
    Stretch(until=2300, lengths={4: 0.2, 8: 0.5, 16: 0.3}, easy_share=0.5),
    Stretch(
        until=STEP_REVIEW, lengths={2: 0.05, 4: 0.1, 8: 0.3, 16: 0.4, 32: 0.15}, easy_share=0.3
    ),
    Stretch(
        until=STEP_SECOND_REVIEW,
        lengths={2: 0.1, 4: 0.25, 8: 0.35, 16: 0.25, 32: 0.05},
        easy_share=0.4,
        late=True,
    ),
    Stretch(
        until=4300,
        lengths={2: 0.15, 4: 0.35, 8: 0.3, 16: 0.2},
        easy_share=0.5,
        late=True,
        token=True,
    ),
    Stretch(
        until=STEP_THIRD_REVIEW,
        lengths={2: 0.07, 4: 0.15, 8: 0.25, 16: 0.28, 32: 0.14, 64: 0.07, 120: 0.04},
        easy_share=0.15,
        late=True,
        token=True,
    ),
    Stretch(
        until=None,
        lengths={2: 0.09, 4: 0.2, 8: 0.28, 16: 0.24, 32: 0.11, 64: 0.05, 120: 0.03},
        easy_share=0.1,
        late=True,
        token=True,
        last=True,
    ),
)


def difficulty_at(step: int | None) -> Difficulty:
    """The mixture at a step of base training; the final one where the step is None."""
    stretch = STRETCHES[-1]
    if step is not None:
        stretch = next(s for s in STRETCHES if s.until is None or step < s.until)
    return Difficulty(
        lengths=stretch.lengths,
        easy_share=stretch.easy_share,
        emphasis=LAST_EMPHASIS if stretch.last else EMPHASIS if stretch.late else {},
        speed=stretch.late,
        token=stretch.token,
    )


def learning_rate_factor(step: int, steps: int, warmup: int, decay_share: float = 0.35) -> float:
    """Warm-up, plateau, then linear decay to 2 % over the last `decay_share` of the steps."""
    rise = min(1.0, (step + 1) / warmup)
    left = (steps - step) / max(1.0, decay_share * steps)
    return rise * max(0.02, min(1.0, left))
