"""Rollouts and teachers behind our own server: `pytest tests/training/test_served.py`."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch

from internvideo3.model.checkpoint import load_model
from internvideo3.model.prompt import PromptError
from internvideo3.training import train as training
from internvideo3.training.attention import Sharing
from internvideo3.training.documents import WorldDocuments
from internvideo3.training.endpoint import Endpoint, EndpointError
from internvideo3.training.policy import Policy, vision_ids
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import (
    Gspo,
    Opd,
    Optimiser,
    Recipe,
    RecipeError,
    WorldData,
    stage_digest,
)
from internvideo3.training.remote import RemoteTeacher, decoded, encoded
from internvideo3.training.rollouts import Sampler
from internvideo3.training.served import ServedPolicy
from internvideo3.training.train import train

DATA = WorldData(lengths={2: 1.0}, videos=6, profiles={"main": 1.0}, families=("shape", "motion"))


class Served:
    """A `serve-policy` process."""

    def __init__(self, model: str, *more: str, port: int = 0) -> None:
        self.arguments = ["--model", model, *more]
        self.port = port
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "internvideo3.harness.cli", "serve-policy"]
        self.process = subprocess.Popen(
            [*command, *self.arguments, "--port", str(self.port)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        found = re.search(r"(http://127\.0\.0\.1:(\d+)/v1)", said)
        assert found, said + (self.process.stderr.read() if self.process.stderr else "")
        self.url, self.port = found[1], int(found[2])

    def end(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        self.process.communicate(timeout=30)
        return self.process.returncode


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def go(model: str, *more: str) -> Served:
        started.append(Served(model, *more))
        return started[-1]

    yield go
    for one in started:
        if one.process.poll() is None:
            one.end(signal.SIGKILL)


def gspo(**changed: Any) -> Gspo:
    return Gspo(
        kind="gspo", group=3, max_new_tokens=5, documents=2, pack_tokens=2048, updates=2,
        optimiser=Optimiser(learning_rate=1e-3), data=DATA, **({"steps": 2} | changed),
    )  # fmt: skip


def opd(teacher: str, **changed: Any) -> Opd:
    return Opd(
        kind="opd", teacher=teacher, group=2, max_new_tokens=5, documents=2, pack_tokens=2048,
        optimiser=Optimiser(learning_rate=1e-3), data=DATA, **({"steps": 2} | changed),
    )  # fmt: skip


def weights(out: Path, stage: str) -> bytes:
    return (out / f"1-{stage}/checkpoint/model.safetensors").read_bytes()


@pytest.mark.parametrize("start", ["scale:m2la", "scale:base"])
def test_rollouts_of_a_server_train_the_same_weights_to_the_bit(
    serve: Callable[..., Served], tmp_path: Path, start: str
) -> None:
    """The server begins with other weights, so that only what is pushed to it can have sampled."""
    served = serve("scale:control", "--weights", str(tmp_path))
    recipes = [
        Recipe(about="test", start=start, stages={"gspo": gspo(rollouts=address)})
        for address in (None, served.url)
    ]
    for name, recipe in zip(("here", "there"), recipes, strict=True):
        train(recipe, tmp_path / name)
    assert weights(tmp_path / "here", "gspo") == weights(tmp_path / "there", "gspo")
    assert not (tmp_path / "there/1-gspo" / training.PUSHED).exists()
    begun = load_model(start, "cpu", torch.float32)[0].state_dict()
    trained = load_model(tmp_path / "there/1-gspo/checkpoint", "cpu", torch.float32)[0].state_dict()
    assert any(not torch.equal(one, begun[name]) for name, one in trained.items())
    assert served.end() == 0


def test_a_server_that_was_killed_and_started_again_is_given_the_weights_again(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve("scale:m2la", "--weights", str(tmp_path))
    recipe = Recipe(about="t", start="scale:m2la", stages={"gspo": gspo(rollouts=served.url)})
    restarted: list[int] = []

    def kills(name: str, done: int, total: int) -> None:
        if done == 1 and not restarted:
            restarted.append(served.end(signal.SIGKILL))
            served.start()

    train(recipe, tmp_path / "killed", kills)
    assert restarted
    train(recipe, tmp_path / "whole")
    assert weights(tmp_path / "killed", "gspo") == weights(tmp_path / "whole", "gspo")


def test_weights_that_were_lost_within_a_step_are_pushed_again(
    serve: Callable[..., Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("scale:m2la", "--weights", str(tmp_path))
    recipe = Recipe(about="t", start="scale:m2la", stages={"gspo": gspo(rollouts=served.url)})
    push = training.PushedWeights.push
    pushes: list[str] = []

    def push_then_restart(self: Any) -> None:
        push(self)
        pushes.append(self.digest)
        if len(pushes) == 2:  # the second step's weights; those that it starts with are others
            served.end(signal.SIGKILL)
            served.start()

    monkeypatch.setattr(training.PushedWeights, "push", push_then_restart)
    train(recipe, tmp_path / "there")
    assert pushes == [pushes[0], pushes[1], pushes[1]] and pushes[0] != pushes[1]
    train(replace(recipe, stages={"gspo": gspo()}), tmp_path / "here")
    assert weights(tmp_path / "there", "gspo") == weights(tmp_path / "here", "gspo")


def test_a_teacher_behind_the_server_judges_as_it_does_here(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    served = serve("scale:control")
    model, processor = load_model("scale:m2la", "cpu", torch.float32)
    prompt = WorldDocuments(DATA, processor, 0).prompt(3)
    (response,) = Sampler(model, processor, vision_ids(model, processor), 6).sample(prompt, 1, 7)
    teacher = RemoteTeacher(Endpoint(url=served.url, model="any"), processor.tokenizer)
    local = ServedPolicy("scale:control", "cpu", "float32")
    session = Sampler(local.model, processor, (), 1).session()
    session.append_text(prompt.text, [prompt.frames])
    expected = []
    for one in response.ids:
        expected.append(float(session.logits_last.log_softmax(-1)[one]))
        session.append_ids([one])
    ids = WorldDocuments(DATA, processor, 0).prompter.piece(prompt.text, [prompt.frames]).ids
    found_T = teacher.logps(prompt, ids, response)
    assert torch.allclose(found_T, torch.tensor(expected), atol=2e-4)
    trained = train(
        Recipe(about="t", start="scale:m2la", stages={"opd": opd(served.url)}), tmp_path / "out"
    )
    assert trained.checkpoint is not None


def test_frames_cross_the_wire_unchanged() -> None:
    _, processor = load_model("scale:m2la", "cpu", torch.float32)
    frames = WorldDocuments(DATA, processor, 0).prompt(0).frames
    back = decoded(encoded(frames))
    assert (back.pixels_THWC == frames.pixels_THWC).all()
    assert (back.indices, back.source_fps) == (tuple(frames.indices), frames.source_fps)
    with pytest.raises(ValueError, match="a video needs frames"):
        decoded({"frames": ["no picture"], "indices": [0], "source_fps": 2, "total_frames": 1})


def test_ids_that_do_not_fit_their_videos_are_refused() -> None:
    policy = ServedPolicy("scale:m2la", "cpu", "float32")
    prompt = WorldDocuments(DATA, policy.processor, 0).prompt(0)
    ids = WorldDocuments(DATA, policy.processor, 0).prompter.piece(prompt.text, [prompt.frames]).ids
    with pytest.raises(PromptError, match="the ids have 8 video tokens, and their media make 0"):
        policy.sample(ids, [], count=1, seed=0, barred=(), max_new_tokens=1)
    for videos, made in (([], 0), ([prompt.frames] * 2, 16)):
        with pytest.raises(PromptError, match=f"8 video tokens, and their media make {made}"):
            policy.logps(ids, videos)
    with pytest.raises(PromptError, match="0 video tokens, and their media make 8"):
        policy.logps([40, 41], [prompt.frames])
    with pytest.raises(PromptError, match="ends with its video"):
        last = max(n for n, one in enumerate(ids) if one == policy.model.config.video_token_id)
        policy.logps(ids[: last + 1], [prompt.frames])


def test_words_alone_are_scored_as_a_session_scores_them() -> None:
    policy = ServedPolicy("scale:m2la", "cpu", "float32")
    ids = [40, 41, 300, 12, 41]
    session = Sampler(policy.model, policy.processor, (), 1).session()
    expected = []
    for one, following in itertools.pairwise(ids):
        session.append_ids([one])
        expected.append(float(session.logits_last.log_softmax(-1)[following]))
    first, *found = policy.logps(ids, [])
    assert first is None
    assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=2e-4)
    with pytest.raises(PromptError, match="is one id"):
        policy.logps(ids[:1], [])


def test_the_server_refuses_in_words(serve: Callable[..., Served], tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    served = serve("scale:m2la", "--weights", str(tmp_path / "weights"))
    root = served.url.removesuffix("/v1")

    def told(path: str, body: dict[str, Any], **headers: str) -> tuple[int, str]:
        reply = httpx.post(f"{root}/{path}", json=body, headers=headers)
        return reply.status_code, str(reply.json()["error"]["message"])

    good = {"model": "m", "prompt": [1, 2, 3]}
    for body, said in (
        (good | {"prompt": "words"}, "prompt: Input should be a valid array"),
        (good | {"prompt": [10**6]}, "there is no token 1000000; the model has 832"),
        (good | {"temperature": 0.5}, "temperature"),
        (good | {"top_k": 5}, "top_k: this field is not served here"),
        (good | {"echo": True}, "echo is served with max_tokens 0"),
        (good | {"max_tokens": 0}, "max_tokens is 0"),
        (good | {"n": 1024, "max_tokens": 10**9}, "n x max_tokens is 1,024,000,000,000, at most"),
        (good | {"logit_bias": {str(n): -100 for n in range(832)}}, "every token of the vocab"),
        (good | {"videos": [{"frames": ["x"], "indices": [0], "source_fps": 2,
                             "total_frames": 1}]}, "a video needs frames"),
    ):  # fmt: skip
        status, message = told("v1/completions", body)
        assert status == 400 and said in message, message
    outside = told("update_weights_from_disk", {"model_path": str(tmp_path)})
    assert outside[0] == 403 and "weights are read below" in outside[1]
    (tmp_path / "weights/link").symlink_to(tmp_path)
    linked = told("update_weights_from_disk", {"model_path": str(tmp_path / "weights/link")})
    assert linked[0] == 403
    empty = told("update_weights_from_disk", {"model_path": str(tmp_path / "weights")})
    assert empty[0] == 400 and "config.json" in empty[1]
    assert told("v1/completions", good, host="example.org")[0] == 403
    reply = httpx.post(f"{root}/v1/completions", json=good | {"max_tokens": 2, "n": 2}).json()
    assert [len(one["token_ids"]) for one in reply["choices"]] in ([2, 2], [1, 2], [2, 1], [1, 1])


def test_a_teacher_does_not_take_weights(serve: Callable[..., Served], tmp_path: Path) -> None:
    served = serve("scale:control")
    recipe = Recipe(about="t", start="scale:m2la", stages={"gspo": gspo(rollouts=served.url)})
    with pytest.raises(EndpointError, match="keeps its weights; start it with --weights"):
        train(recipe, tmp_path / "out")


def test_where_it_is_sampled_does_not_decide_the_weights() -> None:
    digests = {
        stage_digest(gspo(rollouts=place), 0, "start")
        for place in (None, "http://a/v1", "http://b")
    }
    assert len(digests) == 1


def test_the_option_is_one_of_recipes(tmp_path: Path) -> None:
    from internvideo3.training.recipe import load_recipe

    (tmp_path / "r.yaml").write_text(
        "extends: scale\nabout: x\nstages:\n  gspo: {rollouts: 'http://localhost:8001/v1'}\n"
    )
    stage = load_recipe(tmp_path / "r.yaml").stages["gspo"]
    assert isinstance(stage, Gspo) and stage.rollouts == "http://localhost:8001/v1"
    (tmp_path / "w.yaml").write_text("extends: scale\nabout: x\nstages:\n  gspo: {rollout: 'x'}\n")
    with pytest.raises(RecipeError, match="did you mean rollouts"):
        load_recipe(tmp_path / "w.yaml")


def test_processes_that_share_rows_have_one_server(tmp_path: Path) -> None:
    """So that every server has work: one process of each row asks."""
    model, processor = load_model("scale:m2la", "cpu", torch.float32)
    options = gspo(rollouts="http://a:1/v1, http://b:1/v1")
    found = []
    for rank in range(4):
        group = Processes("cpu")
        group.rank, group.count = rank, 4
        group.sharing = Sharing(cast(Any, None), rank % 2, 2)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(training, "_written_weights", lambda *_: {})
            patched.setattr(training, "_write", lambda *_: None)
            patched.setattr(training, "weights_digest", lambda *_: "d")
            patched.setattr(training, "_push", lambda *_: None)
            patched.setattr(training, "together", lambda group, make: make())
            patched.setattr(Processes, "from_first", lambda self, value: value)
            sampler_of = training._remote_sampler_of(options, processor, tmp_path, group)
            found.append(cast(Any, sampler_of(Policy(model))).weights.endpoint.url)
    assert found == ["http://a:1/v1"] * 2 + ["http://b:1/v1"] * 2


def test_processes_that_train_together_sample_at_a_server_each(
    serve: Callable[..., Served], tmp_path: Path
) -> None:
    """Under torchrun with FSDP2: the first process writes and pushes, each asks its own server."""
    served = [serve("scale:control", "--weights", str(tmp_path)) for _ in range(2)]
    places = ", ".join(one.url for one in served)
    for name, place in (("here", "null"), ("there", f"'{places}'")):
        (tmp_path / f"{name}.yaml").write_text(
            "extends: scale\nabout: x\nstart: scale:m2la\nstages:\n"
            "  convert: null\n  cpt: null\n  sft_short: null\n  sft_long: null\n  opd: null\n"
            f"  gspo: {{rollouts: {place}, steps: 1, documents: 2, group: 2, max_new_tokens: 4,\n"
            "    data: {videos: 6, lengths: {2: 1.0, 8: 0.0, 16: 0.0, 32: 0.0},\n"
            "    families: [shape, motion]}}\n"
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                   "--standalone", "-m", "internvideo3.harness.cli", "train",
                   str(tmp_path / f"{name}.yaml"), "--out", str(tmp_path / name)]  # fmt: skip
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    assert weights(tmp_path / "here", "gspo") == weights(tmp_path / "there", "gspo")
