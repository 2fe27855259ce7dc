"""One question about one video as a state for a policy: what `ask`, `eval` and replays share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from internvideo3.harness.agent.actions import ACTIONS
from internvideo3.harness.agent.album import open_album
from internvideo3.harness.agent.budget import Budget, Spending
from internvideo3.harness.agent.captioning import captioner
from internvideo3.harness.agent.chronicle import Advance, Chronicler
from internvideo3.harness.agent.compression import compress
from internvideo3.harness.agent.context import Context, Span
from internvideo3.harness.agent.environment import NAMED_TOOLS, Environment
from internvideo3.harness.agent.memory import Item, Known, Memory
from internvideo3.harness.agent.perception import Eye, Sight, seen_span
from internvideo3.harness.agent.policies import Controller, Direct, ModelPolicy, clips
from internvideo3.harness.agent.question import gist, options_of
from internvideo3.harness.agent.rollout import (
    Earlier,
    Outcome,
    Policy,
    State,
    Watch,
    rollout,
)
from internvideo3.harness.agent.routing import route
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.agent.tools.desk import Desk
from internvideo3.harness.agent.trace import check_version, trace_of
from internvideo3.model.session import Limits, Session
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import Frames


@dataclass(frozen=True, kw_only=True)
class Place:
    """What rollouts run on: one model, its tools, and what is kept on disk."""

    model: Any
    processor: Any
    desk: Desk
    name: str = ""
    """What the model is called."""
    cache: Path | None = None
    """Folder of what is kept of videos; None to keep nothing."""
    goes_without: bool = True
    """Whether a question is answered without the captions that a silent server owes."""
    advance: Advance = lambda done, total: None
    """Told of captions as they are made."""
    opens: Callable[..., Session] = Session
    """Makes a rollout's session, of the model, the processor and `media_options`."""

    def session(self) -> Session:
        """An empty session."""
        return self.opens(self.model, self.processor, media_options={"do_resize": False})

    def known(self, eye: Eye, span: Span, settings: AgentSettings) -> Known:
        """What is known of a video before any question, made now if it is not kept.

        Raises:
            CaptionError: a server owes captions, and the place does not go without.
        """
        told_by = captioner(settings.captions, self.model, self.processor, self.name)
        if told_by is None:
            return Known()
        chronicler = Chronicler(
            captioner=told_by, desk=self.desk, cache=self.cache, tools=settings.tools,
            goes_without=self.goes_without,
        )  # fmt: skip
        return chronicler.of(eye, span, self.advance).known()


def direct_settings(settings: AgentSettings) -> AgentSettings:
    """The settings of an answer after one look, without tools."""
    one = Budget(turns=1, tool_calls=0, tokens=settings.budget.tokens)
    return replace(settings, budget=one, looks="none", verifies=False, captions="")


def policy_of(settings: AgentSettings, limits: Limits, *, direct: bool = False) -> Policy:
    """Who acts."""
    if direct:
        return Direct(limits)
    if settings.policy in ("model", "trained"):
        return model_policy(settings, limits)
    return Controller(limits, looks=settings.looks, verifies=settings.verifies, seed=settings.seed)


def model_policy(settings: AgentSettings, limits: Limits) -> ModelPolicy:
    """The model's own policy; it is told of what may be called here."""
    off = {*NAMED_TOOLS} - {*settings.tools}
    tools = tuple(name for name in ACTIONS if name not in off)
    learnt = settings.policy == "trained"
    return ModelPolicy(limits, verifies=settings.verifies, tools=tools, learnt=learnt)


def prepare(
    place: Place,
    eye: Eye,
    first: Frames,
    question: str,
    settings: AgentSettings,
    earlier: Sequence[Earlier] = (),
    known: Known | None = None,
) -> State:
    """A state that holds nothing yet but what is known of the video.

    Args:
        place: the model and the tools.
        eye: looks at the video.
        first: the first look.
        question: with its options, as the user wrote it.
        settings: the agent's.
        earlier: the conversation before the question.
        known: of the video, in a rollout that is run again; None to ask who captions.

    Raises:
        VideoError: the video cannot be read.
        CaptionError: see `Place.known`.
    """
    threshold, memory = settings.compress_at, Memory(place.desk)
    context = Context(place.session(), place.session if threshold is not None else None)
    start_s, end_s = eye.start_s or 0.0, seen_span(first)[1]
    if eye.end_s is None:
        end_s = first.duration_s
    if known is None:
        known = place.known(eye, (start_s, end_s), settings)
    memory.write(known.items)
    # How it came to be known is no result of this rollout.
    place.desk.begin_rollout()
    album, prior = None, dict[str, float]()
    if settings.looks == "new" and settings.budget.tool_calls:
        album = open_album(eye.video, start_s, end_s, eye.reader, place.cache)
    if settings.budget.tool_calls and settings.tools:
        prior = route(gist(question), memory, settings.route)
    spending = Spending(budget=settings.budget)
    environment = Environment(
        video=eye.video, duration_s=end_s, desk=place.desk, memory=memory, context=context,
        start_s=start_s, tools=settings.tools, eye=eye,
        most_tokens=lambda: spending.tokens_left // 2, 
        clips=lambda most, around_s: clips(state, most, around_s),
    )  # fmt: skip
    state = State(
        question=question, options=options_of(question), context=context, environment=environment,
        eye=eye, spending=spending, prior=prior, album=album, earlier=tuple(earlier),
        known=known,
        compress=lambda state: None if threshold is None else compress(state, threshold),
    )  # fmt: skip
    return state


def about(
    place: Place, eye: Eye, settings: AgentSettings, limits: Limits, *, direct: bool
) -> dict[str, Any]:
    """The command's side of a trace: enough to run the rollout again, and no path."""
    name = os.fsencode(eye.video.name).decode("utf-8", "replace")
    return {
        "mode": "direct" if direct else "agentic",
        "model": place.name,
        "video": {"name": name, "sha256": place.desk.digest(eye.video)},
        "settings": {
            "agent": asdict(settings),
            "sight": asdict(eye.sight),
            "limits": {
                "max_new_tokens": limits.max_new_tokens,
                "temperature": limits.temperature,
                "seed": limits.seed,
            },
            "part": [eye.start_s, eye.end_s],
        },
    }


def again(trace: Mapping[str, Any], video: Path, place: Place, reader: IsolatedReader) -> Any:
    """The rollout of a trace, run anew.

    Args:
        trace: what `ask` or `eval` wrote.
        video: the file; its content must be that of the trace.
        place: a model, and the tools: live, or a `RecordedDesk`.
        reader: decodes the video.

    Returns:
        The new trace.

    Raises:
        ValueError: the video is another one, or the trace is of another version.
    """
    check_version(trace)
    settings = trace["settings"]
    if place.desk.digest(video) != trace["video"]["sha256"]:
        raise ValueError(f"{video} is not the video of the trace, {trace['video']['name']}.")
    given = dict(settings["agent"])
    agent = AgentSettings(
        **given | {"budget": Budget(**given["budget"]), "tools": tuple(given["tools"])}
    )
    pixels = settings["sight"]["video_pixels"]
    sight = Sight(**settings["sight"] | {"video_pixels": tuple(pixels) if pixels else None})
    eye = Eye(video, sight, reader, *settings["part"])
    limits, direct = Limits(**settings["limits"]), trace["mode"] == "direct"
    items = tuple(Item(**one | {"span": tuple(one["span"])}) for one in trace["known"])
    known = Known(items=items, faults=tuple(trace["faults"]))
    state, ended = answer(place, eye, trace["question"], agent, limits, direct=direct, known=known)
    return trace_of(state, ended, about(place, eye, agent, limits, direct=direct))


def answer(
    place: Place, eye: Eye, question: str, settings: AgentSettings, limits: Limits,
    *, direct: bool = False, watch: Watch = lambda _: None, earlier: Sequence[Earlier] = (),
    known: Known | None = None,
) -> tuple[State, Outcome]:  # fmt: skip
    """A whole rollout.

    Raises:
        VideoError: the video cannot be read.
        CaptionError: see `Place.known`.
    """
    first = eye.first()
    chosen = direct_settings(settings) if direct else settings
    state = prepare(place, eye, first, question, chosen, earlier, known)
    return state, rollout(state, policy_of(settings, limits, direct=direct), first, watch)
