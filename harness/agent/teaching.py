"""Rollouts for a model to learn from (3.1): a teacher acts by the calls that the model would write.

The teacher is the controller's rule without its judgement: a question that names moments is looked
into there; otherwise every part that shows something new is looked at, a few at a time, while calls
are left. It knows the right answer, and where in the video it can be seen; a rollout in which no
look came upon it is not taught. Now and then it gives a wrong answer first, which is not learnt
either: what is learnt is to take verification's word and answer again. The answer is a plain reply,
as the model gave it before it learnt to call, or a call that cites (`policy="model"`).

The rows have a rollout's very ids, with the parts of the video that stand between them: training
sees what acting will see (`training/acted.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from internvideo3.harness.agent.actions import Action, Answer, Pick
from internvideo3.harness.agent.context import CALL, END, Context, Span
from internvideo3.harness.agent.episode import Place, model_policy, prepare
from internvideo3.harness.agent.memory import overlap_s
from internvideo3.harness.agent.perception import Eye
from internvideo3.harness.agent.policies import ModelPolicy, clips, named_times
from internvideo3.harness.agent.reinforcement import DictatedSession
from internvideo3.harness.agent.rollout import State, begin, reason, turn
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.agent.verification import evidence_alone
from internvideo3.model.session import Limits
from internvideo3.tasks.video import Frames
from internvideo3.training.curation.records import Row

LIMITS = Limits(max_new_tokens=512)
"""Of one reply of the teacher, whose calls are short."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A question, its right answer, and where the video shows it."""

    key: str
    question: str
    """With its options, as a user writes it."""
    answer: str
    options: tuple[str, ...] = ()
    evidence: tuple[Span, ...] = ()
    """In seconds; empty if it is not known."""
    category: str = "all"


@dataclass
class _Taught:
    """A rollout under way."""

    state: State
    policy: ModelPolicy
    lesson: Lesson
    first: dict[str, float | None]
    said: list[tuple[int, int]] = field(default_factory=list)
    """From and to which id the teacher's words stand that are to be learnt."""
    takes: list[dict[str, float | None]] = field(default_factory=list)
    """How each closer look was taken, in the order of `state.views`."""
    looks: list[int] = field(default_factory=list)
    """How many takes stand in each observation."""

    def say(self, action: Action) -> bool:
        """Lets the model say the teacher's words and the loop do them; whether it goes on."""
        before = len(self.state.views)
        self._dictate(action)
        ended = turn(self.state, self.policy, lambda _: None)
        parts = self.state.feedback[-1][1].parts if self.state.feedback else ()
        new = self.state.views[before:]
        if new:
            fps = self.state.feedback[-1][1].look
            self.looks.append(len(new))
            for view, (start_s, end_s) in zip(new, parts, strict=True):
                assert view.frames is not None
                self.takes.append(_take(self.state.eye, view.frames, fps, start_s, end_s))
        return ended is None

    def answer(self, action: Answer) -> None:
        """Says the last words; nothing is done about them."""
        self._dictate(action)
        self.state.context.turn += 1
        reason(self.state, self.policy)

    def learn(self) -> None:
        """Counts the last words among those that are learnt."""
        said = [e for e in self.state.context.entries if "ids" in e.data][-1]
        self.said.append((said.stop - len(said.data["ids"]), said.stop))

    def _dictate(self, action: Action) -> None:
        session = self.state.context.session
        assert isinstance(session, DictatedSession)
        session.dictation = self._ids(action)

    def _ids(self, action: Action) -> list[int]:
        """The words of an action, as the policy would say it."""
        quoter = self.state.context.quoter
        if not isinstance(action, Answer) or not self.policy.learnt:
            return quoter.control(call_words(action) + END)
        return _likelier(self.state.context, action.text)

    def shown(self) -> bool:
        """Whether a look came upon what shows the answer."""
        return not self.lesson.evidence or bool(self.cited())

    def cited(self) -> tuple[str, ...]:
        """Entries of the closer looks that show the answer; all of them where that is not known."""
        found = [
            view.entry
            for view in self.state.views[1:]
            if not self.lesson.evidence
            or any(overlap_s(view.span, one) > 0 for one in self.lesson.evidence)
        ]
        return tuple(dict.fromkeys(found))


def teach(
    place: Place, eye: Eye, lesson: Lesson, settings: AgentSettings, slips: float = 0.0
) -> list[Row]:
    """A rollout as a row, and the answer from its closer looks alone as another.

    Args:
        place: the model, whose ids and verification count; it says nothing of its own.
        eye: looks at the video.
        lesson: what is asked, and what is right.
        settings: the agent's; `policy` says whether the rows begin with the tools' signatures.
        slips: share of the rollouts whose first answer is wrong.

    Returns:
        Rows without `video`; none if no look came upon the answer, or the answer is none of the
        options.

    Raises:
        VideoError: the video cannot be read.
    """
    if lesson.options and lesson.answer not in lesson.options:
        return []
    taught = _begin(place, eye, lesson, settings)
    for action in _looks(taught):
        if not taught.say(action):
            return []  # the budget is spent, and nobody would hear an answer
        taught.learn()
    if not taught.shown() or not taught.takes:
        return []
    rng = random.Random(f"{settings.seed}/{lesson.key}")
    wrong = [one for one in lesson.options if one != lesson.answer]
    slip = settings.verifies and wrong and rng.random() < slips and not _spent(taught.state)
    if slip and not taught.say(Answer(text=rng.choice(wrong), evidence=taught.cited())):
        return []  # it passed, which is nothing to learn
    taught.answer(Answer(text=lesson.answer, evidence=taught.cited()))
    taught.learn()
    return [_row(taught), _alone(taught)]


def _begin(place: Place, eye: Eye, lesson: Lesson, settings: AgentSettings) -> _Taught:
    first = eye.first()
    state = prepare(replace(place, opens=DictatedSession), eye, first, lesson.question, settings)
    policy = model_policy(settings, LIMITS)
    begin(state, policy, first)
    take = _take(eye, first, eye.sight.fps, eye.start_s, eye.end_s, eye.sight.max_frames)
    return _Taught(state, policy, lesson, take)


def _looks(taught: _Taught) -> Iterator[Action]:
    """The calls before the answer."""
    state = taught.state
    low_s, high_s = state.environment.start_s, state.environment.duration_s
    if _spent(state):
        return
    named = [t for t in named_times(state.question) if low_s <= t <= high_s]
    if named:
        yield Pick(around_s=tuple(named[:8]))
        if taught.shown():
            return
    while state.spending.calls_left and not _spent(state) and clips(state, 1)[0]:
        yield Pick()


def _spent(state: State) -> bool:
    """Whether no turn is left but the one that answers."""
    return state.spending.turns_left <= 1 or state.spending.spent()


def call_words(action: Action) -> str:
    """A call without what its tool takes for granted."""
    arguments = action.model_dump(exclude={"name"}, exclude_defaults=True, mode="json")
    whole = {
        k: [_short(v) for v in one] if k == "around_s" else one for k, one in arguments.items()
    }
    return f"{CALL[0]}{json.dumps({'name': action.name, 'arguments': whole})}{CALL[1]}"


def _short(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _take(
    eye: Eye, frames: Frames, fps: float | None, start_s: float | None, end_s: float | None,
    most: int | None = None,
) -> dict[str, float | None]:  # fmt: skip
    low, high = eye.sight.bounds(len(frames.indices))
    return {
        "start_s": start_s, "end_s": end_s, "fps": fps,
        "max_frames": eye.sight.zoom_frames if most is None else most,
        "min_pixels": low, "max_pixels": high,
    }  # fmt: skip


def _row(taught: _Taught) -> Row:
    context = taught.state.context
    takes, looks = iter(taught.takes), [[taught.first]]
    looks += [[next(takes) for _ in range(count)] for count in taught.looks]
    return _told(taught, "rollout", context, context.session.ids, taught.said, looks)


def _alone(taught: _Taught) -> Row:
    """What verification asks: the answer from the closer looks and nothing else."""
    state, lesson = taught.state, taught.lesson
    order = sorted(range(len(taught.takes)), key=lambda n: state.views[n + 1].span)
    looks = [view.frames for view in sorted(state.views[1:], key=lambda view: view.span)]
    seen = [one for one in looks if one is not None]
    alone = evidence_alone(state.context, seen, state.question)
    ahead, said = alone.ahead(), _likelier(alone, lesson.answer)
    start = len(ahead)
    spans = [(start, start + len(said))]
    takes = [[taught.takes[n] for n in order]]
    return _told(taught, "alone", alone, [*ahead.ids, *said], spans, takes)


def _likelier(context: Context, answer: str) -> list[int]:
    """A plain answer and its end, in the form that the model itself finds likelier."""
    ways = [context.quoter.quote(form) for form in (answer, f" {answer}")]
    end = context.quoter.control(END)
    return max((ids + end for ids in ways), key=context.ahead().log_likelihood)


def _told(
    taught: _Taught, kind: str, context: Context, ids: Sequence[int],
    said: Sequence[tuple[int, int]], looks: list[Any],
) -> Row:  # fmt: skip
    lesson, tokenizer = taught.lesson, context.session.processor.tokenizer
    last = max(stop for _, stop in said)
    return {
        "id": f"{lesson.key}/{kind}",
        "category": lesson.category,
        "question": lesson.question,
        "answer": lesson.answer,
        "replies": [tokenizer.decode(ids[start:stop]) for start, stop in said],
        "ids": list(ids[:last]),
        "said": [list(span) for span in said],
        "looks": looks,
    }
