"""States and curves that cannot be written: `pytest tests/training/test_checkpoints.py`."""

from __future__ import annotations

import json
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from typer.testing import CliRunner

from internvideo3.harness.cli import app
from internvideo3.training import checkpoints
from internvideo3.training.checkpoints import Progress, StateError, resume, save
from internvideo3.training.curves import Curves
from internvideo3.training.processes import Processes


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does: writing beyond a place fails, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Taught:
    """A small model in training, and where its states are."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.group = folder, Processes("cpu")
        self.model = torch.nn.Linear(256, 256)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def learn(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, 256)).square().sum().backward()
        self.optimizer.step()

    def save(self, step: int, group: Processes | None = None) -> None:
        progress = Progress(step=step, digest="d")
        save(self.folder, self.model, self.optimizer, progress, group or self.group)

    def resume(self) -> int:
        return resume(self.folder, self.model, self.optimizer, "d", self.group)

    def weight(self) -> torch.Tensor:
        return self.model.weight.detach().clone()


@pytest.fixture
def taught(tmp_path: Path) -> Taught:
    made = Taught(tmp_path / "states")
    made.learn()
    return made


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


@pytest.mark.parametrize("size", [0, 1000, 300_000], ids=["at once", "early", "amid the tensors"])
def test_a_state_that_cannot_be_written_leaves_the_one_before_it(taught: Taught, size: int) -> None:
    taught.save(1)
    kept = taught.weight()
    taught.learn()
    with files_of_at_most(size), pytest.raises(StateError) as told:
        taught.save(2)
    said = str(told.value)
    assert f"{taught.folder}/step-00000002 cannot be written: File too large" in said
    assert "step-00000001 stays" in said and "repeat the command" in said
    assert "\n" not in said
    assert names(taught.folder) == ["step-00000001"]
    assert taught.resume() == 1 and torch.equal(taught.weight(), kept)
    taught.learn()
    taught.save(2)
    assert names(taught.folder) == ["step-00000002"]


def test_files_of_others_beside_states_stay_and_end_nothing(
    taught: Taught, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taught.folder.mkdir()
    (taught.folder / ".DS_Store").write_text("a desktop's")
    (taught.folder / "step-00000001.part").mkdir()
    taught.save(2)
    assert names(taught.folder) == [".DS_Store", "step-00000002"]

    def held(path: Path, **_: Any) -> None:
        if not path.name.endswith(".part"):
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoints.shutil, "rmtree", held)
    with caplog.at_level(logging.WARNING):
        taught.save(3)
    assert "step-00000002 cannot be removed" in caplog.text and "Permission denied" in caplog.text
    assert taught.resume() == 3


def test_copies_that_somebody_keeps_beside_states_stay_and_are_no_states(taught: Taught) -> None:
    """`step-original` is as long as a state's name, and comes behind all of them."""
    taught.save(1)
    kept = ["step-00000001-keep", "step-00000001.part.old", "step-notes", "step-original"]
    for name in kept:
        shutil.copytree(taught.folder / "step-00000001", taught.folder / name)
    (taught.folder / "step-00000003.part").mkdir()
    taught.learn()
    taught.save(2)
    assert names(taught.folder) == sorted([*kept, "step-00000002"])
    assert (taught.folder / "step-notes" / "progress.json").is_file()
    newest = taught.weight()
    taught.learn()
    assert taught.resume() == 2 and torch.equal(taught.weight(), newest)


def test_the_first_state_that_cannot_be_written_says_that_there_is_none(taught: Taught) -> None:
    with files_of_at_most(1000), pytest.raises(StateError, match="there is no state yet"):
        taught.save(1)
    assert names(taught.folder) == [] and taught.resume() == 0


def test_a_place_that_is_a_file_is_told_by_its_path(taught: Taught) -> None:
    taught.folder.write_text("a file")
    with pytest.raises(StateError, match=r"states/step-00000001\.part: Not a directory"):
        taught.save(1)


def test_another_process_that_cannot_write_ends_this_one_without_a_state(taught: Taught) -> None:
    """As the first of two; what it wrote itself is removed again."""

    class OneOfTwo(Processes):
        asked = 0

        def most(self, number: int) -> int:
            self.asked += 1
            return max(number, int(self.asked == 3))  # when all have written their parts

    taught.save(1)
    with pytest.raises(StateError, match="another process could not.*step-00000001 stays"):
        taught.save(2, OneOfTwo("cpu"))
    assert names(taught.folder) == ["step-00000001"]


def test_a_state_that_is_there_is_not_put_at_risk_again(
    taught: Taught, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that stays down ends each repeated command at the same step."""
    taught.save(1)
    monkeypatch.setattr(checkpoints, "save_state", lambda *_, **__: pytest.fail("written again"))
    taught.save(1)
    assert taught.resume() == 1


def test_what_travelled_from_another_process_is_put_in_words(taught: Taught) -> None:
    """Its cause stays behind, and torch's own words do not name it."""
    lost = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

    def fails(*_: Any, **__: Any) -> None:
        raise CheckpointException("write", {1: (lost, StackSummary())})

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StateError, match="as on a full"):
        patch.setattr(checkpoints, "save_state", fails)
        taught.save(1)


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "breaks",
    [
        lambda place: halved(place / "__0_0.distcp"),
        lambda place: (place / "__0_0.distcp").unlink(),
        lambda place: (place / ".metadata").unlink(),
        lambda place: (place / "progress.json").write_text(""),
        lambda place: (place / "progress.json").write_text('{"step": 1}'),
    ],
    ids=["half the tensors", "no tensors", "no metadata", "empty progress", "another progress"],
)
def test_a_state_that_cannot_be_read_is_told_with_its_place(
    taught: Taught, breaks: Callable[[Path], object]
) -> None:
    taught.save(1)
    breaks(taught.folder / "step-00000001")
    with pytest.raises(StateError, match=r"the state .*/step-00000001 cannot be read: .*stage aga"):
        taught.resume()


def rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_curves_that_cannot_be_written_warn_once_and_never_wait(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """More rows than the queue of tensorboardX's own writer holds."""
    curves = Curves(tmp_path, 0)
    with files_of_at_most(100), caplog.at_level(logging.WARNING):
        for step in range(1, 40):
            curves.add({"step": step, "loss": 1.0, "norm": 2.0, "rate": 3.0, "seconds": 4.0})
        curves.close()
    (warned,) = caplog.records
    assert "tensorboard cannot be written (File too large)" in warned.getMessage()
    assert "metrics.jsonl has every step" in warned.getMessage()


def test_training_goes_on_without_curves_and_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """Through the command: no folder for TensorBoard; then no room for a state; then room."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text(
        "about: test\nstart: scale:m2la\nseed: 5\nstages:\n"
        "  sft: {kind: sft, steps: 2, documents: 1, pack_tokens: 2048, save_every: 1,\n"
        "    optimiser: {learning_rate: 1.0e-3}, data: {lengths: {2: 1.0}, videos: 4}}\n"
    )
    stage = tmp_path / "out" / "1-sft"
    stage.mkdir(parents=True)
    (stage / "tensorboard").write_text("a file in its place")
    command = ["train", str(recipe), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with files_of_at_most(1_000_000):
        stopped: Any = CliRunner().invoke(app, command)
    assert stopped.exit_code == 1
    (line,) = [one for one in stopped.stderr.splitlines() if one.startswith("Error")]
    assert "states/step-00000001 cannot be written: File too large" in line
    assert "Traceback" not in stopped.output
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [row["step"] for row in rows(stage / "metrics.jsonl")] == [1, 2]
