"""The agent as an environment for reinforcement learning: the rollout's own loop, stepped.

The policy's words come from outside; all else, feedback, frames, verification, budget, is what a
rollout does. The reward is the score of evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from internvideo3.harness.agent.actions import Action
from internvideo3.harness.agent.context import END, Entry, Kind
from internvideo3.harness.agent.episode import Place, about, model_policy, prepare
from internvideo3.harness.agent.perception import Eye, Sight
from internvideo3.harness.agent.policies import ModelPolicy
from internvideo3.harness.agent.rollout import Outcome, State, begin, call_text, turn
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.agent.trace import trace_of
from internvideo3.model.decoding import ROUND
from internvideo3.model.session import Limits, Reply, Session, StopReason
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.scoring import score
from internvideo3.training.environment import Observation, Step, Task


class DictatedSession(Session):
    """A session whose next reply can be given, on the same ids and the same cache as a sampled one.

    Without dictation, as on the forks that a policy samples in, it generates.
    """

    dictation: Sequence[int] = ()
    """The next reply; none once it is said."""

    def generate(self, limits: Limits) -> Reply:
        """Says what was dictated, no more than the limits allow."""
        if not self.dictation:
            return super().generate(limits)
        self.prefill()
        prompt_tokens = len(self)
        ids, self.dictation = list(self.dictation[: limits.max_new_tokens]), ()
        # The room that generating takes, so that a rollout costs the same either way.
        room = min(limits.max_new_tokens - 1, ROUND) + 1
        for index in range(len(self.cache.layers)):
            self.cache.segmented(index).make_room(room, may_freeze=True)
        if len(ids) > 1:
            self.append_ids(ids[:-1])
        # As after sampling, the last token waits for what follows.
        self._pending, self._reply_open, self._said = ids[-1:], True, ids[-1]
        self._tail = ""
        text: str = self.processor.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        ended = ids[-1] in self._stop_ids()
        stop = StopReason.STOP if ended else StopReason.LENGTH
        return Reply(text, tuple(ids), stop, prompt_tokens, len(ids))


@dataclass(kw_only=True)
class AgentEnvironment:
    """Implements `training.environment.Environment`."""

    place: Place
    """The model that weighs the options after each look, and the tools."""
    sight: Sight
    reader: IsolatedReader
    agent: AgentSettings
    limits: Limits
    """Of one reply of the policy."""
    _running: _Running | None = field(default=None, init=False)

    def reset(self, task: Task) -> Observation:
        """Begins a question.

        Raises:
            VideoError: the video cannot be read.
            ScoringError: its answer cannot be scored.
        """
        score(task.benchmark, task.doc, "")
        eye = Eye(Path(task.video), self.sight, self.reader, *(task.part or (None, None)))
        first = eye.first()
        place = replace(self.place, opens=DictatedSession)
        state = prepare(place, eye, first, task.question, self.agent)
        policy = model_policy(self.agent, self.limits)
        begin(state, policy, first)
        self._running = _Running(task, eye, state, policy)
        return self._running.observe(last=False)

    def step(self, said: str | Sequence[int] | Action) -> Step:
        """Takes the policy's words and does what they ask.

        Args:
            said: the ids that the policy sampled; or text, or an action, whose turn then ends.

        Raises:
            ValueError: no question is begun, nothing is said, or an id is a vision token.
        """
        running = self._running
        if running is None:
            raise ValueError("no question is begun, or it is answered; call reset first.")
        ids = running.ids_of(said)
        outcome = running.take(ids)
        words = running.words()
        info: dict[str, Any] = {"ids": words.data["ids"], "cost": asdict(running.state.spending)}
        if outcome is None:
            return Step(running.observe(last=False), 0.0, False, info)
        self._running = None
        scored = score(running.task.benchmark, running.task.doc, outcome.wording)
        told = about(self.place, running.eye, self.agent, self.limits, direct=False)
        info |= {"score": scored, "trace": trace_of(running.state, outcome, told)}
        return Step(running.observe(last=True), scored.value or 0.0, True, info)


@dataclass
class _Running:
    """A question that is not answered yet."""

    task: Task
    eye: Eye
    state: State
    policy: ModelPolicy
    seen: int = 0
    """Tokens that the policy was given or said."""
    shown: int = 0
    """Entries that it was given or said."""

    def ids_of(self, said: str | Sequence[int] | Action) -> list[int]:
        quoter = self.state.context.quoter
        if isinstance(said, Action):
            said = call_text(said)
        if isinstance(said, str):
            said = quoter.control(said.removesuffix(END) + END)
        config = self.state.context.session.model.config
        if not said or {config.image_token_id, config.video_token_id} & {*said}:
            raise ValueError("a step needs at least one token, and none of an image or a video.")
        return list(said)

    def take(self, ids: list[int]) -> Outcome | None:
        session = self.state.context.session
        assert isinstance(session, DictatedSession)
        session.dictation = ids
        return turn(self.state, self.policy, lambda _: None)

    def words(self) -> Entry:
        """What the policy said last; from here on, all is observation."""
        said = [e for e in self.state.context.entries if e.kind is Kind.REASONING][-1]
        self.seen, self.shown = said.stop, self.state.context.entries.index(said) + 1
        return said

    def observe(self, *, last: bool) -> Observation:
        context = self.state.context
        session = None if last else context.ahead()
        source = context.session if session is None else session
        new = [
            entry.text for entry in context.entries[self.shown :] if entry.kind is not Kind.ACTION
        ]
        return Observation(
            ids=tuple(source.ids[max(0, self.seen - context.offset) :]),
            text="\n".join(filter(None, new)),
            anew=self.seen <= context.offset,
            session=session,
        )
