"""A teacher behind a server: `pytest tests/training/test_remote.py`."""

from __future__ import annotations

import base64
import io
import itertools
import re
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from internvideo3.harness.cli import app
from internvideo3.model.checkpoint import load_model
from internvideo3.model.prompt import Prompter
from internvideo3.model.session import Session
from internvideo3.training import train as training
from internvideo3.training.documents import Prompt, WorldDocuments
from internvideo3.training.endpoint import Endpoint, EndpointError
from internvideo3.training.policy import Policy, token_logps, vision_ids
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Opd, Optimiser, Recipe, RecipeError, WorldData
from internvideo3.training.remote import PushedWeights, RemoteSampler, RemoteTeacher, decoded
from internvideo3.training.rollouts import Response
from internvideo3.training.served import ServedPolicy
from internvideo3.training.train import build_stage, train

DATA = WorldData(lengths={2: 1.0}, videos=6, profiles={"main": 1.0}, families=("shape", "motion"))


class LogprobServer:
    """What a server of log-probabilities computes, with a real model that sees the frames."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.shown: list[np.ndarray[Any, Any]] = []
        self.blind = False
        """Whether whatever is shown looks the same to it."""

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        (video,) = body["videos"]
        pictures = [Image.open(io.BytesIO(base64.b64decode(one))) for one in video["frames"]]
        pixels_THWC = np.stack([np.asarray(picture) for picture in pictures])
        self.shown.append(pixels_THWC)
        seen_THWC = np.zeros_like(pixels_THWC) if self.blind else pixels_THWC
        frames = SimpleNamespace(**(video | {"pixels_THWC": seen_THWC}))
        ids = body["prompt"]
        values = self._logps(ids, frames)
        tokens = tokenizer.convert_ids_to_tokens(ids)
        return {"choices": [{"logprobs": {"tokens": tokens, "token_logprobs": values}}]}

    @torch.no_grad()
    def _logps(self, ids: list[int], frames: Any) -> list[float]:
        """Of the reply's ids, one by one in a session; of the prompt's, none."""
        opening = Prompter(self.processor).tokenize("<|im_start|>assistant\n")
        start = next(n for n in range(len(ids), 0, -1) if ids[n - len(opening) : n] == opening)
        text = self.processor.tokenizer.decode(ids[:start])
        # The processor writes time stamps and pads itself.
        head, _, rest = text.partition("<|vision_start|>")
        tail = rest.rpartition("<|vision_end|>")[2]
        session = Session(self.model, self.processor, media_options={"do_resize": False})
        session.append_text(f"{head}<|vision_start|><|video_pad|><|vision_end|>{tail}", [frames])
        assert list(session.ids) == ids[:start]
        values = [0.0] * start
        for token in ids[start:]:
            values.append(float(session.logits_last.float().log_softmax(-1)[token]))
            session.append_ids([token])
        return values


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model("scale:m2la", "cpu", torch.float32)


@pytest.fixture
def scoring(teacher: Any) -> Iterator[tuple[Any, LogprobServer]]:
    served = LogprobServer(*load_model("scale:base", "cpu", torch.float32))
    teacher.reply = served.reply
    yield teacher, served


def options(url: str, **changed: Any) -> Opd:
    return Opd(
        kind="opd", teacher=url, group=2, max_new_tokens=5, documents=2, pack_tokens=2048,
        optimiser=Optimiser(learning_rate=1e-4), data=DATA, **({"steps": 2} | changed),
    )  # fmt: skip


def test_the_teachers_log_probabilities_cross_the_wire_and_its_pixels_are_the_rollouts(
    scoring: Any, loaded: Any
) -> None:
    server, served = scoring
    model, processor = loaded
    policy = Policy(deepcopy(model))
    stage: Any = build_stage(options(server.url), processor, policy, 0, Processes())
    works, _ = stage.works(0, policy)
    source = WorldDocuments(DATA, processor, 0)
    # The second request is the look at blank frames.
    blanked = served.shown.pop(1)
    assert len(np.unique(blanked)) == 1 and blanked.shape == served.shown[0].shape
    for shown, index in zip(served.shown, (0, 0, 1, 1), strict=True):
        assert np.array_equal(shown, source.prompt(index).frames.pixels_THWC)
    (work,) = works
    labels_N = work.pack.labels_T[work.pack.labels_T != -100]
    here = Policy(served.model)
    with torch.no_grad():
        own_N = here(work.pack, lambda h, w: token_logps(h, w, labels_N, ()))
    loss = work.loss
    taught_N = next(
        cell.cell_contents for name, cell in zip(
            loss.__code__.co_freevars, loss.__closure__ or (), strict=True
        ) if name == "taught_N"
    )  # fmt: skip
    assert (taught_N - own_N).abs().max() < 1e-4
    value = policy(work.pack, work.loss)
    value.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.parameters())


@pytest.mark.parametrize("form", ["text", "token_id"])
def test_tokens_may_be_told_as_text_or_as_ids(scoring: Any, loaded: Any, form: str) -> None:
    server, served = scoring
    usual, decode = served.reply, loaded[1].tokenizer.decode

    def told(body: dict[str, Any]) -> dict[str, Any]:
        reply = usual(body)
        reply["choices"][0]["logprobs"]["tokens"] = [
            f"token_id:{one}" if form == "token_id" else decode([one]) for one in body["prompt"]
        ]
        return reply

    server.reply = told
    policy = Policy(deepcopy(loaded[0]))
    stage: Any = build_stage(options(server.url), loaded[1], policy, 0, Processes())
    works, _ = stage.works(0, policy)
    assert len(works) == 1


def test_another_tokenizer_behind_the_server_is_refused(scoring: Any, loaded: Any) -> None:
    server, served = scoring
    usual = served.reply

    def shifted(body: dict[str, Any]) -> dict[str, Any]:
        reply = usual(body)
        reply["choices"][0]["logprobs"]["tokens"][3] += "s"
        return reply

    server.reply = shifted
    policy = Policy(deepcopy(loaded[0]))
    stage: Any = build_stage(options(server.url), loaded[1], policy, 0, Processes())
    with pytest.raises(RecipeError, match="other token ids .* needs a teacher with the student's"):
        stage.works(0, policy)


def opd_stage(server: Any, loaded: Any) -> tuple[Any, Policy]:
    policy = Policy(deepcopy(loaded[0]))
    stage: Any = build_stage(options(server.url), loaded[1], policy, 0, Processes())
    return stage, policy


def test_a_teacher_that_does_not_look_at_the_video_is_refused(scoring: Any, loaded: Any) -> None:
    server, served = scoring
    served.blind = True
    stage, policy = opd_stage(server, loaded)
    with pytest.raises(EndpointError, match="does not look at the field `videos`.*serve-policy"):
        stage.works(0, policy)
    assert len(server.requests) == 2


def test_a_teacher_that_looks_is_asked_once_more_in_a_run(scoring: Any, loaded: Any) -> None:
    server, _ = scoring
    stage, policy = opd_stage(server, loaded)
    for step in range(2):
        stage.works(step, policy)
    # Two prompts of a step, two responses to each, and one look.
    assert len(server.requests) == 2 * 2 * 2 + 1


def test_where_all_is_certain_the_next_response_is_looked_at(scoring: Any, loaded: Any) -> None:
    """A teacher may be sure of a response whatever the video shows."""
    server, served = scoring
    usual = served.reply

    def certain(body: dict[str, Any]) -> dict[str, Any]:
        reply = usual(body)
        if len(server.requests) <= 2:
            told = reply["choices"][0]["logprobs"]
            told["token_logprobs"] = [-1e-7] * len(told["tokens"])
        return reply

    server.reply = certain
    stage, policy = opd_stage(server, loaded)
    stage.works(0, policy)
    assert len(server.requests) == 2 * 2 + 2


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (float("nan"), "gives nan as log-probability of token .* the server's own log"),
        (float("-inf"), "gives -inf as log-probability"),
        (None, "gives None as log-probability"),
        ("-1.5", "gives '-1.5' as log-probability"),
        (0.7, "gives 0.7 as log-probability .* at most 0"),
        ((), "log-probabilities of .* ids; one of each"),
    ],
)
def test_numbers_that_are_no_log_probabilities_are_refused(
    scoring: Any, loaded: Any, last: Any, said: str
) -> None:
    server, served = scoring
    usual = served.reply

    def broken(body: dict[str, Any]) -> dict[str, Any]:
        reply = usual(body)
        values = reply["choices"][0]["logprobs"]["token_logprobs"]
        values[-1:] = [] if last == () else [last]
        return reply

    server.reply = broken
    stage, policy = opd_stage(server, loaded)
    with pytest.raises(EndpointError, match=said):
        stage.works(0, policy)


@pytest.fixture
def sampling(teacher: Any, loaded: Any) -> tuple[Any, RemoteSampler, Prompt]:
    """A server of rollouts in this process, what asks it, and a prompt."""
    policy = ServedPolicy("scale:m2la", "cpu", "float32")
    teacher.shows = lambda frames: frames

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        frames = [teacher.shows(decoded(one)) for one in body["videos"]]
        made = policy.sample(
            body["prompt"], frames, count=body["n"], seed=body["seed"],
            barred=tuple(map(int, body["logit_bias"])), max_new_tokens=body["max_tokens"],
        )  # fmt: skip
        return {"choices": [
            {"token_ids": list(one.ids), "logprobs": {"token_logprobs": list(one.logps)}}
            for one in made
        ]}  # fmt: skip

    teacher.reply = reply
    weights = PushedWeights(Endpoint(url=teacher.url, model="m"), Path("/nowhere"), policy.digest)
    source = WorldDocuments(DATA, loaded[1], 0)
    barred = vision_ids(*loaded)
    return teacher, RemoteSampler(weights, source.prompter, barred, 5), source.prompt(0)


def test_rollouts_that_look_at_the_video_are_compared_once(sampling: Any) -> None:
    server, sampler, prompt = sampling
    first = sampler.sample(prompt, 2, 7)
    assert sampler.sample(prompt, 2, 7) == first
    assert len(server.requests) == 3
    real, blanked, again = (decoded(body["videos"][0]).pixels_THWC for body in server.requests)
    assert np.array_equal(real, prompt.frames.pixels_THWC) and np.array_equal(again, real)
    assert len(np.unique(blanked)) == 1


@pytest.mark.parametrize("seeded", [True, False], ids=["seeded", "without seeds"])
def test_rollouts_of_a_server_that_does_not_look_at_the_video_are_refused(
    sampling: Any, seeded: bool
) -> None:
    """Also where it draws others each time: equal beginnings are then compared."""
    server, sampler, prompt = sampling
    server.shows = blank_white
    usual = server.reply
    seeds = itertools.count(100)
    server.reply = lambda body: usual(body if seeded else body | {"seed": next(seeds)})
    with pytest.raises(EndpointError, match="does not look at the field `videos`"):
        sampler.sample(prompt, 8, 7)


def blank_white(frames: Any) -> Any:
    return replace(frames, pixels_THWC=np.full_like(frames.pixels_THWC, 255))


def told_ids(value: Any) -> Any:
    return lambda choice: choice | {"token_ids": value}


def told_logps(value: Any) -> Any:
    return lambda choice: choice | {"logprobs": {"token_logprobs": value}}


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (told_logps([-0.5, float("nan")]), "gives nan as log-probability of token 2 of 2"),
        (told_logps([-0.5, 1.0]), "gives 1.0 as log-probability"),
        (told_logps([-0.5]), "no sampled ids with their log-probabilities"),
        (told_logps(None), "no sampled ids with their log-probabilities"),
        (told_ids([]), "no sampled ids with their log-probabilities"),
        (lambda choice: told_ids(list(range(30, 38)))(told_logps([-1.0] * 8)(choice)),
         "sampled 8 tokens; max_tokens was 5"),
        (told_ids([30, 10**6]), "sampled the ids .* which logit_bias -100 bars"),
        (lambda choice: "text", "no sampled ids with their log-probabilities"),
    ],
)  # fmt: skip
def test_rollouts_that_cannot_be_trained_on_are_refused(
    sampling: Any, breaks: Any, said: str
) -> None:
    server, sampler, prompt = sampling
    plain = {"token_ids": [30, 31], "logprobs": {"token_logprobs": [-0.5, -0.5]}}
    server.reply = lambda body: {"choices": [breaks(plain)] * body["n"]}
    with pytest.raises(EndpointError, match=said):
        replace(sampler, barred=(*sampler.barred, 10**6)).sample(prompt, 2, 7)


@pytest.mark.parametrize("fingerprint", [7, ["other"], "other weights"])
def test_other_weights_behind_the_server_are_refused_whatever_it_calls_them(
    sampling: Any, fingerprint: Any
) -> None:
    server, sampler, prompt = sampling
    usual = server.reply
    server.reply = lambda body: (
        {} if "model_path" in body else usual(body) | {"system_fingerprint": fingerprint}
    )
    with pytest.raises(EndpointError, match="samples from weights .* another trainer"):
        sampler.sample(prompt, 2, 7)


@pytest.fixture
def saying() -> Iterator[Callable[[int, str], str]]:
    """Starts a server that always says the same; gives its address."""
    started: list[HTTPServer] = []

    def go(status: int, page: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(page.encode())

            def log_message(self, *_: Any) -> None:
                pass

        started.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}/v1"

    yield go
    for one in started:
        one.shutdown()
        one.server_close()


@pytest.mark.parametrize(
    ("status", "page", "waits", "said"),
    [
        (500, "out of memory", 2, "did not answer in 3 attempts; the last time: 500: out of mem"),
        (404, "no such path", 0, "refused the request, 404: no such path"),
        (200, "<html>a page</html>", 0, "answers with a page .* which no API does"),
        (200, '{"choices": [{"tok', 2, "did not answer in 3 attempts.*the answer is no JSON"),
        (200, "[]", 0, "gives no log-probabilities of a prompt"),
        (200, '{"choices": [{"text": "words", "logprobs": null}]}', 0, "gives no log-prob"),
    ],
)
def test_what_is_no_answer_is_told_as_such(
    saying: Any, loaded: Any, status: int, page: str, waits: int, said: str
) -> None:
    waited: list[float] = []
    endpoint = Endpoint(url=saying(status, page), model="m", attempts=3, sleep=waited.append)
    asks = RemoteTeacher(endpoint, loaded[1].tokenizer)
    prompt = WorldDocuments(DATA, loaded[1], 0).prompt(0)
    with pytest.raises(EndpointError, match=said):
        asks.logps(prompt, [1, 2], Response((3,), (-1.0,), ""))
    assert len(waited) == waits


def test_an_address_that_is_none_is_told_at_once() -> None:
    with pytest.raises(EndpointError, match="'http://host:port/v1' is no http address"):
        Endpoint(url="http://host:port/v1", model="m", sleep=pytest.fail).post("x", {})


def test_a_dead_server_is_an_error_of_the_users(
    tmp_path: Path, teacher: Any, monkeypatch: Any
) -> None:
    """Not a bug to report: `Error: ...`, with what to do."""
    teacher.server.shutdown()
    teacher.server.server_close()
    monkeypatch.setattr(training, "Endpoint", lambda **told: Endpoint(**told, attempts=1))
    data = {"lengths": {2: 1.0}, "videos": 6, "families": ["shape", "motion"]}
    stage = {"kind": "opd", "teacher": teacher.url, "steps": 1, "group": 2, "documents": 2,
             "max_new_tokens": 5, "pack_tokens": 2048, "data": data,
             "optimiser": {"learning_rate": 1e-3}}  # fmt: skip
    recipe = {"about": "test", "start": "scale:m2la", "stages": {"opd": stage}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    command = ["train", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert re.search(r"^Error: http\S+ did not answer in 1 attempts.*repeat", done.stderr, re.M)
    assert "Unforeseen" not in done.stderr


def test_a_teacher_that_dies_while_it_speaks_is_asked_again_then_given_up(
    scoring: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replies break off in the middle (http.client.IncompleteRead)."""
    server, _ = scoring
    waits: list[float] = []
    monkeypatch.setattr(
        training, "Endpoint", lambda **told: Endpoint(**told, attempts=3, sleep=waits.append)
    )
    policy = Policy(deepcopy(loaded[0]))
    stage: Any = build_stage(options(server.url), loaded[1], policy, 0, Processes())
    server.missing = [10_000, 10_000]
    works, _ = stage.works(0, policy)
    assert len(works) == 1 and waits == [1.0, 2.0]
    server.missing = [10_000] * 3
    with pytest.raises(EndpointError, match="did not answer in 3 attempts.*IncompleteRead"):
        stage.works(1, policy)


def test_a_teacher_that_goes_away_stops_the_run_with_its_state_saved(
    scoring: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the same command goes on from there when it is back."""
    server, served = scoring
    waits: list[float] = []
    monkeypatch.setattr(
        training, "Endpoint", lambda **told: Endpoint(**told, attempts=3, sleep=waits.append)
    )
    recipe = Recipe(about="test", start="scale:m2la", stages={
        "opd": options(server.url, save_every=50)
    })  # fmt: skip

    def dies(name: str, done: int, total: int) -> None:
        server.failures = [503, None, 503] if done == 1 else []

    with pytest.raises(EndpointError, match="did not answer in 3 attempts"):
        train(recipe, tmp_path / "out", dies)
    assert waits == [1.0, 2.0]
    assert list((tmp_path / "out" / "1-opd" / "states").glob("step-00000001/progress.json"))
    trained = train(recipe, tmp_path / "out")
    train(recipe, tmp_path / "whole")
    weights = [(tmp_path / run / "1-opd" / "checkpoint" / "model.safetensors").read_bytes()
               for run in ("out", "whole")]  # fmt: skip
    assert trained.checkpoint is not None and weights[0] == weights[1]
