"""Several processes on one evaluation: shares, shards, torchrun, and a lost process.

pytest tests/harness/test_ranks.py
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from internvideo3.harness import cli, evaluate
from internvideo3.harness.options import EvalOptions
from internvideo3.harness.ranks import RanksError, Share, share_of
from internvideo3.harness.store import StoreError, read_rows

SUITES = ("world_short", "world_long")


@pytest.fixture(scope="module")
def options(world: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalOptions:
    out = tmp_path_factory.mktemp("runs") / "one"
    return EvalOptions(model=str(checkpoint), suites=SUITES, out=out, root=world, max_new_tokens=8)


@pytest.fixture(scope="module")
def alone(options: EvalOptions) -> dict[str, bytes]:
    evaluate.evaluate(options)
    return content(options.out)


def content(run: Path) -> dict[str, bytes]:
    files = [run / "samples" / f"{suite}.jsonl" for suite in SUITES] + [run / "results.json"]
    return {path.name: path.read_bytes() for path in files}


def docs(lengths: list[float], questions: int = 2) -> list[dict[str, Any]]:
    return [
        {"id": f"s/{v}-{q}", "video_id": f"v{v}", "length_s": length}
        for v, length in enumerate(lengths)
        for q in range(questions)
    ]


@given(st.lists(st.floats(1, 3600), min_size=1, max_size=40), st.integers(1, 9))
def test_shares_are_a_partition_by_video(lengths: list[float], count: int) -> None:
    everything = docs(lengths)
    parts = [Share(index=i, count=count).takes(everything) for i in range(count)]
    assert sorted(doc["id"] for part in parts for doc in part) == sorted(
        doc["id"] for doc in everything
    )
    owners = [{doc["video_id"] for doc in part} for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners))


def test_shares_are_balanced_by_length() -> None:
    everything = docs([3600.0] * 3 + [60.0] * 60)
    loads = [
        sum({doc["video_id"]: doc["length_s"] for doc in part}.values())
        for part in (Share(index=i, count=4).takes(everything) for i in range(4))
    ]
    # Not exactly alike, because a question costs as much as two seconds of video.
    assert max(loads) / min(loads) < 1.1


def test_where_no_lengths_are_told_the_size_of_the_files_decides(tmp_path: Path) -> None:
    everything = docs([0.0] * 5, questions=1)
    for number, doc in enumerate(everything):
        path = tmp_path / f"{number}.mp4"
        path.write_bytes(b"x" * (4000 if number == 0 else 1000))
        doc |= {"length_s": None, "videos": [str(path)]}
    first, second = (Share(index=i, count=2).takes(everything) for i in range(2))
    assert [doc["video_id"] for doc in first] == ["v0"]
    assert len(second) == 4


@pytest.mark.parametrize("shard", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_a_shard_that_is_none_is_refused(shard: str) -> None:
    with pytest.raises(RanksError, match="for example 2/8"):
        share_of(shard, None)


def test_the_world_size_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RanksError, match="--processes 8, but 1 started"):
        share_of(None, 8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RanksError, match="under a launcher of 2"):
        share_of("1/2", None)


def test_shards_in_any_order_and_a_merge_equal_one_process(
    options: EvalOptions, alone: dict[str, bytes], tmp_path: Path
) -> None:
    run = replace(options, out=tmp_path / "run")
    second = evaluate.evaluate(replace(run, shard="2/2"))
    assert second.left > 0 and not (run.out / "samples").exists()
    with pytest.raises(StoreError, match="another command"):
        evaluate.evaluate(replace(run, shard="1/2", fps=1.0))
    command = ["eval", "--model", run.model, "--suite", ",".join(SUITES), "--out", str(run.out)]
    command += ["--root", str(run.root), "--max-new-tokens", "8", "--shard", "1/2"]
    first = CliRunner().invoke(cli.app, command)
    assert first.exit_code == 0
    assert "repeat the command without --shard to merge them" in first.output
    merged = evaluate.evaluate(run)
    assert merged.computed == 0
    assert content(run.out) == alone
    assert not (run.out / "parts").exists()


LAUNCHERS = {
    "torchrun": "torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d "
    "--rdzv-endpoint localhost:0",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0",
}


def launch(options: EvalOptions, launcher: str = "torchrun") -> "subprocess.Popen[str]":
    """Start two processes by a launcher in a group of its own."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher].split()]
    command += ["-m", "internvideo3.harness.cli", "eval", "--processes", "2"]
    command += ["--model", options.model, "--suite", ",".join(options.suites)]
    command += ["--root", str(options.root), "--out", str(options.out), "--max-new-tokens", "8"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def worker(launcher: int, rank: int) -> int:
    """Process id of one rank under torchrun."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended while we looked
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            environment = (folder / "environ").read_bytes().split(b"\0")
            if int(stat[1]) == launcher and f"RANK={rank}".encode() in environment:
                return int(folder.name)
    raise AssertionError(f"no process of rank {rank} under {launcher}")


@pytest.fixture()
def launched() -> Iterator[list["subprocess.Popen[str]"]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        # torchrun ends its workers when it is asked to stop.
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_of_a_launcher_write_the_bytes_of_one(
    launcher: str,
    options: EvalOptions,
    alone: dict[str, bytes],
    tmp_path: Path,
    launched: list["subprocess.Popen[str]"],
) -> None:
    run = replace(options, out=tmp_path / "run")
    process = launch(run, launcher)
    launched.append(process)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    assert content(run.out) == alone
    assert not (run.out / "parts").exists()
    # Of all processes together: the first speaks for them.
    answered = sum(len(read_rows(path)) for path in (run.out / "samples").glob("*.jsonl"))
    assert said.count("samples answered") == 1
    assert f"{answered} samples answered, 0 kept from before" in said


@pytest.mark.slow
def test_a_lost_process_costs_nothing_and_one_process_goes_on(
    options: EvalOptions,
    alone: dict[str, bytes],
    tmp_path: Path,
    launched: list["subprocess.Popen[str]"],
) -> None:
    run = replace(options, out=tmp_path / "run")
    process = launch(run)
    launched.append(process)
    until = time.monotonic() + 200
    part = run.out / "parts" / "rank-1-of-2"
    while not any(path.stat().st_size for path in part.glob("samples/*.jsonl")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    os.kill(worker(process.pid, rank=1), signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0, said[-3000:]
    written = {row["id"] for path in part.glob("samples/*.jsonl") for row in read_rows(path)}
    assert written
    summary = evaluate.evaluate(run)
    assert summary.kept >= len(written) and summary.left == 0
    assert content(run.out) == alone


FAKES = {
    "scontrol": "printf 'localhost\\nlocalhost\\n'",
    # One task a machine, as the job asks for; the first failure is the step's.
    "srun": """shift
pids=()
for node in $(seq "$SLURM_NNODES"); do SLURM_NODEID=$((node - 1)) "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid"; done""",
}
"""What Slurm would do on two machines, both of which are this one."""


@pytest.mark.slow
def test_the_slurm_job_on_two_machines_writes_the_bytes_of_one(
    options: EvalOptions, alone: dict[str, bytes], tmp_path: Path
) -> None:
    for name, body in FAKES.items():
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/bash\nset -eu\n{body}\n")
        tool.chmod(0o755)
    run = replace(options, out=tmp_path / "run")
    job = Path(__file__).parents[2] / "docs/eval.sbatch"
    command = ["bash", str(job), "--model", run.model, "--suite", ",".join(run.suites)]
    command += ["--root", str(run.root), "--out", str(run.out), "--max-new-tokens", "8"]
    path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent)])
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | slurm | {"OMP_NUM_THREADS": "1", "PATH": f"{path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert content(run.out) == alone
    assert (done.stdout + done.stderr).count("samples answered") == 1


def test_a_part_that_is_in_use_is_refused(options: EvalOptions, tmp_path: Path) -> None:
    from internvideo3.harness.store import RunStore

    benchmarks = evaluate.load_benchmarks(options)
    run = evaluate.describe_run(options, benchmarks)
    root = tmp_path / "run"
    with RunStore.open(root, run, "shard-0-of-2"):
        with pytest.raises(StoreError, match="in use"):
            RunStore.open(root, run, "shard-0-of-2")
        with pytest.raises(StoreError, match="in use"):
            RunStore.open(root, run)
        RunStore.open(root, run, "shard-1-of-2").__exit__()
    RunStore.open(root, run).__exit__()
    shutil.rmtree(root)
