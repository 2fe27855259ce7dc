"""Properties of the world before any pixel: specs, questions, suites, seeds.

Run: python -m pytest tests/tasks/test_world.py

Answers are found again by an oracle that only looks at what is visible at given times (the tracks
that the renderer draws), not at the fields that the questions were made from.
"""

from __future__ import annotations

import math
import random
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from internvideo3.tasks.scoring import benchmark_names, score
from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world.audit import AUDIT_SEED
from internvideo3.tasks.world.build import documents
from internvideo3.tasks.world.paint import paint
from internvideo3.tasks.world.questions import FAMILIES, Question, draw_question, questions
from internvideo3.tasks.world.render import frame_times, render, tracks
from internvideo3.tasks.world.scenes import VideoSpec, draw_video
from internvideo3.tasks.world.suites import (
    SPLIT_BASE,
    SPLIT_STRIDE,
    SUITES,
    deal_lengths,
    draw_suite,
    video_seed,
)

lengths = st.sampled_from((2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 120))
specs = st.builds(
    draw_video,
    st.integers(0, 3 * SPLIT_STRIDE),
    lengths,
    st.sampled_from(("main", "ego", "spatial")),
)
fair = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)


@fair
@given(specs)
def test_scenes_follow_one_another_without_a_gap(spec: VideoSpec) -> None:
    edges = [spec.scenes[0].start_s, *(scene.end_s for scene in spec.scenes)]
    assert edges[0] == 0 and edges[-1] == spec.length_s
    assert all(scene.start_s == end for scene, end in zip(spec.scenes, edges, strict=False))
    assert all(b - a >= d.MIN_SCENE_S for a, b in pairwise(edges))
    assert not spec.scenes[0].dissolve_in


@fair
@given(specs)
def test_objects_keep_to_their_scene_and_their_colour(spec: VideoSpec) -> None:
    colours = [thing.colour for thing in spec.things]
    assert len(set(colours)) == len(colours) <= d.MAX_OBJECTS
    for scene in spec.scenes:
        for thing in scene.things:
            assert scene.start_s <= thing.enter_s < thing.leave_s <= scene.end_s
            assert thing.leave_s - thing.enter_s >= d.MIN_SCENE_S
            assert thing.enter_s == int(thing.enter_s) and thing.leave_s == int(thing.leave_s)
            for x, y in (thing.start_xy, thing.end_xy):
                assert 0.1 < x < 0.9 and 0.1 < y < 0.9


@fair
@given(specs)
def test_flashes_are_apart_and_on_half_seconds(spec: VideoSpec) -> None:
    assert 1 <= len(spec.flashes) <= max(d.FLASHES)
    for flash in spec.flashes:
        assert 0 <= flash.start_s < flash.end_s <= spec.length_s
        assert 2 * flash.start_s == int(2 * flash.start_s)
        assert flash.end_s - flash.start_s in d.FLASH_S
    for one, other in pairwise(spec.flashes):
        assert other.start_s - one.end_s >= d.FLASH_GAP_S


@fair
@given(st.integers(0, 10**12), lengths, st.sampled_from(("main", "ego", "spatial")))
def test_equal_arguments_give_equal_videos_and_questions(
    seed: int, length_s: int, profile: str
) -> None:
    one, two = (draw_video(seed, length_s, profile) for _ in range(2))
    assert one == two
    asked = [questions(spec, random.Random(seed), FAMILIES) for spec in (one, two)]
    assert asked[0] == asked[1]
    assert draw_video(seed + 1, length_s, profile) != one


@pytest.mark.parametrize("length_s", [0, 1, -4, 2.5])
def test_senseless_lengths_are_refused(length_s: float) -> None:
    with pytest.raises(ValueError, match="length_s must be a whole number of seconds >= 2"):
        draw_video(0, length_s)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown question family 'ordr'; known: needle"):
        draw_question(draw_video(0, 8), random.Random(0), "ordr")


@fair
@given(specs, st.integers(0, 10**6), st.sampled_from(sorted(FAMILIES)))
def test_questions_are_well_formed(spec: VideoSpec, seed: int, family: str) -> None:
    question = draw_question(spec, random.Random(seed), family)
    assume(question is not None)
    assert question is not None
    assert question.family == family
    assert question.question in question.prompt
    assert question.evidence
    for start_s, end_s in question.evidence:
        assert 0 <= start_s < end_s <= spec.length_s
    if question.answer_type == "choice":
        assert question.options is not None
        assert question.options.count(question.answer) == 1
        assert len(set(question.options)) == len(question.options)
        assert question.options["ABCDE".index(question.answer_letter or "")] == question.answer
        for letter, option in zip("ABCDE", question.options, strict=False):
            assert f"\n{letter}. {option}\n" in question.prompt
    else:
        assert question.options is None and question.answer_letter is None


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(specs, st.integers(0, 10**6), st.sampled_from(sorted(FAMILIES)))
def test_answers_are_true_of_what_is_visible(spec: VideoSpec, seed: int, family: str) -> None:
    question = draw_question(spec, random.Random(seed), family)
    assume(question is not None)
    assert question is not None
    assert Oracle(spec).answer(question) == question.answer, question.question


class Oracle:
    """Answers from visibility on the grid of file frames."""

    def __init__(self, spec: VideoSpec) -> None:
        self.spec = spec
        self.times_s = frame_times(spec)
        self.shown = tracks(spec, self.times_s)

    def answer(self, question: Question) -> str:
        found: str = getattr(self, question.family)(question)
        return found

    def visible(self, name: str) -> np.ndarray:
        """Frames in which an object, named by its colour, is there (while dissolving too)."""
        colour = list(d.COLOURS).index(name.split()[0])
        opacity_TK = self.shown.object_NK5[..., 3] * (self.shown.kind_NK2[..., 1] == colour)
        # What shines through of the last scene has left.
        fading_T = (self.shown.light_N3[:, 2] < 1) & (self._entered(colour) < 0)
        there_T = (opacity_TK > 0).any(1) & ~fading_T
        return np.flatnonzero(there_T)

    def _entered(self, colour: int) -> np.ndarray:
        """1 where a scene that holds the colour is on, else -1."""
        holds = [
            any(list(d.COLOURS).index(t.colour) == colour for t in scene.things)
            for scene in self.spec.scenes
        ]
        starts = [scene.start_s for scene in self.spec.scenes]
        at = np.searchsorted(starts, self.times_s, side="right") - 1
        return np.where(np.array(holds)[at], 1, -1)

    def state(self, name: str, frame: int) -> np.ndarray:
        """x, y, radius of an object in a frame."""
        colour = list(d.COLOURS).index(name.split()[0])
        slot = np.flatnonzero(
            (self.shown.kind_NK2[frame, :, 1] == colour) & (self.shown.object_NK5[frame, :, 3] > 0)
        )[0]
        return self.shown.object_NK5[frame, slot, :3]

    def flash_starts(self) -> list[int]:
        on = [-1, *self.shown.flash_N]
        return [t for t, (a, b) in enumerate(pairwise(on)) if a < 0 <= b]

    def needle(self, question: Question) -> str:
        return list(d.COLOURS)[max(self.shown.flash_N)]

    def count(self, question: Question) -> str:
        return str(len(self.flash_starts()))

    def order(self, question: Question) -> str:
        pick = min if "first" in question.question else max
        return pick(question.options or (), key=lambda name: self.visible(name)[0])

    def attime(self, question: Question) -> str:
        frame = int(re.findall(r"\d+", question.question)[0]) * d.FILE_FPS
        seen = [name for name in question.options or () if frame in self.visible(name)]
        assert len(seen) == 1
        return seen[0]

    def holistic(self, question: Question) -> str:
        return d.PLACES[np.bincount(self.shown.place_N2[:, 0]).argmax()]

    def ends(self, question: Question) -> str:
        return d.PLACES[self.shown.place_N2[0 if "start" in question.question else -1, 0]]

    def whereabouts(self, question: Question) -> str:
        name = _named(question)[0]
        assert name in [thing.name for thing in self.spec.things]
        places = self.shown.place_N2[self.visible(name), 0]
        assert len(set(places)) == 1
        return d.PLACES[places[0]]

    def motion(self, question: Question) -> str:
        name = _named(question)[0]
        frames = self.visible(name)
        dx, dy, _ = self.state(name, frames[-1]) - self.state(name, frames[0])
        assert min(abs(dx), abs(dy)) < 1e-6 < max(abs(dx), abs(dy))
        return ("left", "right")[int(dx > 0)] if dx else ("up", "down")[int(dy > 0)]

    def depth(self, question: Question) -> str:
        name = _named(question)[0]
        frames = self.visible(name)
        dx, dy, growth = self.state(name, frames[-1]) - self.state(name, frames[0])
        assert dx == dy == 0
        return "same" if growth == 0 else "nearer" if growth > 0 else "farther"

    def shape(self, question: Question) -> str:
        colour = next(word for word in question.question.split() if word in d.COLOURS)
        frame = self.visible(colour)[0]
        match = self.shown.kind_NK2[frame, :, 1] == list(d.COLOURS).index(colour)
        there = match & (self.shown.object_NK5[frame, :, 3] > 0)
        return d.SHAPES[self.shown.kind_NK2[frame, np.flatnonzero(there)[0], 0]]

    def colour(self, question: Question) -> str:
        shape = question.question.rstrip("?").split()[-1]
        there_TK = self.shown.object_NK5[..., 3] > 0
        match_TK = there_TK & (self.shown.kind_NK2[..., 0] == d.SHAPES.index(shape))
        colours = set(self.shown.kind_NK2[..., 1][match_TK])
        assert len(colours) == 1
        return list(d.COLOURS)[colours.pop()]

    def ground_object(self, question: Question) -> str:
        frames = self.visible(_named(question)[0])
        assert len(frames) == frames[-1] - frames[0] + 1
        return f"{frames[0] / d.FILE_FPS:g} - {(frames[-1] + 1) / d.FILE_FPS:g}"

    def ground_flash(self, question: Question) -> str:
        frames = np.flatnonzero(self.shown.flash_N >= 0)
        assert len(self.flash_starts()) == 1
        return f"{frames[0] / d.FILE_FPS:g} - {(frames[-1] + 1) / d.FILE_FPS:g}"

    def _offset(self, question: Question) -> np.ndarray:
        first, second = _named(question)
        frame = self.visible(first)[0]
        return self.state(first, frame)[:2] - self.state(second, frame)[:2]

    def relation(self, question: Question) -> str:
        dx, dy = self._offset(question)
        # Twice as far along the one axis as along the other, so that the relation is plain.
        assert max(abs(dx), abs(dy)) > 1.9 * min(abs(dx), abs(dy))
        across = abs(dx) > abs(dy)
        return ("left", "right")[int(dx > 0)] if across else ("above", "below")[int(dy > 0)]

    def distance(self, question: Question) -> str:
        tenths = 10 * math.hypot(*self._offset(question))
        assert abs(tenths - round(tenths)) < 0.31
        return str(round(tenths))

    def objects(self, question: Question) -> str:
        frame = int(re.findall(r"\d+", question.question)[0]) * d.FILE_FPS
        assert self.shown.light_N3[frame, 2] == 1, "no dissolve at the time asked about"
        return str(int((self.shown.object_NK5[frame, :, 3] > 0).sum()))


def _named(question: Question) -> list[str]:
    """Objects that a question names, e.g. `red circle`."""
    return re.findall(rf"(?:{'|'.join(d.COLOURS)}) (?:{'|'.join(d.SHAPES)})", question.question)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10**9), st.sampled_from((2, 5, 9)), st.sampled_from(("main", "ego", "spatial"))
)
def test_painting_equals_rendering_to_the_byte(seed: int, length_s: int, profile: str) -> None:
    spec = draw_video(seed, length_s, profile)
    times_s = frame_times(spec)[::3]
    for side in (32, spec.size_px):
        np.testing.assert_array_equal(paint(spec, times_s, side), render(spec, times_s, side))


def test_splits_never_share_a_seed() -> None:
    seeds = [
        {video_seed(suite, split, index) for index in range(suite.videos)}
        for split in SPLIT_BASE
        for suite in SUITES.values()
    ]
    assert len(set().union(*seeds)) == sum(map(len, seeds))
    for split, base in SPLIT_BASE.items():
        for suite in SUITES.values():
            last = video_seed(suite, split, suite.videos - 1)
            assert base <= last < base + SPLIT_STRIDE
            # A block of a million seeds holds the suite and any training run's longer draw.
            assert suite.videos < 10**6
    assert max(SPLIT_BASE.values()) + SPLIT_STRIDE <= AUDIT_SEED


def test_splits_never_share_a_video_or_a_suite_of_questions() -> None:
    for suite in SUITES.values():
        drawn = {
            split: [spec for spec, _ in draw_suite(suite, split, limit_videos=25)]
            for split in SPLIT_BASE
        }
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            contents = [
                {(s.scenes, s.flashes, s.flash_colour) for s in drawn[x]} for x in (one, other)
            ]
            assert not contents[0] & contents[1]


def test_suites_are_as_large_as_declared() -> None:
    assert set(SUITES) <= set(benchmark_names())
    for suite in SUITES.values():
        drawn = list(draw_suite(suite))
        assert len(drawn) == suite.videos >= 200
        assert sum(len(asked) for _, asked in drawn) >= 2000
        for _, asked in drawn:
            assert 1 <= len(asked) <= suite.questions_per_video
            assert len({question.question for question in asked}) == len(asked)
        assert {question.family for _, asked in drawn for question in asked} == set(suite.families)


@pytest.mark.parametrize("name", sorted(SUITES))
def test_lengths_keep_to_their_shares_in_every_prefix(name: str) -> None:
    suite = SUITES[name]
    assert sum(suite.lengths.values()) == pytest.approx(1)
    dealt = deal_lengths(suite)
    for count in range(1, suite.videos + 1, 7):
        for length_s, share in suite.lengths.items():
            assert abs(dealt[:count].count(length_s) - share * count) <= 1.01


def test_manyq_asks_fifteen_questions_of_two_minutes() -> None:
    drawn = list(draw_suite(SUITES["world_manyq"]))
    assert {len(asked) for _, asked in drawn} == {15}
    assert {spec.length_s for spec, _ in drawn} == {120.0}


@pytest.mark.parametrize("name", sorted(SUITES))
def test_the_right_answer_scores_one_and_another_one_less(name: str) -> None:
    for doc in documents(SUITES[name], "test", 12):
        assert score(name, doc, doc["answer"]).value == 1.0
        if doc["answer_type"] == "choice":
            assert score(name, doc, doc["answer_letter"]).value == 1.0
            wrong = next(option for option in doc["options"] if option != doc["answer"])
            assert score(name, doc, wrong).value == 0.0
        else:
            assert score(name, doc, "no idea").value == 0.0
