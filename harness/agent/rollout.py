"""Multimodal Contextual Reasoning as a loop that reads like equations (1)-(5) of the paper (3.1).

    R_i     ~ f(Q | V_i, A_i, F_i, C_i)      (1)  `reason`
    A_{i+1} ~ ρ(A_i | R_i, F_i, Q)           (2)  `Policy.act`
    F_{i+1} ~ π(A_{i+1} | R_i, Q)            (3)  `Environment.execute`
    V_{i+1} ~ δ(V_i | C_{i+1})               (4)  `perceive`
    C_{i+1} = C_i ⊕ (R_i, A_{i+1}, F_{i+1})  (5)  `Context.add`

It ends when an answer is settled by verification or the budget is spent; the answer is then the
best-supported one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from internvideo3.harness.agent.actions import Action, Answer, Claim, Malformed, read_call
from internvideo3.harness.agent.belief import Belief, believe, tally
from internvideo3.harness.agent.budget import RESERVE, Spending
from internvideo3.harness.agent.context import CALL, Context, Control, Entry, Kind, Quoted, Span
from internvideo3.harness.agent.environment import Environment, Feedback
from internvideo3.harness.agent.judging import Judgement, shares, weigh
from internvideo3.harness.agent.perception import Eye, interval_s, seen_span
from internvideo3.harness.agent.verification import Check, check, told
from internvideo3.model.session import Limits
from internvideo3.tasks.video import Frames

MOST_REFUSALS = 2
"""Answers that verification may send back; one more is taken as it is."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A part of the video that was seen."""

    span: Span
    interval_s: float
    """Seconds between two of its frames."""
    entry: str


@dataclass(kw_only=True)
class State:
    """Everything that a policy may act on."""

    question: str
    options: tuple[str, ...]
    context: Context
    environment: Environment
    eye: Eye
    spending: Spending
    prior: dict[str, float]
    """Probability of each kind of question."""
    views: list[View] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    beliefs: list[Belief] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    feedback: list[tuple[Action | Malformed, Feedback]] = field(default_factory=list)
    base_tokens: int = 0
    """Tokens of the first look and the question."""
    refusals: int = 0

    def count(self) -> None:
        """Brings the spending up to date."""
        self.spending.context_tokens = len(self.context) - self.base_tokens

    def called(self, name: str) -> bool:
        """Whether an action of that name was carried out before."""
        return any(isinstance(a, Action) and a.name == name for a, _ in self.feedback)


class Policy(Protocol):
    """Who selects actions."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def system(self) -> str:
        """The system prompt, T_sys."""

    @property
    def restates(self) -> bool:
        """Whether the question is put again after every feedback."""

    @property
    def verifies(self) -> bool:
        """Whether an answer must pass verification."""

    @property
    def limits(self) -> Limits:
        """Of one R_i."""

    def act(self, said: Entry, state: State) -> Action | Malformed:
        """A_{i+1} ~ ρ(A_i | R_i, F_i, Q): equation (2)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rollout ended."""

    answer: str
    support: float
    """Mean probability over all looks, see `Belief.support`; 0 where none could be taken."""
    reason: str
    """verified, unverified (sent back too often), direct, or budget."""
    evidence: tuple[str, ...]


Watch = Callable[[State], None]
"""Told of every change, for a live view."""


def rollout(state: State, policy: Policy, first: Frames, watch: Watch) -> Outcome:
    """Answers the question of a state that holds nothing yet.

    Args:
        state: an empty context and what surrounds it.
        policy: who acts.
        first: V_init.
        watch: told after every step.
    """
    begin(state, policy, first)
    watch(state)
    while not state.spending.spent():
        state.context.turn += 1
        state.spending.turns += 1
        said = reason(state, policy)
        action = policy.act(said, state)
        watch(state)
        outcome = settle(action, state, policy) if isinstance(action, Answer) else None
        if outcome is not None:
            return outcome
        if not isinstance(action, Answer):
            take(action, state)
        if policy.restates:
            state.context.add(Kind.INSTRUCTION, "loop", [Quoted(state.question)])
        state.count()
        watch(state)
    return best(state, "budget")


def begin(state: State, policy: Policy, first: Frames) -> None:
    """C_1 = T_sys, V_1 = V_init, and the query Q: equation (5)."""
    context, span = state.context, seen_span(first)
    context.add(Kind.INSTRUCTION, "system", [Control(policy.system)], role="system")
    entry = context.add(Kind.OBSERVATION, "frames", [first], span=span, data=_about(first))
    context.add(Kind.INSTRUCTION, "user", [Quoted(state.question)])
    state.views.append(View(span=span, interval_s=interval_s(first), entry=entry.id))
    state.base_tokens = len(context)


def reason(state: State, policy: Policy) -> Entry:
    """R_i ~ f(Q | V_i, A_i, F_i, C_i): equation (1), and how strongly it is held."""
    ahead = state.context.ahead()
    given: list[float] = []
    if state.options:
        given, weighed = shares(state.context, ahead, state.options)
        state.spending.side_tokens += weighed
    most = max(1, min(policy.limits.max_new_tokens, state.spending.tokens_left // 2))
    said = state.context.speak(replace(policy.limits, max_new_tokens=most))
    ids = said.data["ids"]
    calls = read_call(ids, state.context.session.processor.tokenizer) is not None
    if given:
        place = max(range(len(given)), key=lambda i: given[i])
        _judge(state, said.text, state.options[place], given[place], given)
    elif not calls:
        support = math.exp(weigh(ahead, ids) / len(ids))
        state.spending.side_tokens += len(ids)
        _judge(state, said.text, said.text.strip(), round(support, 4), ())
    state.count()
    return said


def _judge(state: State, said: str, answer: str, support: float, given: Sequence[float]) -> None:
    view = state.views[-1]
    state.judgements.append(
        Judgement(
            turn=state.context.turn,
            said=said,
            answer=answer,
            support=support,
            shares=tuple(given),
            span=view.span,
            evidence=view.entry,
        )
    )


def write_call(state: State, action: Action) -> None:
    """Writes a call into the context, as the model would write it itself."""
    arguments = action.model_dump(exclude={"name"}, exclude_none=True, mode="json")
    call = json.dumps({"name": action.name, "arguments": arguments})
    parts: list[Control | Quoted] = [Control(CALL[0]), Quoted(call), Control(CALL[1])]
    state.context.add(Kind.ACTION, "controller", parts, data={"call": json.loads(call)})


def take(action: Action | Malformed, state: State) -> None:
    """F_{i+1} ~ π(A_{i+1} | R_i, Q), then δ: equations (3) and (4)."""
    if isinstance(action, Action):
        if state.spending.calls_left == 0:
            feedback = Feedback(ok=False, text="no calls are left; answer now")
        else:
            state.spending.tool_calls += 1
            feedback = state.environment.execute(action)
    else:
        feedback = state.environment.execute(action)
    state.feedback.append((action, feedback))
    state.checks += feedback.checks
    source = action.name if isinstance(action, Action) else "loop"
    if feedback.look is not None and feedback.span is not None:
        perceive(state, feedback, source)
        return
    entry = _respond(state, feedback, source)
    state.environment.memory.write([replace(i, evidence=entry.id) for i in feedback.items])


def perceive(state: State, feedback: Feedback, source: str) -> None:
    """V_{i+1} ~ δ(V_i | C_{i+1}): equation (4); new frames, not a caption of them."""
    assert feedback.span is not None and feedback.look is not None
    try:
        frames = state.eye.again(feedback.span, feedback.look)
    except ValueError as error:
        _respond(state, Feedback(ok=False, text=str(error)), source)
        return
    if state.eye.tokens(frames) > state.spending.tokens_left - RESERVE:
        said = f"{len(frames.indices)} frames cost more than the tokens that are left; answer now"
        _respond(state, Feedback(ok=False, text=said), source)
        return
    span = seen_span(frames)
    entry = state.context.respond(
        Kind.OBSERVATION,
        source,
        [
            Quoted(f"{state.context.next_id}: {feedback.text}"),
            Control("\n"),
            frames,
            Control("\n"),
            _left(state),
        ],
        span=span,
        data=_about(frames) | {"ok": True},
    )
    state.views.append(View(span=span, interval_s=interval_s(frames), entry=entry.id))


def _respond(state: State, feedback: Feedback, source: str) -> Entry:
    quoter, most = state.context.quoter, max(64, state.spending.tokens_left // 2)
    text = feedback.text
    while len(quoter.quote(text)) > most:
        text = text[: min(len(text), most) // 2] + " […]"
    return state.context.respond(
        feedback.kind,
        source,
        [Quoted(f"{state.context.next_id}: {text}"), Control("\n"), _left(state)],
        span=feedback.span,
        data={**feedback.data, "ok": feedback.ok},
    )


def _left(state: State) -> Control:
    state.count()
    return Control(state.spending.told())


def settle(action: Answer, state: State, policy: Policy) -> Outcome | None:
    """Verification before the end: None, with feedback why, if the answer is sent back."""
    claim = Claim(text=action.text, evidence=action.evidence)
    checks = check([claim], state.context)
    state.checks += checks
    if checks[0].ok or not policy.verifies or state.refusals >= MOST_REFUSALS:
        verdict = "verified" if checks[0].ok else "unverified"
        return Outcome(
            answer=action.text,
            support=dict(tally(state.judgements, state.options)).get(action.text, 0.0),
            reason=verdict if policy.verifies else "direct",
            evidence=checks[0].evidence,
        )
    state.refusals += 1
    _respond(state, Feedback(ok=False, text=told(checks)), "verify")
    return None


def best(state: State, reason_: str) -> Outcome:
    """The best-supported answer so far."""
    if not state.judgements:
        said = [e.text.strip() for e in state.context.entries if e.kind is Kind.REASONING]
        return Outcome(answer=said[-1] if said else "", support=0.0, reason=reason_, evidence=())
    held = believe(state.context.turn, state.judgements, state.options)
    return Outcome(
        answer=held.hypothesis, support=held.support, reason=reason_, evidence=held.evidence
    )


def _about(frames: Frames) -> dict[str, object]:
    times = [round(index / frames.source_fps, 3) for index in frames.indices]
    return {"times_s": times, "digest": frames.digest}
