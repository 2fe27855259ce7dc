"""Agentic answers with the signature of direct ones (`direct.Answerer`): one rollout a question.

What has no video to look at again (questions about pictures, several videos at once, the control
without media) is answered directly, and its record says so.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from internvideo3.harness.agent.episode import Place, about, answer
from internvideo3.harness.agent.perception import Eye, Sight
from internvideo3.harness.agent.rollout import Outcome as Ended
from internvideo3.harness.agent.rollout import State
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.agent.tools.catalogue import TOOLS, cache_folder
from internvideo3.harness.agent.tools.desk import Desk
from internvideo3.harness.agent.trace import trace_of
from internvideo3.harness.direct import Answerer, Outcome, Question, Seconds, failed
from internvideo3.harness.settings import NEW_TOKENS, Settings
from internvideo3.model.session import Limits, Reply, StopReason

NO_VIDEO = "no single video"
"""Why a question was answered directly."""


class AgenticAnswerer:
    """Answers questions by rollouts; holds no state between them but what is kept on disk.

    Args:
        direct: the model, and how frames are sampled.
        agent: the agent's settings.
        name: what the model is called in traces.
        cache: folder of tools' results and of videos' memory; None for the user's.
    """

    def __init__(
        self, direct: Answerer, agent: AgentSettings, *, name: str = "", cache: Path | None = None
    ) -> None:
        self.direct = direct
        self.agent = agent
        self.reader = direct.reader
        folder = cache or cache_folder()
        self.place = Place(
            model=direct.model,
            processor=direct.processor,
            desk=Desk(TOOLS, folder),
            name=name,
            cache=folder,
            # A number over videos some of which have captions would be neither's.
            goes_without=False,
        )

    @property
    def model(self) -> Any:
        """The model."""
        return self.direct.model

    @property
    def processor(self) -> Any:
        """Its processor."""
        return self.direct.processor

    @property
    def settings(self) -> Settings:
        """How frames are sampled and replies are limited."""
        return self.direct.settings

    def at(self, settings: Settings) -> "AgenticAnswerer":
        """The same agent at other settings of the first look."""
        other = object.__new__(AgenticAnswerer)
        other.__dict__.update(self.__dict__)
        other.direct = self.direct.at(settings)
        return other

    def close(self) -> None:
        """End the tools' processes and the decoding one."""
        self.place.desk.close()
        self.reader.close()

    def answer(
        self, questions: Sequence[Question], known: Callable[[str], bool] = lambda _: False
    ) -> Iterator[list[Outcome]]:
        """Answer questions one by one, in order; see `Answerer.answer`.

        Yields:
            One outcome at a time: what is yielded was finished, whatever happens to the next.
        """
        for question in questions:
            if known(question.id):
                continue
            if len(question.clips) != 1 or question.images:
                for outcomes in self.direct.answer([question]):
                    yield [_direct(one) for one in outcomes]
                continue
            yield [self._roll(question)]

    def _roll(self, question: Question) -> Outcome:
        started = time.perf_counter()
        limits = self._limits(question)
        try:
            eye = self._eye(question)
            state, ended = answer(self.place, eye, asked(question), self.agent, limits)
            told = about(self.place, eye, self.agent, limits, direct=False)
        except Exception as error:  # an outcome of this sample, recorded with its reason
            return failed(question, error)
        trace = trace_of(state, ended, told)
        return _outcome(question, state, ended, trace, time.perf_counter() - started)

    def _eye(self, question: Question) -> Eye:
        (clip,), settings = question.clips, self.settings
        vision = self.model.config.vision_config
        sight = Sight(
            factor=int(vision.patch_size * vision.spatial_merge_size),
            min_pixels=settings.min_pixels,
            max_pixels=settings.max_pixels,
            video_pixels=settings.video_pixels,
            fps=getattr(clip, "fps", None) or settings.fps,
            max_frames=settings.max_frames,
            zoom_frames=self.agent.zoom_frames,
        )
        return Eye(Path(clip.path), sight, self.reader, clip.start_s, clip.end_s)

    def _limits(self, question: Question) -> Limits:
        return Limits(
            max_new_tokens=self.settings.max_new_tokens or question.max_new_tokens or NEW_TOKENS,
            temperature=question.temperature,
            seed=self.settings.seed,
        )


def asked(question: Question) -> str:
    """The user's words of a question, without placeholders."""
    parts = (
        part["text"]
        for message in question.messages
        if message["role"] == "user"
        for part in message["content"]
        if part["type"] == "text"
    )
    return "\n".join(text.strip("\n") for text in parts)


def _direct(outcome: Outcome) -> Outcome:
    reply = outcome.reply
    cost = {
        "turns": 1, "tool_calls": 0, "side_tokens": 0,
        "context_tokens": (reply.prompt_tokens + reply.new_tokens) if reply else 0,
    }  # fmt: skip
    return _with(outcome, {"ended": NO_VIDEO, "cost": cost, "proposed": None}, None)


def _with(outcome: Outcome, agent: dict[str, Any], trace: dict[str, Any] | None) -> Outcome:
    return Outcome(
        question=outcome.question, reply=outcome.reply, error=outcome.error,
        seconds=outcome.seconds, agent=agent, trace=trace,
    )  # fmt: skip


def _outcome(
    question: Question, state: State, ended: Ended, trace: dict[str, Any], seconds: float
) -> Outcome:
    reply = Reply(
        text=ended.wording,
        token_ids=(),
        stop_reason=StopReason.STOP,
        prompt_tokens=len(state.context) - state.context.generated,
        new_tokens=state.context.generated,
    )
    looked = state.judgements[0] if state.judgements else None
    at_first = looked.wordings[_place(state, looked.answer)] if looked else ended.wording
    summary = {
        "ended": ended.reason,
        "support": ended.support,
        "proposed": ended.proposed,
        "first": at_first,
        "cost": trace["cost"],
    }
    if trace["faults"]:
        summary["faults"] = trace["faults"]
    session = state.context.session
    spent = Seconds(
        encode_s=session.encode_s,
        prefill_s=session.prefill_s,
        generate_s=session.decode_s,
        decode_s=max(0.0, seconds - session.encode_s - session.prefill_s - session.decode_s),
    )
    return Outcome(
        question=question, reply=reply, error=None, seconds=spent, agent=summary, trace=trace
    )


def _place(state: State, answer_: str) -> int:
    return state.options.index(answer_) if answer_ in state.options else 0
