"""One question about one video as a state for a policy: what `ask`, `eval` and `serve` share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvideo3.harness.agent.album import open_album
from internvideo3.harness.agent.budget import Budget, Spending
from internvideo3.harness.agent.context import Context
from internvideo3.harness.agent.environment import Environment
from internvideo3.harness.agent.judging import options_of
from internvideo3.harness.agent.memory import Memory
from internvideo3.harness.agent.perception import Eye, seen_span
from internvideo3.harness.agent.policies import Controller, Direct, ModelPolicy
from internvideo3.harness.agent.rollout import Outcome, Policy, State, Watch, rollout
from internvideo3.harness.agent.routing import route
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.agent.tools.desk import Desk
from internvideo3.model.session import Limits, Session
from internvideo3.tasks.video import Frames


@dataclass(frozen=True, kw_only=True)
class Place:
    """What rollouts run on: one model, its tools, and what is kept on disk."""

    model: Any
    processor: Any
    desk: Desk
    cache: Path | None = None
    """Folder of what is kept of videos; None to keep nothing."""


def direct_settings(settings: AgentSettings) -> AgentSettings:
    """The settings of an answer after one look, without tools."""
    one = Budget(turns=1, tool_calls=0, tokens=settings.budget.tokens)
    return replace(settings, budget=one, looks="none", verifies=False)


def policy_of(settings: AgentSettings, limits: Limits, *, direct: bool = False) -> Policy:
    """Who acts."""
    if direct:
        return Direct(limits)
    if settings.policy == "model":
        return ModelPolicy(limits, verifies=settings.verifies)
    return Controller(limits, looks=settings.looks, verifies=settings.verifies, seed=settings.seed)


def prepare(
    place: Place, eye: Eye, first: Frames, question: str, settings: AgentSettings,
    prior: dict[str, float] | None = None,
) -> State:  # fmt: skip
    """A state that holds nothing yet.

    Args:
        place: the model and the tools.
        eye: looks at the video.
        first: the first look.
        question: with its options, as the user wrote it.
        settings: the agent's.
        prior: probability of each kind of question; None to estimate it.

    Raises:
        VideoError: the video cannot be read.
    """
    session = Session(place.model, place.processor, media_options={"do_resize": False})
    context, memory = Context(session), Memory(place.desk)
    start_s, end_s = eye.start_s or 0.0, seen_span(first)[1]
    if eye.end_s is None:
        end_s = first.duration_s
    album = None
    if settings.looks == "new" and settings.budget.tool_calls:
        album = open_album(eye.video, start_s, end_s, eye.reader, place.cache)
    if prior is None:
        prior = route(question, memory) if settings.budget.tool_calls and settings.tools else {}
    environment = Environment(
        video=eye.video, duration_s=end_s, desk=place.desk, memory=memory, context=context,
        start_s=start_s, tools=settings.tools,
    )  # fmt: skip
    return State(
        question=question, options=options_of(question), context=context, environment=environment,
        eye=eye, spending=Spending(budget=settings.budget), prior=prior, album=album,
    )  # fmt: skip


def answer(
    place: Place, eye: Eye, question: str, settings: AgentSettings, limits: Limits,
    *, direct: bool = False, watch: Watch = lambda _: None,
) -> tuple[State, Outcome]:  # fmt: skip
    """A whole rollout.

    Raises:
        VideoError: the video cannot be read.
    """
    first = eye.first()
    chosen = direct_settings(settings) if direct else settings
    state = prepare(place, eye, first, question, chosen)
    return state, rollout(state, policy_of(settings, limits, direct=direct), first, watch)
