"""The policies ρ: a direct answer, the model's own calls, and a controller of rules.

The controller is for models that cannot call. It knows no benchmark and no rule of any data set. It
looks where least was seen, calls a tool where the kind of question makes it likely to help, looks
again where looks disagree, and ends when the answer is supported or nothing is left to see.
"""

from __future__ import annotations

from dataclasses import dataclass

from internvideo3.harness.agent.actions import (
    Action,
    Answer,
    Listen,
    Malformed,
    ReadText,
    Recall,
    Segment,
    Zoom,
    read_call,
    signatures,
)
from internvideo3.harness.agent.belief import Belief, believe
from internvideo3.harness.agent.context import Entry, Kind, Quoted, Span
from internvideo3.harness.agent.memory import overlap_s
from internvideo3.harness.agent.rollout import State, View, write_call
from internvideo3.harness.settings import SYSTEM_PROMPT
from internvideo3.model.session import Limits

SURE = 0.7
"""Mean support from which an answer is not looked into further."""
ASKED = 0.3
"""Probability of a kind of question from which its tool is called; five kinds share 1."""
NEAR = 0.3
"""Likeness from which a remembered part is worth a look."""
MOST_CANDIDATES = 8
"""Parts to look at next that a belief names."""
MOST_CONFLICTS = 2
"""Looks spent on parts whose look gave another answer."""
CALLS = """

# Tools
Between <tools> markers stand the functions that you may call, one JSON object a line:
<tools>
{signatures}
</tools>
Call one by writing its name and arguments:
<tool_call>
{{"name": "zoom", "arguments": {{"start_s": 3, "end_s": 5}}}}
</tool_call>
The first frames are e2, and every response names its entry. Finish with a call of `answer` that
names the entries that support it."""


@dataclass(frozen=True)
class ModelPolicy:
    """The model acts by its own calls; a reply without one is taken as an answer."""

    limits: Limits
    name: str = "model"
    system: str = SYSTEM_PROMPT + CALLS.format(signatures=signatures())
    restates: bool = False
    verifies: bool = True

    def act(self, said: Entry, state: State) -> Action | Malformed:
        """Reads the call in what the model said."""
        call = read_call(said.data["ids"], state.context.session.processor.tokenizer)
        if call is None:
            call = Answer(text=said.text.strip()[:2000] or "(nothing)")
        shown = call.problem if isinstance(call, Malformed) else call.model_dump_json()
        state.context.mark(Kind.ACTION, "model", shown)
        return call


@dataclass(frozen=True)
class Direct:
    """Answers after the first look."""

    limits: Limits
    name: str = "direct"
    system: str = SYSTEM_PROMPT
    restates: bool = False
    verifies: bool = False

    def act(self, said: Entry, state: State) -> Action | Malformed:
        """Takes what the model said as the answer."""
        return Answer(
            text=said.text.strip()[:2000] or "(nothing)", evidence=(state.views[0].entry,)
        )


@dataclass(frozen=True)
class Controller:
    """Acts by rules; the model only answers."""

    limits: Limits
    name: str = "controller"
    system: str = SYSTEM_PROMPT
    restates: bool = True
    verifies: bool = True

    def act(self, said: Entry, state: State) -> Action | Malformed:
        """Updates the belief, then answers or looks further."""
        ahead = unseen(state)[:MOST_CANDIDATES]
        belief = believe(state.context.turn, state.judgements, state.options, ahead)
        state.beliefs.append(belief)
        # A look cannot settle what has to be heard or read.
        done = _routed(state) is None and settled(state, belief)
        chosen = None if done else self._next(state, belief)
        if chosen is None:
            chosen = Answer(text=belief.hypothesis[:2000] or "?", evidence=belief.evidence)
        state.context.add(Kind.BELIEF, self.name, [Quoted(belief.told() + "\n")])
        write_call(state, chosen)
        return chosen

    def _next(self, state: State, belief: Belief) -> Action | None:
        if state.spending.calls_left == 0:
            return None
        return (
            _routed(state)
            or _remembered(state)
            or _structure(state)
            or _disputed(state, belief)
            or _closer(state, belief.candidates)
        )


def settled(state: State, belief: Belief) -> bool:
    """Whether nothing more needs to be seen.

    A video that was seen at the full rate needs no second look at a supported answer. Otherwise
    the first look may have missed what is asked for, and a closer look must agree.
    """
    fully_seen = state.views[0].interval_s <= 1.05 / state.eye.sight.fps
    looks = [one for one in state.judgements if one.answer == belief.hypothesis]
    closer = [one for one in looks if one.evidence != state.views[0].entry and one.support >= SURE]
    return belief.support >= SURE and (fully_seen or len(closer) > 1)


def _routed(state: State) -> Action | None:
    """The tool of a likely kind of question, once."""
    for route, action in (("speech", Listen()), ("knowledge", ReadText(frames=8))):
        name = action.name
        wanted = state.prior.get(route, 0.0) >= ASKED and not state.called(name)
        if wanted and state.environment.available(name):
            return action
    return None


def _remembered(state: State) -> Action | None:
    """Read memory by the question's meaning, after something was heard or read."""
    written = any(item.level in ("speech", "text") for item in state.environment.memory.items)
    return (
        Recall(query=state.question[:2000]) if written and not state.called("memory_read") else None
    )


def _structure(state: State) -> Action | None:
    """Find the scenes, once, where the first look was too coarse to show them."""
    coarse = state.views[0].interval_s > 1.05 / state.eye.sight.fps
    wanted = coarse and not state.called("video_segmentation")
    return Segment() if wanted and state.environment.available("video_segmentation") else None


def _disputed(state: State, belief: Belief) -> Action | None:
    """Look again, with twice the frames, where a closer look firmly gave another answer."""
    against = [one for one in state.judgements if one.answer != belief.hypothesis]
    firm = {one.evidence for one in against if one.support >= SURE}
    closest = [view for view in state.views if view.interval_s < 0.9 * _fine_s(state)]
    left = [
        view
        for view in state.views[1:]
        if view.entry in firm and view not in closest and not _covered(view.span, closest)
    ]
    if not left or len(closest) >= MOST_CONFLICTS:
        return None
    part = left[-1].span
    return Zoom(start_s=part[0], end_s=part[1], fps=min(30.0, 2 / _fine_s(state)))


def _closer(state: State, candidates: tuple[Span, ...]) -> Action | None:
    if not candidates:
        return None
    start_s, end_s = candidates[0]
    return Zoom(start_s=start_s, end_s=end_s, fps=min(30.0, 1 / _fine_s(state)))


def _fine_s(state: State) -> float:
    """Seconds between frames of a closer look: the full rate's, within 2 to 16 times the first."""
    first_s = state.views[0].interval_s
    return max(min(first_s / 2, 1 / state.eye.sight.fps), first_s / 16)


def unseen(state: State) -> tuple[Span, ...]:
    """Parts that were seen from afar only: remembered ones first, then spread over the video."""
    length_s = state.eye.sight.zoom_frames * _fine_s(state)
    seen = [view for view in state.views if view.interval_s <= 1.1 * _fine_s(state)]
    parts = [*_hits(state, length_s), *_spread(_windows(state, length_s))]
    tried = {(a.start_s, a.end_s) for a, _ in state.feedback if isinstance(a, Zoom)}
    left = [part for part in parts if part not in tried and not _covered(part, seen)]
    return tuple(dict.fromkeys(left))


def _covered(part: Span, seen: list[View]) -> bool:
    """Whether at least half of a part lies in one that was seen closely."""
    return any(overlap_s(part, view.span) >= 0.5 * (part[1] - part[0]) for view in seen)


def _hits(state: State, length_s: float) -> list[Span]:
    """Parts around what memory gave for the question, nearest in meaning first."""
    found: list[Span] = []
    for _, feedback in state.feedback:
        for hit in feedback.data.get("hits", ()):
            if hit["likeness"] >= NEAR:
                middle = (hit["span"][0] + hit["span"][1]) / 2
                start_s = max(0.0, min(middle, state.environment.duration_s) - length_s / 2)
                end_s = min(start_s + length_s, state.environment.duration_s)
                found.append((round(start_s, 3), round(end_s, 3)))
    return found


def _windows(state: State, length_s: float) -> list[Span]:
    """The video in parts no longer than a look: cut at scenes where they are known."""
    duration_s = state.environment.duration_s
    cuts = [0.0, duration_s]
    for _, feedback in state.feedback:
        cuts += [start_s for start_s, _ in feedback.data.get("scenes", ())]
    bounds = sorted({round(min(cut, duration_s), 3) for cut in cuts})
    windows: list[Span] = []
    for start_s, end_s in zip(bounds, bounds[1:], strict=False):
        if windows and end_s - windows[-1][0] <= length_s:
            windows[-1] = (windows[-1][0], end_s)
            continue
        count = max(1, -int(-(end_s - start_s) // length_s))
        step_s = (end_s - start_s) / count
        windows += [
            (round(start_s + i * step_s, 3), round(start_s + (i + 1) * step_s, 3))
            for i in range(count)
        ]
    return windows


def _spread(parts: list[Span]) -> list[Span]:
    """The parts in an order whose first few lie spread over all: bits of their places reversed."""
    width = max(1, (len(parts) - 1).bit_length())
    order = sorted(range(len(parts)), key=lambda i: f"{i:0{width}b}"[::-1])
    return [parts[i] for i in order]
