"""Training batches of the scale world, drawn from seeds without touching a disk.

One row is one video and many questions. Every question continues the video directly (own
positions, and attention that hides the other questions), which is what evaluation does with one
fork per question, so a video's tokens are paid once for a dozen supervised answers.

Letters: B videos, P prefix tokens, Q questions of a video, L tokens of a question (padded),
F = B times the seconds of a video, K = 16 patches of a second, V values of a patch.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from internvideo3.model.scale.build import SYSTEM_PROMPT
from internvideo3.tasks.world.questions import Question, draw_question, span_text
from internvideo3.tasks.world.scenes import Profile, VideoSpec, draw_video
from internvideo3.tasks.world.suites import SPLIT_BASE, SPLIT_STRIDE, Split
from internvideo3.training.scale.pixels import sampled_times, training_patches
from internvideo3.training.scale.scene_heads import Truth, join_truth, scene_truth

TOKENS_PER_SECOND = 4
IGNORE = -100
QUESTIONS = 14
QUESTION_TOKENS = 32
"""A question, its options and answer in tokens, at most; longer draws are left out."""

PROFILE_SHARES: Mapping[Profile, float] = {"main": 0.68, "ego": 0.14, "spatial": 0.18}
FamilyShares = Mapping[Profile, Mapping[str, float]]
PROFILE_FAMILIES: FamilyShares = {
    "main": {
        "needle": 0.7, "order": 2.0, "count": 1.0, "attime": 2.0, "whereabouts": 0.4,
        "motion": 2.0, "depth": 2.0, "shape": 0.7, "colour": 1.5, "ground_object": 2.0,
        "ground_flash": 1.3, "holistic": 0.3, "describe": 1.5,
    },
    "ego": {
        "holistic": 1.0, "ends": 1.0, "whereabouts": 1.0, "ground_object": 0.5, "describe": 0.5,
    },
    "spatial": {
        "relation": 2.5, "distance": 1.5, "objects": 0.7, "shape": 0.3, "colour": 0.3,
        "locate": 2.0,
    },
}  # fmt: skip
"""How often each family is tried; several questions of one family about one video are usual."""

FAMILY_NAMES: tuple[str, ...] = (
    "needle", "order", "count", "attime", "holistic", "ends", "whereabouts", "motion", "depth",
    "shape", "colour", "ground_object", "ground_flash", "relation", "distance", "objects",
    "describe", "locate",
)  # fmt: skip
TRAINING_ONLY = frozenset({"describe", "locate"})
"""Families that no suite asks: steps towards those that are asked."""


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """What the curriculum turns: lengths, and how many options a look-up offers."""

    lengths: Mapping[int, float]
    """Video length in seconds → share of batches."""
    easy_share: float
    """Share of order and at-time questions with two or three options instead of four."""
    profiles: Mapping[Profile, float] = field(default_factory=lambda: PROFILE_SHARES)
    """Share of each kind of video."""
    families: FamilyShares = field(default_factory=lambda: PROFILE_FAMILIES)
    """How often each family is tried, by kind of video."""


class Batch(NamedTuple):
    """One batch; all its videos have the same length and so the same prefix ids."""

    prefix_ids_P: Tensor
    prefix_positions_3P: Tensor
    patches_FKV: Tensor
    """Pixels of every second of every video, as the vision tower takes them."""
    truth: Truth
    """What each second shows, for the dense heads."""
    ids_BQL: Tensor
    labels_BQL: Tensor
    """Next-token labels (already shifted), `IGNORE` outside answers."""
    weight_BQL: Tensor
    """1/sqrt of the answer's tokens, as the released SFT weighs."""
    family_BQ: Tensor
    """Index into `FAMILY_NAMES`, -1 where a row has fewer questions."""


@dataclass
class RowWriter:
    """Builds token rows; holds the tokenizer and what it said before."""

    tokenizer: PreTrainedTokenizerBase
    known: dict[str, list[int]] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        if len(self.known) > 20_000:
            self.known.clear()
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]

    def video_prefix(self, length_s: int) -> tuple[list[int], NDArray[np.int64]]:
        """Ids `[P]` and positions `[3,P]` from the system prompt to the end of the video."""
        head = self.ids(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n")
        ids = [*head, *self.ids("<|vision_start|>")]
        positions = [[p] * 3 for p in range(len(ids))]
        for time_s in patch_times(length_s):
            stamp = self.ids(f"<{time_s:.1f} seconds>") + self.ids("<|vision_start|>")
            start = positions[-1][0] + 1
            ids += stamp
            positions += [[start + p] * 3 for p in range(len(stamp))]
            start += len(stamp)
            ids += self.ids("<|video_pad|>") * TOKENS_PER_SECOND
            positions += [[start, start + h, start + w] for h in (0, 1) for w in (0, 1)]
            ids += self.ids("<|vision_end|>")
            positions.append([start + 2] * 3)
        ids += self.ids("<|vision_end|>")
        positions.append([positions[-1][0] + 1] * 3)
        return ids, np.array(positions).T

    def question(self, drawn: Question) -> tuple[list[int], int]:
        """Ids from the question to the end of the answer, and how many of them are the answer."""
        asked = self.ids(drawn.prompt) + self.ids("<|im_end|>\n<|im_start|>assistant\n")
        said = [*self.ids(answer_text(drawn)), *self.ids("<|im_end|>")]
        return asked + said, len(said)


def patch_times(length_s: int) -> list[float]:
    """Timestamp of each temporal patch: the mean of its two frames' times."""
    times = sampled_times(length_s)
    return [float(time) for time in (times[0::2] + times[1::2]) / 2]


def answer_text(drawn: Question) -> str:
    """The answer as the model writes it: words share their token with the options' words."""
    return drawn.answer if drawn.answer[0].isdigit() else f" {drawn.answer}"


def describe(spec: VideoSpec, rng: random.Random) -> Question:
    """Training only: all that is known of one object, a chain of look-ups in one answer."""
    scene, thing = rng.choice([(scene, t) for scene in spec.scenes for t in scene.things])
    text = f"Describe the {thing.colour} object."
    if rng.random() < 0.5:
        text = f"Describe the object at {rng.randint(int(thing.enter_s), int(thing.leave_s) - 1)}."
    span = span_text(thing.enter_s, thing.leave_s)
    answer = f" {thing.name} {thing.motion} {scene.place}\n{span}"
    return Question("describe", text, None, answer, "span", ())


def locate(spec: VideoSpec, rng: random.Random) -> Question:
    """Training only: where a resting object is; relation and distance need two such look-ups."""
    thing = rng.choice(spec.things)
    x, y = (round(10 * value) for value in thing.start_xy)
    text = f"Where is the {thing.name}, in tenths of the picture width?"
    return Question("locate", text, None, f"{x} {y}", "number", ())


def draw_training_question(
    spec: VideoSpec, rng: random.Random, family: str, options: int
) -> Question | None:
    """A question of any family, asked by a suite or only here; None where the video has none."""
    if family == "describe":
        return describe(spec, rng)
    if family == "locate":
        return locate(spec, rng)
    return draw_question(spec, rng, family, options)


def draw_questions(
    writer: RowWriter, spec: VideoSpec, rng: random.Random, difficulty: Difficulty
) -> list[tuple[list[int], int, int]]:
    """At most `QUESTIONS` questions of one video: (ids, answer tokens, family index)."""
    shares = difficulty.families[spec.profile]
    rows: list[tuple[list[int], int, int]] = []
    asked: set[str] = set()
    for family in rng.choices(list(shares), list(shares.values()), k=2 * QUESTIONS):
        easy = rng.random() < difficulty.easy_share
        options = rng.choice((2, 3)) if easy else 4
        drawn = draw_training_question(spec, rng, family, options)
        if drawn is None or drawn.prompt in asked:
            continue
        asked.add(drawn.prompt)
        ids, said = writer.question(drawn)
        if len(ids) <= QUESTION_TOKENS:
            rows.append((ids, said, FAMILY_NAMES.index(family)))
        if len(rows) == QUESTIONS:
            break
    return rows


def make_batch(
    writer: RowWriter,
    seeds: Sequence[int],
    length_s: int,
    difficulty: Difficulty,
    noisy: bool = True,
) -> Batch:
    """One batch: a video of `length_s` seconds for every seed."""
    prefix, prefix_3P = writer.video_prefix(length_s)
    shape = (len(seeds), QUESTIONS, QUESTION_TOKENS)
    ids_BQL = torch.zeros(shape, dtype=torch.long)
    labels_BQL = torch.full(shape, IGNORE)
    weight_BQL = torch.zeros(shape)
    family_BQ = torch.full(shape[:2], -1)
    patches, truths = [], []
    for b, seed in enumerate(seeds):
        rng = random.Random(f"row/{seed}")
        kind = rng.choices(list(difficulty.profiles), list(difficulty.profiles.values()))[0]
        spec = draw_video(seed, length_s, kind)
        patches.append(training_patches(spec, np.random.default_rng(seed) if noisy else None))
        truths.append(scene_truth(spec))
        for q, (ids, said, family) in enumerate(draw_questions(writer, spec, rng, difficulty)):
            end = len(ids)
            ids_BQL[b, q, :end] = torch.tensor(ids)
            labels_BQL[b, q, end - said - 1 : end - 1] = torch.tensor(ids[-said:])
            weight_BQL[b, q, end - said - 1 : end - 1] = said**-0.5
            family_BQ[b, q] = family
    return Batch(
        torch.tensor(prefix), torch.from_numpy(prefix_3P), torch.cat(patches), join_truth(truths),
        ids_BQL, labels_BQL, weight_BQL, family_BQ,
    )  # fmt: skip


def seed_stream(split: Split, start: int, count: int) -> range:
    """Seeds of one batch. Training uses the upper half of its split; suites use the lower."""
    first = SPLIT_BASE[split] + SPLIT_STRIDE // 2 + start
    return range(first, first + count)


def rows_for(length_s: int, batch_tokens: int) -> int:
    """Videos in a batch of about `batch_tokens` tokens."""
    return max(1, round(batch_tokens / (9 * length_s + 16 + QUESTIONS * QUESTION_TOKENS)))
