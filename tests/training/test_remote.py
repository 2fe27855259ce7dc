"""A teacher behind a server: `pytest tests/training/test_remote.py`."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from internvideo3.model.checkpoint import load_model
from internvideo3.model.prompt import Prompter
from internvideo3.model.session import Session
from internvideo3.training import train as training
from internvideo3.training.documents import WorldDocuments
from internvideo3.training.endpoint import Endpoint, EndpointError
from internvideo3.training.policy import Policy, token_logps
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Opd, Optimiser, Recipe, RecipeError, WorldData
from internvideo3.training.train import build_stage, train

DATA = WorldData(lengths={2: 1.0}, videos=6, profiles={"main": 1.0}, families=("shape", "motion"))


class LogprobServer:
    """What a server of log-probabilities computes, with a real model that sees the frames."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.shown: list[np.ndarray[Any, Any]] = []

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        (video,) = body["videos"]
        pictures = [Image.open(io.BytesIO(base64.b64decode(one))) for one in video["frames"]]
        pixels_THWC = np.stack([np.asarray(picture) for picture in pictures])
        self.shown.append(pixels_THWC)
        frames = SimpleNamespace(**(video | {"pixels_THWC": pixels_THWC}))
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
