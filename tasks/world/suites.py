"""The scale world's suites: which videos, how long, what is asked; they mirror the paper's groups.

world_long ↔ Table 2's long-video rows, world_ego ↔ EgoSchema, world_short ↔ Table 3's motion
rows, world_grounding and world_spatial ↔ Table 4; world_manyq asks 15 questions of each video.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from internvideo3.tasks.world.questions import Question, questions
from internvideo3.tasks.world.scenes import Profile, VideoSpec, draw_video

Split = Literal["train", "validation", "test"]
SPLIT_STRIDE = 10**12
SPLIT_BASE: Mapping[Split, int] = {
    "train": 0,
    "validation": SPLIT_STRIDE,
    "test": 2 * SPLIT_STRIDE,
}
"""First seed of each split; a split has `SPLIT_STRIDE` seeds, so no two ever share a video."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A suite's recipe."""

    name: str
    profile: Profile
    families: tuple[str, ...]
    """Asked in this order, repeated until a video has its questions."""
    lengths: Mapping[int, float]
    """Video length in seconds → share of the videos."""
    videos: int
    questions_per_video: int
    """At most; short videos carry fewer."""
    metric: Literal["accuracy", "mIoU", "score"]
    seed_block: int
    """Which block of a million seeds of its split the suite draws from."""


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            name="world_long",
            profile="main",
            families=("needle", "order", "count", "attime"),
            lengths={16: 0.4, 32: 0.3, 64: 0.2, 120: 0.1},
            videos=500,
            questions_per_video=5,
            metric="accuracy",
            seed_block=0,
        ),
        Suite(
            name="world_ego",
            profile="ego",
            families=("holistic", "ends", "whereabouts"),
            lengths={16: 0.5, 32: 0.25, 64: 0.15, 120: 0.1},
            videos=500,
            questions_per_video=5,
            metric="accuracy",
            seed_block=1,
        ),
        Suite(
            name="world_short",
            profile="main",
            families=("motion", "depth", "shape", "colour"),
            lengths={2: 0.1, 4: 0.3, 8: 0.4, 16: 0.2},
            videos=800,
            questions_per_video=5,
            metric="accuracy",
            seed_block=2,
        ),
        Suite(
            name="world_grounding",
            profile="main",
            families=("ground_flash", "ground_object", "ground_object", "ground_object"),
            lengths={8: 0.3, 16: 0.4, 32: 0.2, 64: 0.1},
            videos=700,
            questions_per_video=4,
            metric="mIoU",
            seed_block=3,
        ),
        Suite(
            name="world_spatial",
            profile="spatial",
            families=("relation", "distance", "objects"),
            lengths={2: 0.2, 4: 0.4, 8: 0.4},
            videos=700,
            questions_per_video=4,
            metric="score",
            seed_block=4,
        ),
        Suite(
            name="world_manyq",
            profile="main",
            families=(
                "needle", "order", "count", "attime", "whereabouts", "shape", "colour",
                "motion", "depth", "ground_object",
            ),
            lengths={120: 1.0},
            videos=200,
            questions_per_video=15,
            metric="score",
            seed_block=5,
        ),
    )
}  # fmt: skip


def video_seed(suite: Suite, split: Split, index: int) -> int:
    """Seed of the index-th video of a suite in a split."""
    return SPLIT_BASE[split] + suite.seed_block * 10**6 + index


def draw_suite(
    suite: Suite, split: Split = "test", limit_videos: int | None = None
) -> Iterator[tuple[VideoSpec, list[Question]]]:
    """The suite's videos in order, each with its questions; no pixels.

    A limit takes the first videos; lengths are dealt out so that every prefix has about the
    declared mix.
    """
    count = suite.videos if limit_videos is None else min(limit_videos, suite.videos)
    lengths = deal_lengths(suite)
    for index in range(count):
        seed = video_seed(suite, split, index)
        spec = draw_video(seed, lengths[index], suite.profile)
        rng = random.Random(f"questions/{seed}")
        yield spec, questions(spec, rng, suite.families, suite.questions_per_video)


def deal_lengths(suite: Suite) -> list[int]:
    """Length of every video: at each step the length that is furthest behind its share."""
    dealt = dict.fromkeys(suite.lengths, 0)
    order = []
    for index in range(suite.videos):
        length = max(suite.lengths, key=lambda s: suite.lengths[s] * (index + 1) - dealt[s])
        dealt[length] += 1
        order.append(length)
    return order
