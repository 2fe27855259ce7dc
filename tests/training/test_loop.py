"""One loop for all stages, exact and safe to kill: `pytest tests/training/test_loop.py`."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from typer.testing import CliRunner

from internvideo3.harness.cli import app
from internvideo3.harness.train import LOCK, alone_in, run_training
from internvideo3.model.checkpoint import load_model
from internvideo3.training import train as training
from internvideo3.training.checkpoints import CheckpointMismatchError, Progress, newest, save
from internvideo3.training.curation.records import DataError
from internvideo3.training.documents import WorldDocuments
from internvideo3.training.loop import Loop, TrainingError
from internvideo3.training.packing import pack
from internvideo3.training.policy import Policy
from internvideo3.training.recipe import (
    Cpt,
    Gspo,
    Opd,
    Optimiser,
    Recipe,
    RecipeError,
    Sft,
    StageOptions,
    WorldData,
    load_recipe,
)
from internvideo3.training.train import quiet, train

START = "scale:m2la"


def sft(**changed: Any) -> Sft:
    data = WorldData(lengths={2: 0.5, 4: 0.5}, videos=6, questions=3)
    optimiser = Optimiser(learning_rate=1e-3, warmup=0.5)
    options = Sft(
        kind="sft", steps=2, documents=8, pack_tokens=2048, optimiser=optimiser, data=data
    )
    return replace(options, **changed)


def recipe(stage: StageOptions | None = None, seed: int = 5) -> Recipe:
    return Recipe(about="test", start=START, seed=seed, stages={"sft": stage or sft()})


def metrics(out: Path) -> list[dict[str, float]]:
    lines = (out / "1-sft" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(out: Path) -> bytes:
    return (out / "1-sft" / "checkpoint" / "model.safetensors").read_bytes()


def parameters(out: Path) -> dict[str, torch.Tensor]:
    model, _ = load_model(out / "1-sft" / "checkpoint", "cpu", torch.float32)
    return dict(model.named_parameters())


def mean_distance(one: Path, other: Path) -> float:
    """Mean distance of weights; a single one may differ by a step of Adam's where its gradient is
    nothing but rounding."""
    theirs = parameters(other)
    apart = [(p - theirs[n]).abs().flatten() for n, p in parameters(one).items()]
    return float(torch.cat(apart).mean())


def stopped_after(steps: int) -> Callable[[str, int, int], None]:
    """Progress that sends this process a SIGTERM when so many steps are done."""

    def progress(name: str, done: int, total: int) -> None:
        if done == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return progress


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight documents in one pass, never interrupted."""
    out = tmp_path_factory.mktemp("plain")
    train(recipe(), out)
    return out


def test_training_writes_what_evaluation_loads(plain: Path) -> None:
    before, _ = load_model(START, "cpu", torch.float32)
    after = parameters(plain)
    moved = [n for n, p in before.named_parameters() if not torch.equal(p, after[n])]
    assert moved and not any("visual" in name for name in moved)
    rows = metrics(plain)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["documents"] == 8 and row["answers"] == 24 for row in rows)


def test_metrics_say_how_much_arithmetic_and_tensorboard_reads_them(plain: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    rows = metrics(plain)
    assert all(row["flops"] > 6 * 5e5 * row["tokens"] for row in rows)
    assert all(row["tokens_per_s"] == row["tokens"] / row["seconds"] for row in rows)
    assert "mfu" not in rows[0], "no peak is known of a CPU"
    (path,) = (plain / "1-sft" / "tensorboard").glob("events.*")
    data, told = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
        event = Event.FromString(data[12 : 12 + length])
        told += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + length :]
    losses = [value for _, tag, value in told if tag == "loss"]
    assert losses == pytest.approx([row["loss"] for row in rows])


def test_accumulating_eight_passes_equals_one_pass(plain: Path, tmp_path: Path) -> None:
    train(recipe(sft(micro_documents=1)), tmp_path)
    for ours, theirs in zip(metrics(tmp_path), metrics(plain), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-5
        assert abs(ours["norm"] - theirs["norm"]) < 1e-4 * theirs["norm"]


def test_packed_documents_do_not_see_one_another() -> None:
    """A document's hidden states in a row of three are those it has alone."""
    model, processor = load_model(START, "cpu", torch.float32)
    source = WorldDocuments(sft().data or pytest.fail(), processor, 1)
    taught = [source.taught(index) for index in range(3)]
    policy, found = Policy(model), []
    with torch.no_grad():
        for row in (taught, taught[1:2]):
            policy(pack(row, model), lambda hidden, head: found.append(hidden) or hidden)
    first = sum(branch.said for branch in taught[0].branches)
    own = found[1]
    assert (found[0][first : first + len(own)] - own).abs().max() < 1e-5


def test_recomputing_activations_changes_nothing(plain: Path, tmp_path: Path) -> None:
    train(recipe(sft(recompute=True)), tmp_path)
    assert [row["loss"] for row in metrics(tmp_path)] == [row["loss"] for row in metrics(plain)]


def test_stopped_and_resumed_is_bit_identical(plain: Path, tmp_path: Path) -> None:
    stopped = train(recipe(), tmp_path, stopped_after(1))
    assert stopped.checkpoint is None and len(metrics(tmp_path)) == 1
    trained = train(recipe(), tmp_path)
    assert trained.checkpoint == tmp_path / "1-sft" / "checkpoint"
    assert weights(tmp_path) == weights(plain)
    assert [row["loss"] for row in metrics(tmp_path)] == [row["loss"] for row in metrics(plain)]
    done = (tmp_path / "1-sft" / "metrics.jsonl").stat().st_mtime_ns
    train(recipe(), tmp_path)
    assert (tmp_path / "1-sft" / "metrics.jsonl").stat().st_mtime_ns == done


def test_a_first_step_that_fails_leaves_nothing_that_changes_the_next_try(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch takes a step of an optimiser that has taken none, to tell its state."""

    def unusable(self: WorldDocuments, index: int) -> Any:
        raise DataError("unusable")

    with monkeypatch.context() as patched, pytest.raises(DataError, match="unusable"):
        patched.setattr(WorldDocuments, "taught", unusable)
        train(recipe(), tmp_path)
    assert newest(tmp_path / "1-sft" / "states") is None
    train(recipe(), tmp_path)
    assert weights(tmp_path) == weights(plain)


def test_a_state_before_the_first_step_is_not_gone_on_from(plain: Path, tmp_path: Path) -> None:
    """Earlier versions wrote one."""

    def saves(self: Loop, step: int) -> None:
        begun = Progress(step=0, digest=self.digest)
        save(self.folder / "states", self.policy, self.optimizer, begun, self.group)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Loop, "_train", saves)
        patched.setattr(Loop, "_save", lambda self, *_: None)
        patched.setattr(training, "_export", lambda *_: None)
        train(recipe(), tmp_path)
    states = tmp_path / "1-sft" / "states"
    assert [one.name for one in states.iterdir()] == ["step-00000000"]
    train(recipe(), tmp_path)
    assert weights(tmp_path) == weights(plain)
    assert [one.name for one in states.iterdir()] == ["step-00000002"]


def test_another_recipes_state_is_refused(tmp_path: Path) -> None:
    train(recipe(), tmp_path, stopped_after(1))
    with pytest.raises(CheckpointMismatchError, match="another recipe, seed or start"):
        train(recipe(seed=6), tmp_path)
    assert len(metrics(tmp_path)) == 1


def test_a_run_without_a_state_that_is_repeated_with_other_options_tells_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the start, on which the losses before it are measured."""
    folder, digests = tmp_path / "1-cpt", []

    def cpt(**changed: Any) -> Recipe:
        stage = Cpt(**{**vars(sft(steps=1, documents=4)), "kind": "cpt", "probe": 1})
        told = {"start": START, "seed": 5, **changed}
        return Recipe(about="test", stages={"cpt": stage}, **told)

    def killed(self: Loop) -> bool:
        digests.append(self.digest)
        raise KeyboardInterrupt

    def told() -> tuple[dict[str, Any], dict[str, Any]]:
        stage = json.loads((folder / "stage.json").read_text())
        return stage, json.loads((folder / "losses.json").read_text())["before CPT"]

    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(Loop, "run", killed)
        for again in (cpt(start="scale:control"), cpt(seed=6)):
            with pytest.raises(KeyboardInterrupt):
                train(again, tmp_path)
            seen.append(told())
    train(cpt(seed=6), tmp_path)
    (first, lost), (second, before) = seen
    assert (first["start"], second["start"], second["seed"]) == ("scale:control", START, 6)
    assert [first["digest"], second["digest"]] == digests and lost != before
    assert told() == (second, before)
    with pytest.raises(CheckpointMismatchError):
        train(cpt(), tmp_path)
    assert told() == (second, before), "what is there is that of the checkpoint"


def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_state(tmp_path: Path) -> None:
    wild = Optimiser(learning_rate=1e30, warmup=0.0, weight_decay=0.0)
    with pytest.raises(TrainingError, match="loss .*Lower the learning rate"):
        train(recipe(sft(optimiser=wild, steps=3, save_every=1)), tmp_path)
    assert list((tmp_path / "1-sft" / "states").glob("step-*/progress.json"))
    assert not (tmp_path / "1-sft" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (sft(data=WorldData(lengths={2: 0.5, 4: 0.4}, videos=2)), "sum to 1"),
        (sft(data=None), "stages.sft.data: not set"),
        (sft(pack_tokens=40), "raise pack_tokens"),
        (sft(data=WorldData(lengths={2: 1.0}, videos=2, families=("order",))), "no family"),
    ],
)
def test_senseless_options_are_told(tmp_path: Path, stage: Sft, said: str) -> None:
    with pytest.raises((RecipeError, ValueError), match=said):
        train(recipe(stage), tmp_path)


def trained_by_two(recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """A recipe trained by the command line in two processes of torchrun."""
    launched = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", _port()]
    return subprocess.run(
        [sys.executable, *launched, "-m", "internvideo3.harness.cli", "train", str(recipe),
         "--out", str(out)],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2], ids=["documents divided", "rows divided"])
def test_two_processes_equal_one(plain: Path, tmp_path: Path, parts: int) -> None:
    """FSDP2 over gloo, through torchrun and the command line."""
    written = tmp_path / "own.yaml"
    options = sft(sequence_parallel=parts)
    stage = json.loads(json.dumps({"kind": "sft", **_plain_data(options)}))
    written.write_text(
        yaml.safe_dump({"about": "test", "start": START, "seed": 5, "stages": {"sft": stage}})
    )
    done = trained_by_two(written, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(metrics(tmp_path / "out"), metrics(plain), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-5
        assert abs(ours["norm"] - theirs["norm"]) < 1e-4 * theirs["norm"]
    assert mean_distance(tmp_path / "out", plain) < 1e-6


@pytest.mark.slow
def test_two_processes_share_reference_and_teacher_and_learn_what_one_does(tmp_path: Path) -> None:
    """Three prompts, so that one process has a row less to show the models that they share."""
    data = WorldData(lengths={2: 0.5, 4: 0.5}, videos=6, profiles={"main": 1.0})
    common: dict[str, Any] = {
        "steps": 1, "documents": 3, "micro_documents": 1, "pack_tokens": 2048, "group": 3,
        "max_new_tokens": 6, "data": data, "optimiser": Optimiser(learning_rate=1e-4, warmup=0.0),
    }  # fmt: skip
    gspo = Gspo(kind="gspo", updates=2, **common)
    opd = Opd(kind="opd", teacher="scale:base", **common)
    written = tmp_path / "two.yaml"
    stages = {"gspo": _plain_data(gspo), "opd": _plain_data(opd)}
    written.write_text(json.dumps({"about": "t", "start": START, "seed": 5, "stages": stages}))
    train(load_recipe(written), tmp_path / "one")
    done = trained_by_two(written, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("1-gspo", "2-opd"):
        (ours,), (theirs,) = (
            [json.loads(line) for line in (tmp_path / out / name / "metrics.jsonl").open()]
            for out in ("two", "one")
        )
        watched = ["reward", "kl"] if name == "1-gspo" else []
        for key in ("loss", "norm", "response_tokens", *watched):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), (name, key)


@pytest.mark.slow
def test_a_rollout_server_that_is_down_ends_both_processes(tmp_path: Path) -> None:
    """Only the first process pushes weights; the other one would wait for it for ever."""
    data = WorldData(lengths={2: 1.0}, videos=4, profiles={"main": 1.0})
    gspo = Gspo(
        kind="gspo", steps=1, documents=2, pack_tokens=2048, group=2, max_new_tokens=4, data=data,
        optimiser=Optimiser(learning_rate=1e-4), rollouts=f"http://127.0.0.1:{_port()}/v1",
    )  # fmt: skip
    written = tmp_path / "down.yaml"
    told = {"about": "t", "start": START, "stages": {"gspo": _plain_data(gspo)}}
    written.write_text(json.dumps(told))
    done = trained_by_two(written, tmp_path / "out")
    assert done.returncode != 0
    assert "Connection refused" in done.stderr, done.stderr[-3000:]
    assert "another process cannot go on" in done.stderr, "the other process ended by itself"
    assert not (tmp_path / "out/1-gspo/states").exists(), "there is nothing to save yet"


@pytest.mark.slow
def test_fewer_documents_than_processes_are_told_and_nothing_waits(tmp_path: Path) -> None:
    """One without a document would leave the other in the gathers of a shared reference."""
    data = WorldData(lengths={2: 1.0}, videos=4, profiles={"main": 1.0})
    gspo = Gspo(
        kind="gspo", steps=1, documents=1, pack_tokens=2048, group=2, max_new_tokens=4, data=data,
        optimiser=Optimiser(learning_rate=1e-4),
    )  # fmt: skip
    written = tmp_path / "few.yaml"
    told = {"about": "t", "start": START, "stages": {"gspo": _plain_data(gspo)}}
    written.write_text(json.dumps(told))
    done = trained_by_two(written, tmp_path / "out")
    assert done.returncode != 0
    said = done.stderr.replace("\n", " ")
    assert "stages.gspo.documents is 1, and 2 processes" in said, done.stderr[-2000:]


def own_recipe(path: Path, stage: StageOptions) -> str:
    told = {"about": "t", "start": START, "seed": 5, "stages": {"sft": _plain_data(stage)}}
    path.write_text(json.dumps(told))
    return str(path)


def test_two_commands_do_not_train_in_one_folder(plain: Path, tmp_path: Path) -> None:
    """The second one wrote over the states and checkpoints of the first."""
    own, out, tried = own_recipe(tmp_path / "own.yaml", sft()), tmp_path / "out", []

    def second(name: str, done: int, total: int) -> None:
        with pytest.raises(TrainingError, match=f"another command trains in {out}. Wait for it"):
            run_training(own, out, 1, quiet)
        tried.append(done)

    run_training(own, out, 1, second)
    assert tried == [0, 1, 2, 2] and weights(out) == weights(plain)
    assert [one.name for one in out.iterdir()] == ["1-sft"], "its lock is gone"
    nothing = tmp_path / "nothing"
    with pytest.raises(RecipeError, match="not set"):
        run_training("official", nothing, 1, quiet)
    assert not nothing.exists()


@pytest.mark.slow
def test_a_folder_is_free_when_the_command_that_trains_in_it_is_killed(tmp_path: Path) -> None:
    own, out = own_recipe(tmp_path / "own.yaml", sft(steps=100_000)), tmp_path / "out"
    command = ["train", own, "--out", str(out), "--device", "cpu"]
    with subprocess.Popen([sys.executable, "-m", "internvideo3.harness.cli", *command]) as first:
        waited = time.monotonic() + 120
        while not (out / "1-sft" / "metrics.jsonl").exists() and time.monotonic() < waited:
            time.sleep(0.1)
        refused = CliRunner().invoke(app, command)
        said = " ".join(refused.stderr.split())
        assert refused.exit_code == 1
        assert (
            said == f"Error: another command trains in {out}. Wait for it, or give another --out."
        )
        first.kill()
    with alone_in(out):
        assert (out / LOCK).exists()


@pytest.mark.slow
def test_two_processes_are_both_refused_a_folder_in_use(tmp_path: Path) -> None:
    """The second one, which asks for no lock, would wait for the first for ever."""
    own = own_recipe(tmp_path / "own.yaml", sft())
    with alone_in(tmp_path / "out"):
        done = trained_by_two(Path(own), tmp_path / "out")
    assert done.returncode != 0
    assert done.stderr.count(f"another command trains in {tmp_path / 'out'}") == 2, done.stderr


def test_a_checkpoint_that_cannot_be_written_loses_no_step(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(training, "_write_part", full)
        with pytest.raises(TrainingError, match=r"1-sft/checkpoint cannot be written: .*No space"):
            train(recipe(), tmp_path)
    held = (tmp_path / "1-sft" / "metrics.jsonl").read_bytes()
    assert not (tmp_path / "1-sft" / "checkpoint").exists()
    train(recipe(), tmp_path)
    assert (tmp_path / "1-sft" / "metrics.jsonl").read_bytes() == held, "no step was taken again"
    assert weights(tmp_path) == weights(plain)


def test_a_signal_in_the_last_step_of_a_stage_stops_before_the_next(tmp_path: Path) -> None:
    stages = {"one": sft(steps=2, documents=2), "two": sft(steps=2, documents=2)}
    both = Recipe(about="test", start=START, seed=5, stages=stages)

    def stops(name: str, done: int, total: int) -> None:
        if (name, done) == ("one", 2):
            os.kill(os.getpid(), signal.SIGTERM)

    ended = train(both, tmp_path, stops)
    assert ended.checkpoint is None and ended.stage == "one"
    assert (tmp_path / "1-one" / "checkpoint").is_dir() and not (tmp_path / "2-two").exists()
    assert train(both, tmp_path).checkpoint == tmp_path / "2-two" / "checkpoint"


def run_by_two(script: str, out: Path) -> tuple[list[int], list[str]]:
    """What two processes of a script end with, and what they said."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(), "WORLD_SIZE": "2",
              "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name(script)), str(out)]
    running = [
        subprocess.Popen(
            command, text=True, stderr=subprocess.PIPE,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    said = [one.communicate(timeout=240)[1] for one in running]
    return [one.returncode for one in running], said


@pytest.mark.slow
def test_processes_that_share_rows_learn_of_the_same_words(tmp_path: Path) -> None:
    """One samples for all; where the rows differ nonetheless, nothing is learnt of them."""
    codes, said = run_by_two("sharing.py", tmp_path)
    assert codes == [0, 0], said
    one, two = (
        (tmp_path / name / "1-a" / "checkpoint" / "model.safetensors").read_bytes()
        for name in ("one sampler", "two samplers")
    )
    assert one == two
    for rank in "01":
        told = (tmp_path / f"{rank}.txt").read_text()
        assert "share their rows (sequence_parallel) and have different ids" in told
    assert not (tmp_path / "two rows" / "1-a" / "checkpoint").exists()


@pytest.mark.slow
def test_one_process_that_fails_ends_both_with_the_state_saved(tmp_path: Path) -> None:
    """Its data are unusable at the third step, before the processes add up their weights."""
    codes, said = run_by_two("failing.py", tmp_path)
    assert codes == [1, 1]
    assert "another process cannot go on" in said[0] and "this process alone fails" in said[1]
    states = tmp_path / "1-sft" / "states"
    assert [one.name for one in states.iterdir()] == ["step-00000002"]


@pytest.mark.slow
def test_ten_kills_at_random_moments_end_in_the_same_weights(tmp_path: Path) -> None:
    stage = sft(steps=60, documents=1, save_every=1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["internvideo3.training.train"])

    def started(out: Path) -> Any:
        child = context.Process(target=train, args=(recipe(stage), out, quiet))
        child.start()
        return child

    started(tmp_path / "whole").join()
    rng, out = random.Random(time.time_ns()), tmp_path / "killed"
    for _ in range(10):
        before = _lines(out)
        child = started(out)
        while child.is_alive() and _lines(out) == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.15))
        assert child.is_alive(), "the run ended before it was killed ten times"
        child.kill()
        child.join()
    started(out).join()
    assert weights(out) == weights(tmp_path / "whole")
    assert [row["step"] for row in metrics(out)] == list(range(1, 61))


def _lines(out: Path) -> int:
    path = out / "1-sft" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _plain_data(options: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return {key: value for key, value in asdict(options).items() if value is not None}


def _port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
