"""The audit of text-only priors: it finds leaks that are planted, and none in the world.

Run: python -m pytest tests/tasks/test_audit.py
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from internvideo3.tasks.world import difficulty as d
from internvideo3.tasks.world.audit import MOST_GAIN, Asked, audit, audit_family
from internvideo3.tasks.world.questions import Question

COUNT = 2000
CHANCE = 0.25


def asked(make: Callable[[random.Random], Question]) -> Asked:
    rng = random.Random(0)
    return [(index // 2, make(rng)) for index in range(COUNT)]


def choice(question: str, options: list[str], answer: str) -> Question:
    return Question("planted", question, tuple(options), answer, "choice", ((0.0, 1.0),))


def fair(rng: random.Random) -> Question:
    options = rng.sample(sorted(d.COLOURS), 4)
    return choice(f"What colour is the {rng.choice(d.SHAPES)}?", options, rng.choice(options))


def favoured_position(rng: random.Random) -> Question:
    options = rng.sample(sorted(d.COLOURS), 4)
    right = rng.choices(options, (1, 1, 2, 1))[0]
    return choice("What colour is the ring?", options, right)


def favoured_content(rng: random.Random) -> Question:
    options = rng.sample(sorted(d.COLOURS), 4)
    return choice("What colour is it?", options, min(options, key=lambda _: rng.random()) if
                  "red" not in options or rng.random() < 0.6 else "red")  # fmt: skip


def word_gives_it_away(rng: random.Random) -> Question:
    """Each shape has a colour of its own in a third of the questions."""
    shape = rng.randrange(6)
    options = rng.sample(sorted(d.COLOURS), 4)
    own = sorted(d.COLOURS)[shape]
    right = own if own in options and rng.random() < 0.5 else rng.choice(options)
    return choice(f"What colour is the {d.SHAPES[shape]}?", options, right)


def rivals_give_it_away(rng: random.Random) -> Question:
    """Wrong options are built from the right one: it shares most words with the others."""
    colours, shapes = rng.sample(sorted(d.COLOURS), 2), rng.sample(d.SHAPES, 2)
    right = f"{colours[0]} {shapes[0]}"
    other = rng.choice([c for c in d.COLOURS if c not in colours])
    options = [
        right,
        f"{colours[0]} {shapes[1]}",
        f"{colours[1]} {shapes[0]}",
        f"{other} {next(s for s in d.SHAPES if s not in shapes)}",
    ]
    rng.shuffle(options)
    return choice("Which of these did you see?", options, right)


def favoured_number(rng: random.Random) -> Question:
    answer = rng.choices(("2", "3", "4"), (2, 1, 1))[0]
    return Question("objects", "How many?", None, answer, "number", ((0.0, 1.0),))


def question_names_the_span(rng: random.Random) -> Question:
    start = rng.randrange(0, 12)
    text = "When is the first one there?" if start < 4 else "When is the last one there?"
    return Question("spans", text, None, f"{start} - {start + 4}", "span", ((0.0, 1.0),))


def test_a_fair_family_passes() -> None:
    finding = audit_family("test", "fair", asked(fair))
    assert not finding.leaks
    assert abs(finding.gain) < MOST_GAIN
    assert finding.chance == CHANCE
    assert finding.line().startswith("ok")


@pytest.mark.parametrize(
    ("make", "guesser"),
    [
        (favoured_position, "position"),
        (favoured_content, "content"),
        (word_gives_it_away, "words"),
        (rivals_give_it_away, "words"),
        (favoured_number, "constant"),
        (question_names_the_span, "words"),
    ],
)
def test_planted_leaks_are_found(make: Callable[[random.Random], Question], guesser: str) -> None:
    finding = audit_family("test", "planted", asked(make))
    assert finding.leaks, finding.line()
    assert finding.guessers[guesser] - finding.chance > MOST_GAIN
    assert finding.line().startswith("LEAK")


@pytest.mark.slow
def test_no_family_of_the_world_can_be_answered_from_its_text() -> None:
    """At least 5,000 unrendered questions a family; manyq repeats families of the other suites."""
    suites = ["world_long", "world_ego", "world_short", "world_grounding", "world_spatial"]
    findings = audit(suites, least=5000)
    assert len(findings) == 16
    for finding in findings:
        assert finding.questions >= 5000
        assert not finding.leaks, finding.line()
