"""Answers to conversations: one look and one reply, or the agent's rollout. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from internvideo3.harness.agent.context import Context, Control, Kind, Quoted
from internvideo3.harness.agent.episode import Place, answer
from internvideo3.harness.agent.heard import HeardSession, Listener
from internvideo3.harness.agent.perception import Eye, Sight
from internvideo3.harness.agent.quoting import LONGEST_CHARS
from internvideo3.harness.agent.rollout import Earlier, Outcome, State
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.ask_live import line
from internvideo3.harness.serving.wire import ApiError, Usage
from internvideo3.harness.settings import SYSTEM_PROMPT
from internvideo3.model.session import Limits, StopReason
from internvideo3.tasks.decoder import IsolatedReader
from internvideo3.tasks.video import Frames

MOST_CHARS = 200_000
"""Characters of a whole conversation."""


@dataclass(frozen=True)
class Turn:
    """What someone said, with videos in between."""

    role: str
    """system, user or assistant."""
    parts: tuple[str | Path, ...]
    """Words, and files of videos."""

    @property
    def text(self) -> str:
        """The words alone."""
        return "\n".join(part for part in self.parts if isinstance(part, str))

    @property
    def videos(self) -> tuple[Path, ...]:
        """The videos alone."""
        return tuple(part for part in self.parts if isinstance(part, Path))


@dataclass(frozen=True, kw_only=True)
class Told:
    """How an answer ended; its words were told before."""

    finish: str
    """stop, or length."""
    usage: Usage


Say = Callable[[str, str], None]
"""Told of words as they come: "content" or "reasoning_content", and the words. May raise."""


@dataclass(frozen=True, kw_only=True)
class Studio:
    """One model and its tools; answers one conversation at a time."""

    place: Place
    sight: Sight
    reader: IsolatedReader
    agent: AgentSettings
    threads: int = 1
    """CPU threads."""

    def answer(self, turns: Sequence[Turn], limits: Limits, say: Say, *, agentic: bool) -> Told:
        """Answers the last turn.

        Args:
            turns: the conversation; the last turn is the user's.
            limits: of the reply, or of each of the agent's.
            say: told of words; what it raises ends the answer.
            agentic: whether the agent looks again.

        Raises:
            ApiError: the conversation cannot be answered.
            VideoError: a video cannot be read.
        """
        _check(turns)
        # The number is of the thread that sets it.
        torch.set_num_threads(self.threads)
        if agentic:
            return self._roll(turns, limits, say)
        return self._reply(turns, limits, say)

    def interrupt(self) -> None:
        """Ends the tools that run, so that an answer in progress can end."""
        self.place.desk.interrupt()

    def _reply(self, turns: Sequence[Turn], limits: Limits, say: Say) -> Told:
        context = Context(self._place(lambda text: say("content", text)).session())
        if turns[0].role != "system":
            context.add(Kind.INSTRUCTION, "system", [Control(SYSTEM_PROMPT)], role="system")
        for turn in turns:
            context.tell(turn.role, [one for part in turn.parts for one in self._parts(part)])
            say("content", "")
        room = self.place.model.config.text_config.max_position_embeddings - len(context)
        if room < limits.max_new_tokens:
            raise ApiError(
                400,
                f"the conversation has {len(context)} tokens and leaves room for {max(0, room)}, "
                f"not {limits.max_new_tokens}. Shorten it, or ask for fewer.",
                code="context_length_exceeded",
            )
        said = context.speak(limits)
        finish = "stop" if said.data["stop"] == StopReason.STOP else "length"
        return Told(finish=finish, usage=_usage(context))

    def _place(self, listener: Listener) -> Place:
        return replace(self.place, opens=partial(HeardSession, listener=listener))

    def _parts(self, part: str | Path) -> list[Quoted | Frames]:
        if isinstance(part, Path):
            return [Eye(part, self.sight, self.reader).first()]
        return [Quoted(part, whole=True)]

    def _roll(self, turns: Sequence[Turn], limits: Limits, say: Say) -> Told:
        videos = [video for turn in turns for video in turn.videos]
        *earlier, asked = turns
        if len(videos) != 1:
            raise ApiError(
                400,
                f"the agent looks at one video, and the conversation has {len(videos)}. Send one, "
                "or ask the model that answers directly.",
                param="messages",
            )
        if not asked.text.strip() or len(asked.text) > LONGEST_CHARS:
            raise ApiError(
                400,
                f"the agent takes a question of 1 to {LONGEST_CHARS} characters, not "
                f"{len(asked.text)}.",
                param="messages",
            )
        shown = 0

        def watch(state: State) -> None:
            nonlocal shown
            entries = state.context.entries
            for entry in entries[shown:]:
                if entry.turn:
                    say("reasoning_content", f"{line(entry).plain}\n")
            shown = len(entries)
            say("content", "")

        def advance(done: int, total: int) -> None:
            say("reasoning_content", f"captions: {done} of {total} clips\n")

        state, ended = answer(
            replace(self._place(lambda _: say("content", "")), advance=advance),
            Eye(videos[0], self.sight, self.reader),
            asked.text,
            self.agent,
            limits,
            watch=watch,
            earlier=[Earlier(turn.role, turn.text) for turn in earlier if turn.text],
        )
        say("content", ended.answer)
        return Told(finish=_finish(state, ended), usage=_usage(state.context))


def _finish(state: State, ended: Outcome) -> str:
    """Length where the answer was cut: it is no option, and its reply was not whole."""
    replies = [entry for entry in state.context.entries if entry.kind is Kind.REASONING]
    its = [entry for entry in replies if entry.text.strip() == ended.answer] or replies
    cut = bool(its) and its[-1].data["stop"] == StopReason.LENGTH
    return "length" if cut and ended.answer not in state.options else "stop"


def _usage(context: Context) -> Usage:
    return Usage(prompt=len(context) - context.generated, completion=context.generated)


def _check(turns: Sequence[Turn]) -> None:
    if turns[-1].role != "user":
        raise ApiError(
            400,
            f"the last message is to be the user's, not the {turns[-1].role}'s.",
            param="messages",
        )
    if any(turn.videos for turn in turns if turn.role != "user"):
        raise ApiError(400, "videos belong in messages of the user.", param="messages")
    if any(turn.role == "system" for turn in turns[1:]):
        raise ApiError(
            400, "a system message can only be the first, and there one.", param="messages"
        )
    chars = sum(len(turn.text) for turn in turns)
    if chars > MOST_CHARS:
        raise ApiError(
            400,
            f"the conversation has {chars} characters, more than {MOST_CHARS}. Shorten it.",
            param="messages",
            code="context_length_exceeded",
        )
