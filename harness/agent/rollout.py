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
from internvideo3.harness.agent.album import Album
from internvideo3.harness.agent.belief import Belief, believe, tally
from internvideo3.harness.agent.budget import RESERVE, Spending
from internvideo3.harness.agent.context import CALL, Context, Control, Entry, Kind, Quoted, Span
from internvideo3.harness.agent.environment import Environment, Feedback
from internvideo3.harness.agent.judging import Judgement, Weighed, shares
from internvideo3.harness.agent.memory import Known
from internvideo3.harness.agent.perception import Eye, interval_s, seen_span
from internvideo3.harness.agent.question import gist, option_of
from internvideo3.harness.agent.verification import Check, check, told, weigh_alone
from internvideo3.model.session import Limits
from internvideo3.tasks.video import Frames, joined

SUPPORTED = 0.5
"""Probability of an answer, given the evidence alone, from which the evidence supports it."""
STORY = "The whole video, as it was captioned:\n"
UNNAMED = "it names none of the options, or several; name one"
MOST_REFUSALS = 2
"""Answers that verification may send back; one more is taken as it is."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A part of the video that was seen."""

    span: Span
    interval_s: float
    """Seconds between two of its frames."""
    entry: str
    times_s: tuple[float, ...] = ()
    """Of its frames."""
    frames: Frames | None = None
    """What a closer look saw, kept for the evidence window; None for the first look."""


@dataclass(frozen=True)
class Earlier:
    """What was said in a conversation before the question."""

    role: str
    """system, user or assistant."""
    text: str


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
    album: Album | None = None
    """Small pictures of the whole video, where memory has them."""
    earlier: tuple[Earlier, ...] = ()
    """The conversation before the question."""
    known: Known = field(default_factory=Known)
    """What memory held before the question."""
    compress: Callable[[State], object] = lambda state: None
    """Shortens a context that has grown long, between two turns."""
    weak: Span | None = None
    """A part whose look did not support the answer that cited it."""
    proposed: str = ""
    """The first answer that was given, before verification said anything."""

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
    wording: str
    """The answer as the model would write it: by letter or by text, as the question asks."""
    proposed: str | None
    """So worded, the answer before verification said anything; None if none was given."""
    reason: str
    """verified (by the model too), checked (its evidence is there, the model was not asked),
    unverified (sent back too often), direct, or budget."""
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
    while (outcome := turn(state, policy, watch)) is None:
        pass
    return outcome


def turn(state: State, policy: Policy, watch: Watch) -> Outcome | None:
    """One round of the equations: the outcome if it ends the rollout, else None."""
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
        _restate(state)
    state.compress(state)
    state.count()
    watch(state)
    return best(state, "budget") if state.spending.spent() else None


def _restate(state: State) -> None:
    """Puts the question again, where a whole turn can follow it."""
    again = Quoted(gist(state.question), whole=True)
    state.count()
    cost = len(state.context.quoter.quote(again.text, whole=True))
    if cost <= state.spending.tokens_left - RESERVE:
        state.context.add(Kind.INSTRUCTION, "loop", [again])


def begin(state: State, policy: Policy, first: Frames) -> None:
    """C_1 = T_sys, V_1 = V_init, and the query Q: equation (5)."""
    context, span = state.context, seen_span(first)
    context.add(Kind.INSTRUCTION, "system", [Control(policy.system)], role="system")
    for turn in state.earlier:
        context.tell(turn.role, [Quoted(turn.text)])
    entry = context.add(Kind.OBSERVATION, "frames", [first], span=span, data=_about([first]))
    for item in state.known.items:
        if item.level == "story":
            said = (Control(STORY), Quoted(item.text), Control("\n"))
            context.add(Kind.MEMORY, "story", said, span=item.span, data={"ok": True})
    context.add(Kind.INSTRUCTION, "user", [Quoted(state.question, whole=True)])
    state.views.append(_view(first, entry))
    state.base_tokens = len(context)


def reason(state: State, policy: Policy) -> Entry:
    """R_i ~ f(Q | V_i, A_i, F_i, C_i): equation (1), and how strongly it is held."""
    ahead = state.context.ahead()
    weighed = shares(state.context, ahead, state.options) if state.options else None
    if weighed is not None:
        state.spending.side_tokens += weighed.tokens
    most = max(1, min(policy.limits.max_new_tokens, state.spending.tokens_left // 2))
    said = state.context.speak(replace(policy.limits, max_new_tokens=most))
    ids = said.data["ids"]
    calls = read_call(ids, state.context.session.processor.tokenizer) is not None
    if weighed is not None:
        state.judgements.append(judged(state, weighed, state.views[-1], said.text))
    elif not calls:
        support = round(math.exp(ahead.log_likelihood(ids) / len(ids)), 4)
        state.spending.side_tokens += len(ids)
        view, words = state.views[-1], said.text.strip()
        state.judgements.append(
            Judgement(
                turn=state.context.turn, said=said.text, answer=words, support=support, shares=(),
                options=(), wordings=(words,), span=view.span, evidence=view.entry,
            )
        )  # fmt: skip
    state.count()
    return said


def judged(
    state: State, weighed: Weighed, view: View, said: str = "", *, alone: bool = False
) -> Judgement:
    """What is held of the options after a look."""
    return Judgement(
        turn=state.context.turn,
        said=said,
        answer=state.options[weighed.best],
        support=weighed.shares[weighed.best],
        shares=weighed.shares,
        options=state.options,
        wordings=weighed.wordings,
        span=view.span,
        evidence=view.entry,
        alone=alone,
    )


def write_call(state: State, action: Action) -> None:
    """Writes a call into the context, as the model would write it itself."""
    call = _call(action)
    parts: list[Control | Quoted] = [Control(CALL[0]), Quoted(call), Control(CALL[1])]
    state.context.add(Kind.ACTION, "controller", parts, data={"call": json.loads(call)})


def call_text(action: Action) -> str:
    """A call as the model writes it."""
    return f"{CALL[0]}{_call(action)}{CALL[1]}"


def _call(action: Action) -> str:
    arguments = action.model_dump(exclude={"name"}, exclude_none=True, mode="json")
    return json.dumps({"name": action.name, "arguments": arguments})


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
    state.spending.side_tokens += feedback.side_tokens
    state.checks += feedback.checks
    source = action.name if isinstance(action, Action) else "loop"
    if feedback.look is not None and feedback.span is not None:
        perceive(state, feedback, source)
        return
    entry = _respond(state, feedback, source)
    state.environment.memory.write([replace(i, evidence=entry.id) for i in feedback.items])


def perceive(state: State, feedback: Feedback, source: str) -> None:
    """V_{i+1} ~ δ(V_i | C_{i+1}): equation (4); new frames, not a caption of them."""
    assert feedback.look is not None
    try:
        looks = [state.eye.again(part, feedback.look) for part in feedback.parts]
    except ValueError as error:
        _respond(state, Feedback(ok=False, text=str(error)), source)
        return
    if sum(map(state.eye.tokens, looks)) > state.spending.tokens_left - RESERVE:
        count = sum(len(look.indices) for look in looks)
        said = f"{count} frames cost more than the tokens that are left; answer now"
        _respond(state, Feedback(ok=False, text=said), source)
        return
    spans = [seen_span(look) for look in looks]
    entry = state.context.respond(
        Kind.OBSERVATION,
        source,
        [
            Quoted(f"{state.context.next_id}: {feedback.text}"),
            Control("\n"),
            *joined(looks),
            Control("\n"),
            _left(state),
        ],
        span=(spans[0][0], max(end_s for _, end_s in spans)),
        data=_about(looks) | {"ok": True, "parts": spans},
    )
    state.views += [replace(_view(look, entry), frames=look) for look in looks]


def _view(frames: Frames, entry: Entry) -> View:
    return View(
        span=seen_span(frames),
        interval_s=interval_s(frames),
        entry=entry.id,
        times_s=tuple(index / frames.source_fps for index in frames.indices),
    )


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
    state.proposed = state.proposed or action.text
    claim = Claim(text=action.text, evidence=action.evidence)
    checks = check([claim], state.context)
    verdict = "direct"
    if policy.verifies:
        verdict = "checked" if checks[0].ok else "unverified"
        if checks[0].ok:
            checks, verdict = _supported(checks[0], state)
    state.checks += checks
    if checks[0].ok or not policy.verifies or state.refusals >= MOST_REFUSALS:
        place = option_of(action.text, state.options)
        named = action.text if place is None else state.options[place]
        held = dict(tally(state.judgements, state.options)).get(named, 0.0)
        return _outcome(state, action.text, held, verdict, checks[0].evidence)
    state.refusals += 1
    _respond(state, Feedback(ok=False, text=told(checks)), "verify")
    return None


def _supported(found: Check, state: State) -> tuple[list[Check], str]:
    """The model's own part of verification: does it give the answer from the evidence alone?

    The evidence window, all closer looks in order of time, is shown again without anything else,
    so that neither the first look nor what was said can speak for the answer. What the model then
    holds counts from now on, and the weakest cited part is named for another look. It is not asked
    where there is nothing to ask about, or not the tokens to ask.
    """
    views = sorted(state.views[1:], key=lambda view: view.span)
    if not views or not state.options:
        return [found], "checked"
    place = option_of(found.claim, state.options)
    if place is None:
        return [replace(found, ok=False, problems=(UNNAMED,))], "unverified"
    looks = [view.frames for view in views if view.frames is not None]
    quoted = state.context.quoter.quote(gist(state.question), whole=True)
    if sum(map(state.eye.tokens, looks)) + len(quoted) > state.spending.tokens_left - RESERVE:
        return [found], "budget"
    state.weak = None
    weighed, tokens = weigh_alone(state.context, looks, state.question, state.options)
    state.spending.side_tokens += tokens
    state.judgements.append(judged(state, weighed, state.views[-1], alone=True))
    share = weighed.shares[place]
    if share >= SUPPORTED:
        return [replace(found, support=share)], "verified"
    state.weak = next((v.span for v in state.views[1:] if v.entry in found.evidence), None)
    other = state.options[weighed.best]
    problem = f"the closer looks alone say {other} ({weighed.shares[weighed.best]:.2f})"
    return [replace(found, ok=False, support=share, problems=(problem,))], "unverified"


def best(state: State, reason_: str) -> Outcome:
    """The best-supported answer so far."""
    if not state.judgements:
        said = [e.text.strip() for e in state.context.entries if e.kind is Kind.REASONING]
        return _outcome(state, said[-1] if said else "", 0.0, reason_, ())
    held = believe(state.context.turn, state.judgements, state.options)
    return _outcome(state, held.hypothesis, held.support, reason_, held.evidence)


def _outcome(
    state: State, text: str, support: float, reason_: str, evidence: tuple[str, ...]
) -> Outcome:
    return Outcome(
        answer=text,
        wording=_worded(state, text),
        proposed=_worded(state, state.proposed) if state.proposed else None,
        support=support,
        reason=reason_,
        evidence=evidence,
    )


def _worded(state: State, text: str) -> str:
    """An answer as the model would write it, e.g. by its letter."""
    if text in state.options and state.judgements:
        return state.judgements[-1].wordings[state.options.index(text)]
    return text


def _about(looks: Sequence[Frames]) -> dict[str, object]:
    times = [round(index / look.source_fps, 3) for look in looks for index in look.indices]
    return {"times_s": times, "digest": " ".join(look.digest for look in looks)}
