"""Training batches of the scale world, drawn from seeds without touching a disk.

One row is one video and many questions. Every question continues the video directly (own
positions, and a mask that hides the other questions), which is what evaluation does with one fork
per question, so a video's tokens are paid once for a dozen supervised answers.

Letters: B videos, T tokens of a row, S seconds of video, N frames.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from internvideo3.model.scale.build import SYSTEM_PROMPT
from internvideo3.tasks.world.difficulty import FILE_FPS
from internvideo3.tasks.world.questions import draw_question, narration
from internvideo3.tasks.world.render import Tracks, tracks
from internvideo3.tasks.world.scenes import Profile, VideoSpec, draw_video
from internvideo3.tasks.world.suites import SPLIT_BASE, SPLIT_STRIDE, Split

TOKENS_PER_SECOND = 4
SAMPLE_FPS = 2
IGNORE = -100

ROW_TOKENS: Mapping[int, int] = {
    2: 384, 4: 448, 8: 576, 16: 704, 32: 896, 64: 1216, 120: 1728,
}  # fmt: skip
"""Tokens of a row by video length in seconds; questions fill what the video leaves."""

PROFILE_SHARES: Mapping[Profile, float] = {"main": 0.7, "ego": 0.12, "spatial": 0.18}
PROFILE_FAMILIES: Mapping[Profile, Mapping[str, float]] = {
    "main": {
        "needle": 0.5, "order": 2.0, "count": 0.8, "attime": 2.0, "whereabouts": 0.7,
        "motion": 1.2, "depth": 1.0, "shape": 1.0, "colour": 1.2, "ground_object": 2.0,
        "ground_flash": 1.0, "holistic": 0.3,
    },
    "ego": {"holistic": 1.0, "ends": 1.0, "whereabouts": 1.0, "ground_object": 0.5},
    "spatial": {"relation": 1.5, "distance": 1.0, "objects": 1.0, "shape": 0.5, "colour": 0.5},
}  # fmt: skip
"""How often each family is tried; several questions of one family about one video are usual."""


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """What the curriculum turns: lengths, and how many options a look-up offers."""

    lengths: Mapping[int, float]
    """Video length in seconds → share of batches."""
    easy_share: float
    """Share of order and at-time questions with two or three options instead of four."""
    narration_share: float
    """Share of rows that also carry the dense caption."""


class Batch(NamedTuple):
    """One batch as numpy arrays; `length_s` is the same for all its videos."""

    length_s: int
    shown: Tracks
    """Tracks of B·2S frames at 2 fps, in order."""
    input_ids_BT: NDArray[np.int64]
    position_ids_3BT: NDArray[np.int64]
    segment_BT: NDArray[np.int64]
    """0 for the video and what precedes it, 1.. for questions, -1 for padding."""
    labels_BT: NDArray[np.int64]
    """Next-token labels (already shifted), `IGNORE` outside answers."""
    weight_BT: NDArray[np.float32]
    family_BT: NDArray[np.int64]
    """Index into `FAMILY_NAMES` where a label stands."""


FAMILY_NAMES: tuple[str, ...] = (
    "needle", "order", "count", "attime", "holistic", "ends", "whereabouts", "motion", "depth",
    "shape", "colour", "ground_object", "ground_flash", "relation", "distance", "objects",
    "narration",
)  # fmt: skip


@dataclass
class RowWriter:
    """Builds token rows; holds the tokenizer and what it said before."""

    tokenizer: PreTrainedTokenizerBase
    known: dict[str, list[int]] = field(default_factory=dict)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        if len(self.known) > 50_000:
            self.known.clear()
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]

    def lines(self, text: str) -> list[int]:
        """Token ids of a text whose lines tokenise apart from each other."""
        parts = text.split("\n")
        ids = list(self.ids(parts[0]))
        for part in parts[1:]:
            ids += self.ids("\n")
            ids += self.ids(part) if part else []
        return ids

    def video_prefix(self, length_s: int) -> tuple[list[int], NDArray[np.int64]]:
        """Ids `[P]` and positions `[3,P]` from the system prompt to the end of the video."""
        head = self.lines(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n")
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

    def question(self, prompt: str, answer: str) -> tuple[list[int], int]:
        """Ids from the question to the end of the answer, and how many of them are the answer."""
        asked = self.lines(f"{prompt}<|im_end|>\n<|im_start|>assistant\n")
        said = [*self.lines(answer), *self.ids("<|im_end|>")]
        return asked + said, len(said)


def sampled_frames(length_s: int) -> NDArray[np.int64]:
    """File frame numbers that 2 fps sampling takes: evenly spaced, both ends included."""
    total = length_s * FILE_FPS
    return np.linspace(0, total - 1, length_s * SAMPLE_FPS).round().astype(np.int64)


def patch_times(length_s: int) -> list[float]:
    """Timestamp of each temporal patch: the mean of its two frames' times."""
    times = sampled_frames(length_s) / FILE_FPS
    return [float(time) for time in (times[0::2] + times[1::2]) / 2]


def answer_text(answer: str, answer_type: str) -> str:
    """The answer as the model writes it: option words share their token with the options."""
    return f" {answer}" if answer_type == "choice" and not answer.isdigit() else answer


def draw_row(
    writer: RowWriter, spec: VideoSpec, rng: random.Random, difficulty: Difficulty
) -> list[tuple[list[int], int, int]]:
    """Questions of one video: (ids, answer tokens, family index)."""
    length = int(spec.length_s)
    prefix, _ = writer.video_prefix(length)
    room = ROW_TOKENS[length] - len(prefix)
    rows: list[tuple[list[int], int, int]] = []
    if rng.random() < difficulty.narration_share:
        ids, said = writer.question("Describe the video.", narration(spec))
        if len(ids) <= room:
            rows.append((ids, said, len(FAMILY_NAMES) - 1))
            room -= len(ids)
    shares = PROFILE_FAMILIES[spec.profile]
    asked: set[str] = set()
    for family in rng.choices(list(shares), list(shares.values()), k=24):
        easy = rng.random() < difficulty.easy_share
        drawn = draw_question(spec, rng, family, rng.choice((2, 3)) if easy else 4)
        if drawn is None or drawn.prompt in asked:
            continue
        asked.add(drawn.prompt)
        ids, said = writer.question(drawn.prompt, answer_text(drawn.answer, drawn.answer_type))
        if len(ids) > room:
            break
        rows.append((ids, said, FAMILY_NAMES.index(family)))
        room -= len(ids)
    return rows


def make_batch(
    writer: RowWriter,
    seeds: Sequence[int],
    length_s: int,
    difficulty: Difficulty,
    profile: Profile | None = None,
) -> Batch:
    """One batch: a video of `length_s` seconds for every seed."""
    prefix, prefix_3P = writer.video_prefix(length_s)
    width = ROW_TOKENS[length_s]
    shape = (len(seeds), width)
    input_ids_BT = np.zeros(shape, dtype=np.int64)
    position_ids_3BT = np.zeros((3, *shape), dtype=np.int64)
    segment_BT = np.full(shape, -1, dtype=np.int64)
    labels_BT = np.full(shape, IGNORE, dtype=np.int64)
    weight_BT = np.zeros(shape, dtype=np.float32)
    family_BT = np.zeros(shape, dtype=np.int64)
    times_N = sampled_frames(length_s) / FILE_FPS
    shown = []
    first = int(prefix_3P.max()) + 1
    for b, seed in enumerate(seeds):
        rng = random.Random(f"row/{seed}")
        kind = profile or rng.choices(list(PROFILE_SHARES), list(PROFILE_SHARES.values()))[0]
        spec = draw_video(seed, length_s, kind)
        shown.append(tracks(spec, times_N))
        at = len(prefix)
        input_ids_BT[b, :at] = prefix
        position_ids_3BT[:, b, :at] = prefix_3P
        segment_BT[b, :at] = 0
        for number, (ids, said, family) in enumerate(draw_row(writer, spec, rng, difficulty)):
            end = at + len(ids)
            input_ids_BT[b, at:end] = ids
            position_ids_3BT[:, b, at:end] = first + np.arange(len(ids))
            segment_BT[b, at:end] = number + 1
            labels_BT[b, end - said - 1 : end - 1] = ids[-said:]
            weight_BT[b, end - said - 1 : end - 1] = said**-0.5
            family_BT[b, end - said - 1 : end - 1] = family
            at = end
    joined = Tracks(*(np.concatenate(parts) for parts in zip(*shown, strict=True)))
    return Batch(
        length_s, joined, input_ids_BT, position_ids_3BT, segment_BT, labels_BT, weight_BT,
        family_BT,
    )  # fmt: skip


def seed_stream(split: Split, start: int, count: int) -> range:
    """Seeds of one batch. Training uses the upper half of its split; suites use the lower."""
    first = SPLIT_BASE[split] + SPLIT_STRIDE // 2 + start
    return range(first, first + count)


def rows_for(length_s: int, batch_tokens: int) -> int:
    """Videos in a batch of about `batch_tokens` tokens."""
    return max(1, batch_tokens // ROW_TOKENS[length_s])


def batches(
    tokenizer: PreTrainedTokenizerBase,
    steps: Sequence[int],
    difficulty_at: Mapping[int, Difficulty],
    batch_tokens: int,
    seed: int,
) -> Iterator[tuple[int, Batch]]:
    """The batches of the given step numbers; each depends on its step and the seed only."""
    writer = RowWriter(tokenizer)
    for step in steps:
        difficulty = difficulty_at[step]
        rng = random.Random(f"batch/{seed}/{step}")
        length = rng.choices(list(difficulty.lengths), list(difficulty.lengths.values()))[0]
        seeds = seed_stream("train", (seed * 10**6 + step) * 1024, rows_for(length, batch_tokens))
        yield step, make_batch(writer, seeds, length, difficulty)
