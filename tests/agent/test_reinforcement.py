"""The agent as an environment: the rollout's loop, to the byte, with evaluation's score.

pytest tests/agent/test_reinforcement.py
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
from internvideo3.harness.agent.context import Kind
from internvideo3.harness.agent.episode import Place, about, answer
from internvideo3.harness.agent.perception import Eye, Sight
from internvideo3.harness.agent.reinforcement import AgentEnvironment
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.agent.tools.catalogue import TOOLS
from internvideo3.harness.agent.tools.desk import Desk
from internvideo3.harness.agent.trace import trace_of
from internvideo3.model.session import Limits, Reply, Session, StopReason
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.scoring import ScoringError
from internvideo3.training.environment import Environment, Step, Task

OPTIONS = ["circle", "square", "ring", "cross"]
QUESTION = "Which shape is seen first?\nA. circle\nB. square\nC. ring\nD. cross\nAnswer with the text of one option."  # noqa: E501
DOC = {"id": "x", "answer_type": "choice", "options": OPTIONS, "answer": "ring"}
AGENT = AgentSettings(policy="model", budget=Budget(turns=6), looks="none", tools=())
Make = Callable[..., AgentEnvironment]


@pytest.fixture(scope="module")
def make(scale: tuple[Any, Any]) -> Iterator[Make]:
    sight = Sight(factor=32, min_pixels=4096, max_pixels=4096, max_frames=16, zoom_frames=8)
    with closing(IsolatedReader()) as reader, Desk(TOOLS, None) as desk:
        place = Place(model=scale[0], processor=scale[1], desk=desk, name="scale:m2la")

        def environment(agent: AgentSettings = AGENT, most: int = 200) -> AgentEnvironment:
            limits = Limits(max_new_tokens=most)
            return AgentEnvironment(
                place=place, sight=sight, reader=reader, agent=agent, limits=limits
            )

        yield environment


@pytest.fixture
def task(video: Path) -> Task:
    return Task(video=video, question=QUESTION, benchmark="world_long", doc=DOC)


def rolled(made: AgentEnvironment, task: Task) -> dict[str, Any]:
    """The trace of the same question as `ask` and `eval` run it."""
    eye = Eye(task.video, made.sight, made.reader)
    state, ended = answer(made.place, eye, task.question, made.agent, made.limits)
    return trace_of(state, ended, about(made.place, eye, made.agent, made.limits, direct=False))


def written(trace: Any) -> bytes:
    return json.dumps(trace, sort_keys=True, default=str).encode()


def said_in(trace: Any) -> list[list[int]]:
    return [e["data"]["ids"] for e in trace["entries"] if e["kind"] == Kind.REASONING]


def replayed(made: AgentEnvironment, task: Task, said: list[list[int]]) -> Step:
    made.reset(task)
    for ids in said[:-1]:
        step = made.step(ids)
        assert not step.done and step.reward == 0.0 and step.info["ids"] == ids
    return made.step(said[-1])


@pytest.mark.parametrize("most", [200, 3])
def test_the_words_of_a_rollout_give_its_trace_to_the_byte(
    make: Make, task: Task, most: int
) -> None:
    """The model itself is the recorded policy; it answers without evidence and is sent back."""
    made = make(most=most)
    trace = rolled(made, task)
    said = said_in(trace)
    assert len(said) > 1
    last = replayed(made, task, said)
    assert last.done and written(last.info["trace"]) == written(trace)


def calls(tokenizer: Any) -> list[list[int]]:
    end = "<|im_end|>"
    words = [
        '<tool_call>\n{"name": "zoom", "arguments": {"start_s": 2, "end_s": 4}}\n</tool_call>',
        '<tool_call>\n{"name": "zom", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "answer", "arguments": {"text": "ring", "evidence": ["e6"]}}\n'
        "</tool_call>",
    ]
    return [tokenizer(word + end, add_special_tokens=False)["input_ids"] for word in words]


def test_calls_are_carried_out_as_in_a_rollout(
    make: Make, task: Task, scale: tuple[Any, Any]
) -> None:
    """A policy that calls, in a rollout through a session that it speaks in, and in steps."""
    unverified = replace(AGENT, verifies=False)
    made = make(unverified)
    said = calls(scale[1].tokenizer)
    script = iter(said)

    class Calling(Session):
        def generate(self, limits: Limits) -> Reply:
            ids = next(script)
            prompt_tokens = len(self)
            self.append_ids(ids)
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
            return Reply(text, tuple(ids), StopReason.STOP, prompt_tokens, len(ids))

    trace = rolled(replace(made, place=replace(made.place, opens=Calling)), task)
    last = replayed(made, task, said)
    # A rollout reserves room for words that were not said; that is in the trace, as bytes.
    for one in (trace, last.info["trace"]):
        one["cost"].pop("cache_bytes")
    assert written(last.info["trace"]) == written(trace)
    assert last.info["trace"]["cost"]["tool_calls"] == 1
    assert (last.reward, last.info["score"].parsed) == (1.0, "C")


@pytest.mark.parametrize(("text", "reward"), [("ring", 1.0), ("cross", 0.0)])
def test_the_reward_is_evaluations_score_at_the_end(
    make: Make, task: Task, text: str, reward: float
) -> None:
    made = make(replace(AGENT, verifies=False))
    first = made.reset(task)
    assert "Which shape" in first.text and first.session is not None
    zoomed = made.step(Zoom(start_s=2, end_s=4))
    assert not zoomed.done and "at 4 frames a second" in zoomed.observation.text
    assert len(zoomed.observation.ids) > 30, "frames are in it"
    done = made.step(Answer(text=text, evidence=("e6",)))
    assert done.done and done.reward == reward and done.observation.session is None
    assert done.info["trace"]["answer"]["evidence"] == ("e6",)
    with pytest.raises(ValueError, match="call reset first"):
        made.step("more")


def test_observations_and_words_make_up_the_context(make: Make, task: Task) -> None:
    """What training learns from: each token is the policy's or the world's, none is lost."""
    made = make()
    environment: Environment = made
    ids: list[int] = []
    learnt = 0
    observation, done = environment.reset(task), False
    for said in (Zoom(start_s=2, end_s=4), "ring", "ring", "ring"):
        ids += observation.ids
        assert observation.session is None or observation.session.ids == ids
        observation, _, done, info = made.step(said)
        ids += info["ids"]
        learnt += len(info["ids"])
        if done:
            break
    assert done and info["trace"]["cost"]["generated_tokens"] == learnt
    assert len(ids) + len(observation.ids) == info["trace"]["cost"]["context_tokens"]


def test_a_policy_samples_where_it_is_to_speak(make: Make, task: Task) -> None:
    """The observation's fork says what a rollout's session says."""
    made = make()
    said = said_in(rolled(made, task))
    observation = made.reset(task)
    for expected in said:
        assert observation.session is not None
        reply = observation.session.generate(made.limits)
        assert list(reply.token_ids) == expected
        observation = made.step(reply.token_ids).observation


def test_the_budget_ends_it(make: Make, task: Task) -> None:
    made = make(replace(AGENT, budget=Budget(turns=2)))
    made.reset(task)
    assert not made.step("<tool_call>\nnothing\n</tool_call>").done
    last = made.step("<tool_call>\nnothing\n</tool_call>")
    assert last.done and last.info["trace"]["answer"]["reason"] == "budget"


def test_what_cannot_be_scored_or_said_is_refused(make: Make, task: Task) -> None:
    made = make()
    with pytest.raises(ValueError, match="call reset first"):
        made.step("ring")
    with pytest.raises(ScoringError):
        made.reset(replace(task, benchmark="world_lnog"))
    made.reset(task)
    for said in ([], "<|vision_start|><|video_pad|><|vision_end|>"):
        with pytest.raises(ValueError, match="at least one token, and none of an image"):
            made.step(said)
    assert made.step("ring").info["ids"], "and the question goes on"
