"""Documents of the scale world for training: a trunk (the video) and branches (what is asked).

A document is tokenised by the same prompter as evaluation and rollouts, so that ids and pixels are
theirs. The video that an index stands for depends on nothing but the recipe and the seed.

Letters: P trunk tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from internvideo3.model.prompt import Medium, Piece, Prompter
from internvideo3.model.scale.build import SYSTEM_PROMPT
from internvideo3.tasks.scoring.entry import score
from internvideo3.tasks.scoring.result import Outcome
from internvideo3.tasks.video import Frames
from internvideo3.tasks.world.difficulty import FILE_FPS, OPTIONS
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.questions import Question
from internvideo3.tasks.world.scenes import VideoSpec, draw_video
from internvideo3.training.curation.records import DataError
from internvideo3.training.mixture import check_shares, in_order
from internvideo3.training.recipe import Modality, RecipeError, WorldData
from internvideo3.training.scale.batches import (
    PROFILE_FAMILIES,
    PROFILE_SHARES,
    TRAINING_ONLY,
    answer_text,
    draw_training_question,
    seed_stream,
)
from internvideo3.training.scale.pixels import NOISE, SAMPLE_FPS, SIDE_PX, sampled_times

SCORED_AS = "world_manyq"
"""The suite by whose rules answers are rewarded; all suites of the world share one scorer."""
WITHOUT_SCORE = {
    Outcome.NO_TRUTH: "it has no right answer that {} could score responses by; give one",
    Outcome.JUDGE_NEEDED: "of {} only a judge could score responses to it; give one that rules can",
}
"""Outcome → why no response can earn anything, and what to do."""


@dataclass(frozen=True)
class Branch:
    """Tokens that continue a trunk, seen by no other branch."""

    ids: tuple[int, ...]
    said: int
    """How many of the last ids are the model's own; the first id of a branch never is."""


@dataclass(frozen=True)
class Document:
    """One prompt and its continuations."""

    trunk_ids: tuple[int, ...]
    media: tuple[Medium, ...]
    """Images and videos of the trunk in the order of their tokens, cut into patches."""
    branches: tuple[Branch, ...]
    said: tuple[tuple[int, int], ...] = ()
    """From and to which token of the trunk the model's own words stand, which are learnt."""

    @property
    def kind(self) -> Modality:
        """What it shows."""
        shown = {medium.kind for medium in self.media}
        return "video" if "video" in shown else "image" if "image" in shown else "text"

    def __len__(self) -> int:
        return len(self.trunk_ids) + sum(len(branch.ids) for branch in self.branches)


@dataclass(frozen=True)
class Prompt:
    """A video and one question about it, as a rollout needs them."""

    text: str
    """The rendered chat, up to where the reply begins."""
    frames: Frames
    doc: Mapping[str, Any]
    """The question's fields as the scorers read them."""
    benchmark: str | None = None
    """By whose rules the answer is scored; None: the scale world's."""


def check_scored(benchmark: str | None, doc: Mapping[str, Any]) -> None:
    """What no response could earn anything by is told before one is sampled.

    Args:
        benchmark: By whose rules responses are scored; None: the scale world's.
        doc: The question's fields as the scorers read them.

    Raises:
        ScoringError: Nobody has such rules, or they need fields that are not there.
        DataError: There is no right answer, or only a judge could tell.
    """
    rules = benchmark or SCORED_AS
    outcome = score(rules, doc, "", rule="plain").outcome
    if outcome in WITHOUT_SCORE:
        raise DataError(f"{WITHOUT_SCORE[outcome].format(rules)}, or leave the row out")


class Source(Protocol):
    """Documents of a stage, by index; what an index stands for never changes."""

    prompter: Prompter

    def taught(self, index: int) -> Document:
        """A document with right answers."""

    def prompt(self, index: int) -> Prompt:
        """A prompt to answer."""


def replied(prompter: Prompter, piece: Piece, reply: str) -> Document:
    """A prompt and one reply to it as a document; the reply and its end are learnt.

    The prompt's last token opens the branch, since it predicts the reply's first.
    """
    said = [*prompter.tokenize(reply), *prompter.tokenize(prompter.closing)[:1]]
    branch = Branch((piece.ids[-1], *said), len(said))
    return Document(tuple(piece.ids[:-1]), tuple(piece.media), (branch,))


class WorldDocuments:
    """The documents of a stage, by index."""

    def __init__(self, data: WorldData, processor: Any, seed: int) -> None:
        self.data = data
        self.seed = seed
        self.prompter = Prompter(processor, {"do_resize": False})
        self.video_end = processor.tokenizer.decode(
            [processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")]
        )
        # A recipe's mappings mean the same in every order, and the digest sees none.
        self.lengths = in_order(data.lengths)
        self.profiles = PROFILE_SHARES if not data.profiles else in_order(data.profiles)
        check_shares("lengths", self.lengths)
        check_shares("profiles", self.profiles)

    def taught(self, index: int) -> Document:
        """A document with questions and right answers."""
        spec, asked = self._draw(index)
        frames = self.frames(spec)
        texts = [self._render(question) for question in asked]
        trunk = texts[0][: self._cut(texts[0])]
        piece = self.prompter.piece(trunk, [frames])
        branches = []
        for question, text in zip(asked, texts, strict=True):
            said = self.prompter.tokenize(f"{answer_text(question)}{self.prompter.closing}")
            said = said[: said.index(self.prompter.tokenize(self.prompter.closing)[0]) + 1]
            ids = self.prompter.tokenize(text[self._cut(text) :]) + said
            branches.append(Branch(tuple(ids), len(said)))
        return Document(tuple(piece.ids), tuple(piece.media), tuple(branches))

    def prompt(self, index: int) -> Prompt:
        """A prompt to answer."""
        spec, asked = self._draw(index)
        question = asked[0]
        doc = {
            "id": f"train/{spec.seed}",
            "family": question.family,
            "options": list(question.options) if question.options else None,
            "answer": question.answer,
            "answer_type": question.answer_type,
            "length_s": spec.length_s,
        }
        return Prompt(self._render(question), self.frames(spec), doc)

    def video(self, index: int) -> VideoSpec:
        """The video at a place of the endless, shuffled sequence."""
        epoch, place = divmod(index, self.data.videos)
        chosen = _order(self.data.videos, self.seed, epoch)[place]
        (video_seed,) = seed_stream("train", 10**11 + self.data.first_seed + chosen, 1)
        rng = random.Random(f"document/{video_seed}")
        length = _pick(rng, self.lengths)
        return draw_video(video_seed, length, _pick(rng, self.profiles))

    def _draw(self, index: int) -> tuple[VideoSpec, list[Question]]:
        """The video at a place of the sequence, and questions about it."""
        spec = self.video(index)
        epoch = index // self.data.videos
        rng = random.Random(f"asked/{spec.seed}/{epoch}")
        families = self._families(spec)
        if self.data.descriptions is not None and rng.random() < self.data.descriptions:
            described = {"describe"} & set(PROFILE_FAMILIES[spec.profile])
            families = sorted(described) or families
        asked = self._questions(spec, rng, families)
        if not asked:
            raise RecipeError(
                f"no family of {families} has a question about a {spec.length_s:g} s "
                f"video of kind {spec.profile}; add families or lengths to the stage's data"
            )
        return spec, asked

    def _questions(
        self, spec: VideoSpec, rng: random.Random, families: Sequence[str]
    ) -> list[Question]:
        found: dict[str, Question] = {}
        for _ in range(8 * self.data.questions + 24):
            question = draw_training_question(spec, rng, rng.choice(families), OPTIONS)
            if question is not None:
                found.setdefault(question.prompt, question)
            if len(found) == self.data.questions:
                break
        return list(found.values())

    def _families(self, spec: VideoSpec) -> Sequence[str]:
        if self.data.families is not None:
            return self.data.families
        return [name for name in PROFILE_FAMILIES[spec.profile] if name not in TRAINING_ONLY]

    def _render(self, question: Question) -> str:
        content = [{"type": "video"}, {"type": "text", "text": question.prompt}]
        return self.prompter.render(
            [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": content}]
        )

    def _cut(self, text: str) -> int:
        return text.rfind(self.video_end) + len(self.video_end)

    def frames(self, spec: VideoSpec) -> Frames:
        """Frames with the grain that a video file leaves."""
        length = int(spec.length_s)
        times = sampled_times(length, self.data.fps or SAMPLE_FPS)
        rng = np.random.default_rng(spec.seed)
        clean = paint(spec, times, SIDE_PX).astype(np.float32)
        noisy = clean + rng.normal(0, 255 * NOISE, clean.shape).astype(np.float32)
        pixels_THWC = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
        return Frames(
            pixels_THWC=pixels_THWC,
            indices=tuple(int(i) for i in np.rint(times * FILE_FPS)),
            source_fps=float(FILE_FPS),
            total_frames=length * FILE_FPS,
            duration_s=float(length),
            digest=hashlib.sha256(pixels_THWC.tobytes()).hexdigest(),
        )


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


def _pick(rng: random.Random, shares: Mapping[Any, float]) -> Any:
    return rng.choices(list(shares), list(shares.values()))[0]
