"""The policies ρ: a direct answer, the model's own calls, and a controller of rules.

The controller is for models that cannot call. It knows no benchmark and no rule of any data set. It
looks where the video shows what no look has shown, calls a tool where the kind of question makes
it likely to help, and ends when the answer is supported or nothing new is left to see.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from internvideo3.harness.agent.actions import (
    ACTIONS,
    Action,
    Answer,
    Listen,
    Malformed,
    Pick,
    ReadText,
    Recall,
    Segment,
    Zoom,
    read_call,
    signatures,
)
from internvideo3.harness.agent.album import Album
from internvideo3.harness.agent.belief import Belief, believe
from internvideo3.harness.agent.context import Entry, Kind, Quoted, Span
from internvideo3.harness.agent.memory import overlap_s
from internvideo3.harness.agent.question import TAIL_CHARS, gist
from internvideo3.harness.agent.rollout import State, View, write_call
from internvideo3.harness.agent.setting import Looks
from internvideo3.harness.settings import SYSTEM_PROMPT
from internvideo3.model.session import Limits

SURE = 0.7
"""Mean support from which an answer is not looked into further."""
ASKED = 0.3
"""Probability of a kind of question from which its tool is called; five kinds share 1."""
NEAR = 0.3
"""Likeness from which a remembered part is worth a look."""
NEW = 0.01
"""Difference of colour, of 1, from which a moment shows something new; noise of video coding stays
below it."""
AT_ONCE = 4
"""Parts that one look of the controller takes; each has the frames of a look."""
MOST_CANDIDATES = 8
"""Parts to look at next that a belief names."""
MOST_CITED = 20
"""Entries that an answer may name."""
MOST_CONFLICTS = 2
"""Looks spent on parts whose look gave another answer."""
_CLOCK = re.compile(r"(?<![\d:.])(?:(\d{1,2}):)?(\d{1,3}):(\d{2}(?:\.\d+)?)(?![\d:])")
_SECONDS = re.compile(r"(?<![\d:.])(\d+(?:\.\d+)?)\s*(?:seconds?|secs?|s)\b")
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
    verifies: bool = True
    tools: tuple[str, ...] = tuple(ACTIONS)
    """What it is told that it may call."""
    learnt: bool = False
    """Whether it learnt to act from rollouts: it is told of no tool, the question is put again
    after every feedback, and a reply without a call rests on all closer looks."""
    name: str = "model"

    @property
    def restates(self) -> bool:
        """As the rollouts did that it learnt from."""
        return self.learnt

    @property
    def system(self) -> str:
        """The system prompt, with the signatures of the tools where they are not learnt."""
        if self.learnt:
            return SYSTEM_PROMPT
        return SYSTEM_PROMPT + CALLS.format(signatures=signatures(self.tools))

    def act(self, said: Entry, state: State) -> Action | Malformed:
        """Reads the call in what the model said."""
        call = read_call(said.data["ids"], state.context.session.processor.tokenizer)
        if call is None:
            seen = [view.entry for view in state.views[1:]] if self.learnt else []
            cited = tuple(dict.fromkeys(seen))[-MOST_CITED:]
            call = Answer(text=said.text.strip()[:2000] or "(nothing)", evidence=cited)
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
    looks: Looks = "new"
    """Where it looks again, see `AgentSettings`."""
    verifies: bool = True
    seed: int = 0
    """Of random looks."""
    name: str = "controller"
    system: str = SYSTEM_PROMPT
    restates: bool = True

    def act(self, said: Entry, state: State) -> Action | Malformed:
        """Updates the belief, then answers or looks further."""
        ahead = self._ahead(state)
        belief = believe(state.context.turn, state.judgements, state.options, ahead)
        state.beliefs.append(belief)
        chosen = self._next(state, belief)
        if chosen is None:
            chosen = Answer(text=belief.hypothesis[:2000] or "?", evidence=belief.evidence)
        state.context.add(Kind.BELIEF, self.name, [Quoted(belief.told() + "\n")])
        write_call(state, chosen)
        return chosen

    def _ahead(self, state: State) -> tuple[Span, ...]:
        """Parts to look at next, best first."""
        if self.looks == "none":
            return ()
        if self.looks == "random":
            return self._random(state)
        named = _left(state, _named(state))
        if self.looks == "new":
            told = _left(state, _hits(state, ("caption", "scene")))
            return (*named, *told, *unshown(state, MOST_CANDIDATES))
        return (*named, *unseen(state)[:MOST_CANDIDATES])

    def _random(self, state: State) -> tuple[Span, ...]:
        """Parts of a look's length anywhere, drawn for this question and turn."""
        rng = random.Random(f"{self.seed}/{state.question}/{state.context.turn}")
        low_s, high_s = state.environment.start_s, state.environment.duration_s
        return tuple(_around(state, rng.uniform(low_s, high_s)) for _ in range(AT_ONCE))

    def _next(self, state: State, belief: Belief) -> Action | None:
        if state.spending.calls_left == 0 or state.spending.turns_left == 0:
            return None
        tool = _routed(state) or _remembered(state) or _weak(state)
        # A look cannot settle what has to be heard or read.
        if tool is not None or settled(state, belief):
            return tool
        if self.looks == "spread":
            return _structure(state) or _disputed(state, belief) or _closer(state, belief)
        return _closer(state, belief)


def settled(state: State, belief: Belief) -> bool:
    """Whether nothing more needs to be seen.

    A video that was seen at the full rate needs no second look at a supported answer. Otherwise
    the first look may have missed what is asked for, and all that is left to see is looked at.
    """
    fully_seen = state.views[0].interval_s <= 1.05 / state.eye.sight.fps
    return belief.support >= SURE and fully_seen


def _routed(state: State) -> Action | None:
    """The tool of a likely kind of question, once."""
    for route, action in (("speech", Listen()), ("knowledge", ReadText(frames=8))):
        name = action.name
        wanted = state.prior.get(route, 0.0) >= ASKED and not state.called(name)
        if wanted and state.environment.available(name):
            return action
    return None


def _weak(state: State) -> Action | None:
    """Look twice as closely, once, where the evidence did not support the answer that cited it."""
    if state.weak is None or _covered(state.weak, _closest(state)):
        return None
    start_s, end_s = state.weak
    return Zoom(start_s=start_s, end_s=end_s, fps=min(30.0, 2 / fine_s(state)))


def _closest(state: State) -> list[View]:
    """Looks closer than the usual closer look."""
    return [view for view in state.views if view.interval_s < 0.9 * fine_s(state)]


def _remembered(state: State) -> Action | None:
    """Read memory by the question's meaning, after something was heard or read."""
    levels = ("speech", "text", "caption")
    written = any(item.level in levels for item in state.environment.memory.items)
    if not written or state.called("memory_read"):
        return None
    return Recall(query=gist(state.question)[-TAIL_CHARS:])


def _structure(state: State) -> Action | None:
    """Find the scenes, once, where the first look was too coarse to show them."""
    coarse = state.views[0].interval_s > 1.05 / state.eye.sight.fps
    wanted = coarse and not state.called("video_segmentation")
    return Segment() if wanted and state.environment.available("video_segmentation") else None


def _disputed(state: State, belief: Belief) -> Action | None:
    """Look again, with twice the frames, where a closer look firmly gave another answer."""
    against = [one for one in state.judgements if one.answer != belief.hypothesis]
    firm = {one.evidence for one in against if one.support >= SURE}
    closest = _closest(state)
    left = [
        view
        for view in state.views[1:]
        if view.entry in firm and view not in closest and not _covered(view.span, closest)
    ]
    if not left or len(closest) >= MOST_CONFLICTS:
        return None
    part = left[-1].span
    return Zoom(start_s=part[0], end_s=part[1], fps=min(30.0, 2 / fine_s(state)))


def _closer(state: State, belief: Belief) -> Action | None:
    if not belief.candidates:
        return None
    (start_s, end_s), *also = belief.candidates[:AT_ONCE]
    fps = min(30.0, 1 / fine_s(state))
    return Zoom(start_s=start_s, end_s=end_s, fps=fps, also=tuple(also))


def fine_s(state: State) -> float:
    """Seconds between frames of a closer look: the full rate's, within 2 to 16 times the first."""
    first_s = state.views[0].interval_s
    return max(min(first_s / 2, 1 / state.eye.sight.fps), first_s / 16)


def clips(
    state: State, most: int, around_s: Sequence[float] = ()
) -> tuple[tuple[Span, ...], float]:
    """Parts around moments, or else that show what no look has shown; and a closer look's rate."""
    parts = tuple(_around(state, t) for t in around_s) or unshown(state, most)
    return parts, min(30.0, 1 / fine_s(state))


def _look_s(state: State) -> float:
    """Seconds of a closer look."""
    return state.eye.sight.zoom_frames * fine_s(state)


def _around(state: State, middle_s: float) -> Span:
    """A part of a look's length with a moment in its middle, within what may be seen."""
    low_s, high_s = state.environment.start_s, state.environment.duration_s
    start_s = min(max(low_s, middle_s - _look_s(state) / 2), max(low_s, high_s - _look_s(state)))
    return round(start_s, 3), round(min(start_s + _look_s(state), high_s), 3)


def unshown(state: State, most: int) -> tuple[Span, ...]:
    """Parts around the moments that differ most from what was seen next to them, newest first."""
    album = state.album
    if album is None:
        return unseen(state)[:most]
    seen_s = [time_s for view in state.views[1:] for time_s in view.times_s]
    seen_s += _seen_from_afar(album, state.views[0].times_s)
    found: list[Span] = []
    while len(found) < most:
        new_T = album.novelty(seen_s)
        at = int(new_T.argmax()) if len(new_T) else 0
        if not len(new_T) or float(new_T[at]) < NEW:
            break
        part = _around(state, float(album.times_T[at]))
        inside_T = (album.times_T >= part[0]) & (album.times_T <= part[1])
        seen_s += [*album.times_T[inside_T].tolist(), float(album.times_T[at])]
        found.append(part)
    return _left(state, tuple(found))


def _seen_from_afar(album: Album, times_s: Sequence[float]) -> list[float]:
    """Moments of the first look, but those that it only glimpsed: unlike both their neighbours."""
    places = np.clip(np.searchsorted(album.times_T, np.asarray(times_s) - 1e-6), 0, len(album) - 1)
    shown_NX = album.pictures_TX[places]
    step_N = np.abs(np.diff(shown_NX, axis=0)).mean(1)
    before_N, after_N = np.append(np.inf, step_N), np.append(step_N, np.inf)
    return [t for t, a, b in zip(times_s, before_N, after_N, strict=True) if min(a, b) < NEW]


def unseen(state: State) -> tuple[Span, ...]:
    """Parts that were seen from afar only: remembered ones first, then spread over the video."""
    seen = [view for view in state.views if view.interval_s <= 1.1 * fine_s(state)]
    parts = [*_hits(state), *_spread(_windows(state, _look_s(state)))]
    return tuple(part for part in _left(state, tuple(parts)) if not _covered(part, seen))


def _left(state: State, parts: Sequence[Span]) -> tuple[Span, ...]:
    """The parts that no look was tried at, each once."""
    zooms = [action for action, _ in state.feedback if isinstance(action, Zoom)]
    tried = {part for one in zooms for part in ((one.start_s, one.end_s), *one.also)}
    tried |= {part for a, found in state.feedback if isinstance(a, Pick) for part in found.parts}
    return tuple(part for part in dict.fromkeys(parts) if part not in tried)


def _covered(part: Span, seen: list[View]) -> bool:
    """Whether at least half of a part lies in one that was seen closely."""
    return any(overlap_s(part, view.span) >= 0.5 * (part[1] - part[0]) for view in seen)


def _named(state: State) -> tuple[Span, ...]:
    """Parts around the times that the question names."""
    low_s, high_s = state.environment.start_s, state.environment.duration_s
    times_s = named_times(gist(state.question))
    return tuple(_around(state, t) for t in times_s if low_s <= t <= high_s)


def named_times(question: str) -> list[float]:
    """Times in a text, in seconds: "1:02:03", "02:03", "at 75 s", "12.5 seconds"."""
    found: list[tuple[int, float]] = []
    for match in _CLOCK.finditer(question):
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        found.append((match.start(), 3600 * hours + 60 * minutes + seconds))
    found += [(match.start(), float(match.group(1))) for match in _SECONDS.finditer(question)]
    return [time_s for _, time_s in sorted(found)]


def _hits(state: State, levels: Sequence[str] = ()) -> list[Span]:
    """Parts around what memory gave for the question, nearest in meaning first.

    Args:
        state: the rollout's.
        levels: of memory that count; none for all but the story, which is of no part.
    """
    return [
        _around(state, (hit["span"][0] + hit["span"][1]) / 2)
        for _, feedback in state.feedback
        for hit in feedback.data.get("hits", ())
        if hit["likeness"] >= NEAR
        and (hit["level"] in levels if levels else hit["level"] != "story")
    ]


def _windows(state: State, length_s: float) -> list[Span]:
    """The video in parts no longer than a look: cut at scenes where they are known."""
    duration_s = state.environment.duration_s
    cuts = [state.environment.start_s, duration_s]
    for _, feedback in state.feedback:
        cuts += [start_s for start_s, _ in feedback.data.get("scenes", ())]
    bounds = sorted({round(min(max(cut, cuts[0]), duration_s), 3) for cut in cuts})
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
