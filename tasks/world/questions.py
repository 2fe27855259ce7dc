"""Questions about a video of the scale world, with answers that are true by construction.

One small function per family; each returns None where the video cannot carry the question (for
instance, too few objects). Prompts state the options by letter; an answer may be given as the
letter or as the option's text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world.scenes import Scene, Thing, VideoSpec, seconds_by_place

AnswerType = Literal["choice", "number", "span"]

INSTRUCTIONS: dict[AnswerType, str] = {
    "choice": "Answer with the text of one option.",
    "number": "Answer with a number.",
    "span": "Answer with start - end in seconds.",
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question; the fields are those of a doc row (see `tasks/README.md`)."""

    family: str
    question: str
    options: tuple[str, ...] | None
    answer: str
    answer_type: AnswerType
    evidence: tuple[tuple[float, float], ...]

    @property
    def answer_letter(self) -> str | None:
        """Letter of the right option, None for numbers and spans."""
        return None if self.options is None else "ABCDE"[self.options.index(self.answer)]

    @property
    def prompt(self) -> str:
        """The user's text: question, lettered options, instruction."""
        lettered = zip("ABCDE", self.options or (), strict=False)
        options = [f"{letter}. {text}" for letter, text in lettered]
        return "\n".join([self.question, *options, INSTRUCTIONS[self.answer_type]])


Draw = Callable[[VideoSpec, random.Random, int], Question | None]


def draw_question(
    spec: VideoSpec, rng: random.Random, family: str, option_count: int = d.OPTIONS
) -> Question | None:
    """A question of a family about a video, None where the video cannot carry one.

    Args:
        spec: The video.
        rng: Source of all choices.
        family: A key of `FAMILIES`.
        option_count: Options of look-up questions; evaluation uses the default, training starts
            with two and grows.

    Raises:
        ValueError: If the family is unknown.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown question family {family!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[family](spec, rng, option_count)


def questions(
    spec: VideoSpec, rng: random.Random, families: Iterable[str], count: int | None = None
) -> list[Question]:
    """Different questions about a video, cycling through the families.

    Args:
        spec: The video.
        rng: Source of all choices.
        families: Families in the order of preference; repeated names get more questions.
        count: Stop after so many; one pass over the families where it is None.

    Returns:
        At most `count` questions, no two with the same prompt and none with the same words.
    """
    names = list(families)
    found: dict[str, Question] = {}
    for round_index in range(1 if count is None else 6):
        for family in names:
            if count is not None and len(found) >= count:
                return list(found.values())
            drawn = draw_question(spec, rng, family)
            if drawn is not None and drawn.question not in found:
                found[drawn.question] = drawn
        if round_index and not found:
            break
    return list(found.values())


def seconds_text(time_s: float) -> str:
    """Seconds as the questions write them: whole where they can be."""
    return f"{time_s:g}"


def span_text(start_s: float, end_s: float) -> str:
    """A span as the answers write it."""
    return f"{seconds_text(start_s)} - {seconds_text(end_s)}"


def narration(spec: VideoSpec) -> str:
    """Everything that happens, one line an event in order of time; a dense caption to train on."""
    place = {thing: scene.place for scene in spec.scenes for thing in scene.things}
    events = [
        (t.enter_s, f"{span_text(t.enter_s, t.leave_s)} {t.name} {t.motion} {place[t]}")
        for t in spec.things
    ]
    events += [
        (f.start_s, f"{span_text(f.start_s, f.end_s)} {spec.flash_colour} flash")
        for f in spec.flashes
    ]
    return "\n".join(text for _, text in sorted(events))


def _choice(
    rng: random.Random,
    family: str,
    question: str,
    answer: str,
    wrong: Sequence[str],
    evidence: Sequence[tuple[float, float]],
) -> Question:
    options = [answer, *wrong]
    rng.shuffle(options)
    return Question(family, question, tuple(options), answer, "choice", tuple(evidence))


def _visit(thing: Thing) -> tuple[float, float]:
    return thing.enter_s, thing.leave_s


def _others(rng: random.Random, answer: str, pool: Iterable[str], count: int) -> list[str]:
    return rng.sample([name for name in pool if name != answer], count)


def _needle(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    wrong = _others(rng, spec.flash_colour, d.COLOURS, d.OPTIONS - 1)
    evidence = [(f.start_s, f.end_s) for f in spec.flashes]
    text = "Which colour is the frame that flashes?"
    return _choice(rng, "needle", text, spec.flash_colour, wrong, evidence)


def _count(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    answer = str(len(spec.flashes))
    wrong = [str(count) for count in d.FLASHES if str(count) != answer]
    evidence = [(f.start_s, f.end_s) for f in spec.flashes]
    return _choice(rng, "count", "How many times does a frame flash?", answer, wrong, evidence)


def _order(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    by_time = {thing.enter_s: thing for thing in rng.sample(spec.things, len(spec.things))}
    if len(by_time) < option_count:
        return None
    picked = sorted(rng.sample(list(by_time.values()), option_count), key=lambda t: t.enter_s)
    which = rng.choice(("first", "last"))
    answer = picked.pop(0 if which == "first" else -1)
    text = f"Which of these appears {which}?"
    return _choice(rng, "order", text, answer.name, [t.name for t in picked], [_visit(answer)])


def _attime(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    answer = rng.choice(spec.things)
    # Not the first second of a visit: the last scene may still shine through.
    time_s = rng.randint(int(answer.enter_s) + 1, int(answer.leave_s) - 1)
    away = [t.name for t in spec.things if not t.enter_s <= time_s < t.leave_s]
    if len(away) < option_count - 1:
        return None
    text = f"Which object is on screen at {time_s} seconds?"
    wrong = rng.sample(away, option_count - 1)
    return _choice(rng, "attime", text, answer.name, wrong, [(float(time_s), time_s + 1.0)])


def _holistic(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    spans = [(scene.start_s, scene.end_s) for scene in spec.scenes]
    times = seconds_by_place(spans, [scene.place for scene in spec.scenes])
    ranked = sorted(times.items(), key=lambda item: -item[1])
    second = ranked[1][1] if len(ranked) > 1 else 0.0
    if ranked[0][1] - second < d.EGO_LEAD * spec.length_s:
        return None
    answer = ranked[0][0]
    evidence = [(s.start_s, s.end_s) for s in spec.scenes if s.place == answer]
    text = "Which place is on screen for the most time?"
    return _place(rng, "holistic", text, answer, evidence)


def _ends(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    word, scene = rng.choice((("start", spec.scenes[0]), ("end", spec.scenes[-1])))
    text = f"In which place does the video {word}?"
    return _place(rng, "ends", text, scene.place, [(scene.start_s, scene.end_s)])


def _whereabouts(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    scene, thing = rng.choice([(scene, t) for scene in spec.scenes for t in scene.things])
    text = f"In which place is the {thing.name}?"
    return _place(rng, "whereabouts", text, scene.place, [_visit(thing)])


def _place(
    rng: random.Random,
    family: str,
    text: str,
    answer: str,
    evidence: Sequence[tuple[float, float]],
) -> Question:
    return _choice(rng, family, text, answer, _others(rng, answer, d.PLACES, 4), evidence)


def _motion(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    moving = [thing for thing in spec.things if thing.motion in d.DIRECTIONS]
    if not moving:
        return None
    thing = rng.choice(moving)
    text = f"In which direction does the {thing.name} move?"
    wrong = _others(rng, thing.motion, d.DIRECTIONS, 3)
    return _choice(rng, "motion", text, thing.motion, wrong, [_visit(thing)])


def _depth(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    able = [thing for thing in spec.things if thing.motion in (*d.DEPTHS, "still")]
    if not able:
        return None
    thing = rng.choice(able)
    answer = "same" if thing.motion == "still" else thing.motion
    text = f"How does the distance of the {thing.name} change?"
    wrong = _others(rng, answer, d.DEPTH_ANSWERS, 2)
    return _choice(rng, "depth", text, answer, wrong, [_visit(thing)])


def _shape(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    thing = rng.choice(spec.things)
    text = f"What shape is the {thing.colour} object?"
    wrong = _others(rng, thing.shape, d.SHAPES, d.OPTIONS - 1)
    return _choice(rng, "shape", text, thing.shape, wrong, [_visit(thing)])


def _colour(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    shapes = [thing.shape for thing in spec.things]
    alone = [thing for thing in spec.things if shapes.count(thing.shape) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    text = f"What colour is the {thing.shape}?"
    wrong = _others(rng, thing.colour, d.COLOURS, d.OPTIONS - 1)
    return _choice(rng, "colour", text, thing.colour, wrong, [_visit(thing)])


def _ground_object(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    thing = rng.choice(spec.things)
    text = f"When is the {thing.name} on screen?"
    answer = span_text(*_visit(thing))
    return Question("ground_object", text, None, answer, "span", (_visit(thing),))


def _ground_flash(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    if len(spec.flashes) != 1:
        return None
    span = (spec.flashes[0].start_s, spec.flashes[0].end_s)
    text = "When does the frame flash?"
    return Question("ground_flash", text, None, span_text(*span), "span", (span,))


def _spatial_scene(spec: VideoSpec, rng: random.Random) -> Scene | None:
    return rng.choice(spec.scenes) if spec.profile == "spatial" else None


def _relation(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    scene = _spatial_scene(spec, rng)
    if scene is None:
        return None
    first, second = scene.things[:2]
    if rng.random() < 0.5:
        first, second = second, first
    dx = first.start_xy[0] - second.start_xy[0]
    dy = first.start_xy[1] - second.start_xy[1]
    across = abs(dx) > abs(dy)
    answer = d.RELATIONS[int(dx > 0) if across else 2 + int(dy > 0)]
    text = f"Where is the {first.name} relative to the {second.name}?"
    wrong = _others(rng, answer, d.RELATIONS, 3)
    return _choice(rng, "relation", text, answer, wrong, [(scene.start_s, scene.end_s)])


def _distance(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    scene = _spatial_scene(spec, rng)
    if scene is None:
        return None
    first, second = scene.things[:2]
    tenths = round(10 * math.dist(first.start_xy, second.start_xy))
    text = (
        f"How far apart are the {first.name} and the {second.name}, in tenths of the picture width?"
    )
    span = (scene.start_s, scene.end_s)
    return Question("distance", text, None, str(tenths), "number", (span,))


def _objects(spec: VideoSpec, rng: random.Random, option_count: int) -> Question | None:
    scene = _spatial_scene(spec, rng)
    if scene is None:
        return None
    time_s = rng.randint(int(scene.start_s) + 1, int(scene.end_s) - 1)
    text = f"How many objects are on screen at {time_s} seconds?"
    span = (float(time_s), time_s + 1.0)
    return Question("objects", text, None, str(len(scene.things)), "number", (span,))


FAMILIES: dict[str, Draw] = {
    "needle": _needle,
    "order": _order,
    "count": _count,
    "attime": _attime,
    "holistic": _holistic,
    "ends": _ends,
    "whereabouts": _whereabouts,
    "motion": _motion,
    "depth": _depth,
    "shape": _shape,
    "colour": _colour,
    "ground_object": _ground_object,
    "ground_flash": _ground_flash,
    "relation": _relation,
    "distance": _distance,
    "objects": _objects,
}
