"""A context that has grown long goes on with what matters, says what is gone, and stays exact.

pytest tests/agent/test_compression.py
"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internvideo3.harness.agent.actions import Answer, Zoom
from internvideo3.harness.agent.budget import Budget
from internvideo3.harness.agent.compression import compress, note
from internvideo3.harness.agent.context import Context, Control, Entry, Kind, Quoted
from internvideo3.harness.agent.episode import Place, about, answer
from internvideo3.harness.agent.perception import Eye, Sight
from internvideo3.harness.agent.reinforcement import AgentEnvironment
from internvideo3.harness.agent.rollout import State
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.agent.tools.catalogue import TOOLS
from internvideo3.harness.agent.tools.desk import Desk
from internvideo3.harness.agent.trace import trace_of
from internvideo3.model.session import Limits, Session
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.training.environment import Task

QUESTION = (
    "Which shape is seen first?\nA. circle\nB. square\nC. ring\nD. cross\n"
    "Answer with the text of one option."
)
THRESHOLD = 600
AGENT = AgentSettings(
    budget=Budget(turns=8, tokens=8000), looks="spread", tools=(), compress_at=THRESHOLD
)
LIMITS = Limits(max_new_tokens=8)
Roll = Callable[[AgentSettings], tuple[State, dict[str, Any]]]


@pytest.fixture(scope="module")
def environment(scale: tuple[Any, Any]) -> Iterator[AgentEnvironment]:
    sight = Sight(factor=32, min_pixels=4096, max_pixels=4096, max_frames=16, zoom_frames=8)
    with closing(IsolatedReader()) as reader, Desk(TOOLS, None) as desk:
        place = Place(model=scale[0], processor=scale[1], desk=desk, name="scale:m2la")
        yield AgentEnvironment(place=place, sight=sight, reader=reader, agent=AGENT, limits=LIMITS)


@pytest.fixture(scope="module")
def roll(environment: AgentEnvironment, video: Path) -> Roll:
    place = environment.place

    def rolled(agent: AgentSettings) -> tuple[State, dict[str, Any]]:
        eye = Eye(video, environment.sight, environment.reader)
        held: list[int] = []
        state, ended = answer(
            place, eye, QUESTION, agent, LIMITS, watch=lambda s: held.append(s.context.held)
        )
        assert max(held) <= THRESHOLD + 400 or agent.compress_at != THRESHOLD
        trace = trace_of(state, ended, about(place, eye, agent, LIMITS, direct=False))
        return state, json.loads(json.dumps(trace, default=str))

    return rolled


def notes(state: State) -> list[Entry]:
    return [one for one in state.context.entries if one.source == "compression"]


def test_a_rollout_goes_on_with_what_matters_and_says_what_is_gone(roll: Roll) -> None:
    state, trace = roll(AGENT)
    context, (first, *_) = state.context, notes(state)
    assert trace["answer"]["answer"] in state.options and len(notes(state)) > 1
    assert len(context) > 2 * THRESHOLD > context.held
    # In the trace: what was dropped and kept, and every entry there ever was.
    written = {one["id"]: one for one in trace["entries"]}
    told = written[first.id]["data"]
    assert told["dropped"] and set(told["dropped"]).isdisjoint(told["kept"])
    for name in told["dropped"]:
        seen = written[name]["span"] is not None
        assert (f"{name} {written[name]['source']} " in first.text) is seen
    # In the context: the same words, and instructions are always there.
    session = context.session
    ids = session.ids
    said = context.quoter.quote(notes(state)[-1].text)
    assert any(ids[at : at + len(said)] == said for at in range(len(ids)))
    assert {"e1", "e3"} <= context.present
    # The answer may rest on what is not in the context any more: it is still an entry.
    assert all(context.find(cited) for cited in trace["answer"]["evidence"])
    assert trace["cost"]["context_tokens"] == len(context)
    spent = len(context) - state.base_tokens + state.spending.side_tokens
    assert spent <= 1.1 * AGENT.budget.tokens, "beginning anew is no way around the budget"


def test_entries_tile_all_streams(roll: Roll) -> None:
    state, _ = roll(AGENT)
    end = 0
    for entry in state.context.entries:
        assert entry.start == end
        end = entry.stop
    assert end == len(state.context)


def test_the_new_stream_is_what_a_fresh_prefill_of_its_entries_gives(
    roll: Roll, scale: tuple[Any, Any]
) -> None:
    """The same entries told to a model that never saw the others: same ids, same logits."""
    state, _ = roll(AGENT)
    context = state.context
    fresh = Session(*scale, media_options={"do_resize": False})
    other = Context(fresh)
    last = notes(state)[-1]
    since = [e.id for e in context.entries if e.start >= last.stop and e.stop > e.start]
    told = [*last.data["kept"], *since]
    first = [one for one in told if one in ("e1", "e3")]
    for name in first:
        role, parts = context._written[name]
        other.add(Kind.INSTRUCTION, "", parts, role=role)
    other.add(Kind.INSTRUCTION, "", [Control("\n"), Quoted(last.text), Control("\n")])
    for name in (one for one in told if one not in first):
        role, parts = context._written[name]
        other.add(Kind.INSTRUCTION, "", parts, role=role)
    mine, theirs = context.ahead(), other.ahead()
    assert mine.ids == theirs.ids
    assert (mine.logits_last - theirs.logits_last).abs().max() <= 1e-4


def test_below_the_threshold_nothing_changes(roll: Roll) -> None:
    never, always = roll(replace(AGENT, compress_at=None)), roll(replace(AGENT, compress_at=10**6))
    assert not notes(always[0]) and len(never[0].context) > 2 * THRESHOLD
    for trace in (never[1], always[1]):
        trace["settings"]["agent"].pop("compress_at")
    assert never[1] == always[1]


def test_a_compressed_rollout_is_the_same_again(roll: Roll) -> None:
    assert roll(AGENT)[1] == roll(AGENT)[1]


def test_nothing_is_done_where_little_would_be_freed(roll: Roll) -> None:
    state, _ = roll(replace(AGENT, compress_at=None))
    assert compress(state, len(state.context)) is None
    assert state.context.held == len(state.context)


def test_the_note_names_the_newest_and_counts_the_rest() -> None:
    entries = [
        Entry(
            id=f"e{n}", kind=Kind.OBSERVATION, turn=1, source="zoom", text="", start=n, stop=n + 1,
            span=(n, n + 1.5) if n % 2 else None,
        )
        for n in range(200)
    ]  # fmt: skip
    said = note(entries, entries[150:])
    assert "e149 zoom 149-150.5 s" in said and "e1 zoom" not in said
    assert "e151" not in said and "; 110 other entries." in said and len(said) < 2000


def test_too_small_a_threshold_is_told() -> None:
    with pytest.raises(ValueError, match="compress at no fewer than 512"):
        AgentSettings(compress_at=100)


def test_a_policy_in_training_is_told_that_the_context_begins_anew(
    environment: AgentEnvironment, video: Path
) -> None:
    policy = replace(AGENT, policy="model", verifies=False, compress_at=None)
    made = replace(environment, agent=policy, limits=Limits(max_new_tokens=200))
    doc = {"id": "x", "answer_type": "choice", "options": ["ring", "cross"], "answer": "ring"}
    task = Task(video=video, question=QUESTION, benchmark="world_long", doc=doc)
    # The first look fits, whatever the tools' signatures take; some further ones do not.
    most = len(made.reset(task).ids) + 1100
    made = replace(made, agent=replace(policy, compress_at=most))
    one = made.reset(task)
    assert one.anew and one.session is not None
    seen = []
    for start_s in (2, 5, 8, 11, 14, 17):
        parts = ((start_s, start_s + 1.0), (start_s + 1.0, start_s + 2.0))
        step = made.step(Zoom(start_s=start_s, end_s=start_s + 2, also=parts))
        seen.append(step.observation.anew)
        if step.observation.anew:
            session = step.observation.session
            assert session is not None and tuple(session.ids) == step.observation.ids
    assert True in seen and not seen[0]
    assert made.step(Answer(text="ring", evidence=("e2",))).reward == 1.0
