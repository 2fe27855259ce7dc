"""The plugin's side of lmms-eval's contract, with an answerer that needs no model.

pytest tests/harness/test_lmms.py
"""

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file

from internvideo3.harness import provenance
from internvideo3.harness.agent.setting import AgentSettings
from internvideo3.harness.agentic import AgenticAnswerer
from internvideo3.harness.direct import Answerer, Outcome, Question, Seconds
from internvideo3.harness.lmms import InternVideo3, LmmsError
from internvideo3.harness.settings import Settings
from internvideo3.model.decoding import StopReason
from internvideo3.model.session import Reply
from internvideo3.tasks.decoder import IsolatedReader

DOCS = [{"id": f"q{number}", "video": f"v{number % 2}.mp4"} for number in range(4)]


class Echo:
    """Answers each question with its video's name, videos grouped, and notes what it was asked."""

    settings = Settings(min_pixels=4096, max_pixels=4096)
    reader = IsolatedReader()

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def answer(
        self, questions: Sequence[Question], known: Callable[[str], bool]
    ) -> Iterator[list[Outcome]]:
        left = [one for one in questions if not known(one.id)]
        self.asked.extend(left)
        for path in dict.fromkeys(one.clips[0].path for one in left):
            yield [said(one) for one in left if one.clips[0].path == path]


def said(question: Question) -> Outcome:
    path = question.clips[0].path
    reply = Reply(path, (1, 2), StopReason.STOP, 7, 2)
    return Outcome(question=question, reply=reply, error=None, seconds=Seconds())


class Memory:
    """A recorder in memory."""

    def __init__(self, **known: str) -> None:
        self.kept = known
        self.recorded: list[list[tuple[str, str | None]]] = []

    def known(self, task: str, doc: Any) -> str | None:
        return self.kept.get(doc["id"])

    def video(self, task: str, doc: Any) -> str | None:
        return None

    def record(self, task: str, answers: Sequence[tuple[Any, Outcome]]) -> None:
        self.recorded.append([(doc["id"], one.error and one.error["type"]) for doc, one in answers])


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "video", "url": doc["video"]}, {"type": "text", "text": doc["id"]}]
    return [{"role": "user", "content": content}]


def request(
    number: int, doc_to_messages: Callable[[dict[str, Any]], Any] = messages, **metadata: Any
) -> Instance:
    arguments = ("", doc_to_messages, {"max_new_tokens": 5, "until": ["\n\n"]}, number, "t", "test")
    return Instance(
        request_type="generate_until",
        arguments=arguments,
        idx=0,
        metadata={"task": "t", "doc_id": number, "repeats": 1} | metadata,
    )


def model(recorder: Memory | None = None) -> InternVideo3:
    plugin = InternVideo3(answerer=cast(Answerer, Echo()), name="echo", recorder=recorder)
    plugin.task_dict["t"] = {"test": DOCS}
    return plugin


def texts(plugin: InternVideo3, requests: list[Instance]) -> list[str]:
    return [one.text for one in plugin.generate_until(requests)]


def test_answers_come_in_the_order_of_requests_though_videos_are_grouped() -> None:
    memory = Memory()
    plugin = model(memory)
    assert texts(plugin, [request(n) for n in range(4)]) == ["v0.mp4", "v1.mp4"] * 2
    assert memory.recorded == [[("q0", None), ("q2", None)], [("q1", None), ("q3", None)]]
    question = cast(Echo, plugin.answerer).asked[0]
    assert question.max_new_tokens == 5
    assert question.messages[0]["role"] == "system"
    (result, *_) = plugin.generate_until([request(0)])
    assert (result.token_counts.input_tokens, result.token_counts.output_tokens) == (7, 2)


def test_a_batch_is_recorded_before_its_answer_is_handed_over() -> None:
    memory = Memory()
    answers = model(memory).generate_until([request(n) for n in range(4)])
    assert memory.recorded == []
    next(answers)
    assert memory.recorded == [[("q0", None), ("q2", None)]]


def test_padding_and_known_requests_are_not_computed() -> None:
    plugin = model(Memory(q1="from before"))
    requests = [request(0), request(1), request(0, __padding_only__=True)]
    assert texts(plugin, requests) == ["v0.mp4", "from before", ""]
    assert [one.id for one in cast(Echo, plugin.answerer).asked] == ["0"]


@pytest.mark.parametrize("problem", ["exit", "audio"])
def test_a_task_that_cannot_pose_a_question_fails_that_question_only(problem: str) -> None:
    def unlucky(doc: dict[str, Any]) -> list[dict[str, Any]]:
        if problem == "exit":
            sys.exit("video path does not exist, please check")
        return [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}]

    memory = Memory()
    assert texts(model(memory), [request(0), request(1, unlucky)]) == ["v0.mp4", ""]
    kind = "SystemExit" if problem == "exit" else "LmmsError"
    assert ("q1", kind) in [row for batch in memory.recorded for row in batch]


def test_what_lmms_eval_relies_on() -> None:
    plugin = model()
    assert plugin.is_simple is False
    before = plugin.answerer
    plugin.clean()
    assert plugin.answerer is before
    with pytest.raises(LmmsError, match="generate_until"):
        plugin.loglikelihood([])
    with pytest.raises(LmmsError, match="generate_until"):
        plugin.generate_until_multi_round([])


CHANGES: dict[str, dict[str, Any]] = {
    "control": {"control": "text"},
    "other control": {"control": "shuffled"},
    "dtype": {"dtype": "bfloat16"},
    "frames": {"fps": 1.0},
    "prompt": {"system_prompt": ""},
    "reply": {"max_new_tokens": 4},
}


def loaded(checkpoint: Path, **options: Any) -> InternVideo3:
    return InternVideo3(pretrained=str(checkpoint), device="cpu", **options)


def test_its_name_in_lmms_evals_cache_is_that_of_its_answers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lmms-eval hashes `repr`, and serves what was answered under an equal one."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    plain = loaded(folder)
    names = {"plain": repr(plain)} | {key: repr(loaded(folder, **CHANGES[key])) for key in CHANGES}
    assert repr(loaded(folder)) == names["plain"] and "0x" not in names["plain"]
    plain.answerer = cast(
        Answerer, AgenticAnswerer(plain.answerer, AgentSettings(), cache=tmp_path / "cache")
    )
    names["agent"] = repr(plain)
    plain.answerer.agent = replace(AgentSettings(), zoom_frames=3)  # type: ignore[attr-defined]
    names["other agent"] = repr(plain)
    plain.answerer.close()
    plain = loaded(folder)
    plain.fps_of_documents = False
    names["rate of documents"] = repr(plain)

    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in sorted(tensors) if name.endswith("norm.weight"))
    save_file(tensors | {name: tensors[name] * 1.5}, weights, metadata={"format": "pt"})
    names["weights, at the same path"] = repr(loaded(folder))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    names["chat template"] = repr(loaded(folder))
    monkeypatch.setattr(provenance, "packages", lambda: {"torch": "0"})
    names["packages"] = repr(loaded(folder))
    same = [(a, b) for a in names for b in names if a < b and names[a] == names[b]]
    assert same == []


class Still(torch.nn.Linear):
    """Stands for a model where nothing is computed."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.config = argparse.Namespace(to_json_string=lambda: "{}")
        self.device, self.dtype = torch.device("cpu"), torch.float32
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)


def test_lmms_evals_cache_does_not_answer_a_control(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMMS_CACHE_RUN_ID", "one")
    backend = argparse.Namespace(to_str=lambda: "tokenizer")
    processor = argparse.Namespace(
        to_json_string=lambda: "{}",
        chat_template="",
        tokenizer=argparse.Namespace(backend_tokenizer=backend),
    )

    def asked(control: str | None) -> int:
        echo: Any = Said()
        echo.model, echo.processor = Still(), processor
        plugin = InternVideo3(answerer=echo, name="echo", control=control)
        tasks = str(world / "test" / "lmms")
        simple_evaluate(
            model=plugin,
            tasks=["iv3_world_short"],
            task_manager=TaskManager("ERROR", include_path=[tasks], include_defaults=False),
            use_cache=str(tmp_path / "cache"),
            cli_args=argparse.Namespace(
                output_path=None,
                process_with_media=False,
                reasoning_tags="none",
                agentic_trace_mode="full",
            ),
            batch_size=1,
            bootstrap_iters=0,
            log_samples=False,
            verbosity="ERROR",
        )
        return len(echo.asked)

    first = asked(None)
    assert first > 0
    assert asked(None) == 0
    assert asked("text") == first
    assert asked("shuffled") == first


class Said(Echo):
    """Says the same to every question."""

    def answer(
        self, questions: Sequence[Question], known: Callable[[str], bool]
    ) -> Iterator[list[Outcome]]:
        for one in questions:
            self.asked.append(one)
            reply = Reply("A", (1, 2), StopReason.STOP, 7, 2)
            yield [Outcome(question=one, reply=reply, error=None, seconds=Seconds())]
