"""The GPU scripts' file of results, their gates and their budgets, without a GPU.

pytest tests/harness/test_gpu_results.py
"""

import json
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from internvideo3.harness.gpu import measure, step
from internvideo3.harness.gpu.measure import Results, ResultsError, device_state, in_words
from internvideo3.harness.profile import host
from internvideo3.harness.profile.depth import DepthError
from internvideo3.harness.profile.host import CardMemory
from internvideo3.model import engine_layers

CPU = torch.device("cpu")


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1, "poi', '{"schema": 1}', "\x80"])
def test_a_torn_file_is_moved_aside(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kernels.json"
    file.write_bytes(text.encode("latin-1"))
    results = Results(file, CPU, 60)
    assert results.data["points"] == {}
    assert "is no whole file of results; kept as kernels-1.json" in capsys.readouterr().out
    assert (tmp_path / "kernels-1.json").read_bytes() == text.encode("latin-1")
    results.close()
    assert json.loads(file.read_text())["points"] == {}


def test_a_card_that_comes_back_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loan may be of either card."""
    file, about = tmp_path / "kernels.json", measure.describe_device

    def measured(card: str, value: int) -> int:
        described = lambda device: about(device) | {"name": card}  # noqa: E731
        monkeypatch.setattr(measure, "describe_device", described)
        results = Results(file, CPU, 60)
        point = results.point("a", lambda: {"value": value})
        results.close()
        assert point is not None
        return int(point["value"])

    assert [measured("H200", 1), measured("H100", 2)] == [1, 2]
    assert [measured("H200", 3), measured("H100", 4), measured("H200", 5)] == [1, 2, 1]
    assert {path.name for path in tmp_path.glob("kernels*.json")} == {
        "kernels.json", "kernels-4.json",
    }  # fmt: skip


def test_what_a_killed_process_moved_aside_is_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two renames there is no file of the name; and what a user put there stays."""
    file = tmp_path / "kernels.json"
    results = Results(file, CPU, 60)
    results.point("a", lambda: {"value": 1})
    results.close()
    mine = tmp_path / "kernels-1.json"
    mine.write_bytes(file.read_bytes())
    about = measure.describe_device
    with monkeypatch.context() as patched:
        patched.setattr(measure, "describe_device", lambda device: about(device) | {"name": "H100"})
        Results(file, CPU, 60).close()
        file.rename(tmp_path / "lost.json")  # as if it had ended before it wrote
    (tmp_path / "kernels-7.json").mkdir()
    again = Results(file, CPU, 60)
    point = again.point("a", lambda: {"value": 2})
    again.close()
    assert point is not None and point["value"] == 1
    assert mine.exists() and not (tmp_path / "kernels-2.json").exists()


def test_a_worker_does_not_outlive_the_process_that_started_it(tmp_path: Path) -> None:
    """Be that killed: on a card the worker would hold memory beside what is timed next."""
    code = (
        "import os, pathlib, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from internvideo3.harness.gpu.kernels import end_with_parent\n"
        "def work(file):\n"
        "    pathlib.Path(file).write_text(str(os.getpid()))\n"
        "    time.sleep(300)\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(\n"
        "        1, mp_context=get_context('spawn'), initializer=end_with_parent)\n"
        "    pool.submit(work, sys.argv[1]).result()\n"
    )
    script, file = tmp_path / "starts.py", tmp_path / "pid"
    script.write_text(code)
    starting = subprocess.Popen([sys.executable, str(script), str(file)])
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = psutil.Process(int(file.read_text()))
    assert worker.is_running() and starting.poll() is None
    starting.kill()
    starting.wait()
    assert worker.wait(30) is None


def test_one_process_at_a_time_writes_a_file(tmp_path: Path) -> None:
    file = tmp_path / "kernels.json"
    first = Results(file, CPU, 60)
    with pytest.raises(ResultsError, match="being written by another process"):
        Results(file, CPU, 60)
    first.close()
    Results(file, CPU, 60).close()


def test_what_cannot_be_written_is_one_line() -> None:
    with pytest.raises(SystemExit, match="/dev/null/x: Not a directory"), in_words(ResultsError):
        Results(Path("/dev/null/x/kernels.json"), CPU, 60)


def test_a_point_keeps_the_ceilings_that_it_was_measured_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kernels.json"
    monkeypatch.setattr(measure, "matmul_rate", lambda *_: 8.0)

    def start(copied: float) -> Results:
        monkeypatch.setattr(measure, "copy_bandwidth", lambda *_: copied)
        results = Results(file, CPU, 60)
        assert results.ceilings(CPU)["copy_bytes_per_s"] == copied
        return results

    first = start(100.0)
    first.point("a", lambda: {"bytes_per_s": 50.0})
    first.close()
    second = start(200.0)
    second.point("b", lambda: {"bytes_per_s": 50.0})
    shares = {
        key: second.share(point, "bytes_per_s", "copy_bytes_per_s")
        for key, point in second.data["points"].items()
    }
    assert shares == {"a": 0.5, "b": 0.25}


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB.")


def test_ceilings_without_memory_are_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "copy_bandwidth", out_of_memory)
    said = "CUDA out of memory.*End what else runs on it"
    with pytest.raises(SystemExit, match=said), in_words(ResultsError):
        Results(tmp_path / "a.json", CPU, 60).ceilings(CPU)


@pytest.mark.parametrize("shared", [True, False])
def test_memory_that_others_had_is_asked_for_again(
    tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = CardMemory(100, 50 if shared else 99)
    monkeypatch.setattr(host, "card_memory", lambda _: memory)
    results = Results(tmp_path / "a.json", CPU, 60)
    first = results.point("a", out_of_memory)
    assert first is not None and first["status"] == "out of memory"
    again = results.point("a", lambda: {"median_s": 1.0})
    assert again is not None and (again["status"] == "ok") == shared


def test_a_point_is_written_though_the_card_answers_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kernel's fault every call fails, that which gives memory back too."""

    def gone() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    results = Results(tmp_path / "a.json", CPU, 60)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", gone)
    point = results.point("a", gone)
    assert point is not None and point["status"] == "failed"
    assert json.loads((tmp_path / "a.json").read_text())["points"]["a"]["status"] == "failed"


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hangs(*_: Any, timeout: float, **__: Any) -> Any:
        asked.append(timeout)
        raise subprocess.TimeoutExpired("nvidia-smi", timeout)

    monkeypatch.setattr(measure.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(measure.subprocess, "run", hangs)
    monkeypatch.setattr(measure, "_hangs", [])
    for _ in range(3):
        assert device_state(torch.device("cuda")) == {"nvidia-smi": "no answer in 20 s"}
    assert asked == [20]


def test_checks_that_hang_leave_time_for_what_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither their first time nor alone, each with a process of its own, they take it all."""
    from internvideo3.harness.gpu import kernels

    now = [1000.0]
    killed: list[str] = []
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])

    class Hanging(Future[dict[str, Any]]):
        def result(self, timeout: float | None = None) -> dict[str, Any]:
            assert timeout is not None
            now[0] += timeout
            raise TimeoutError

    class Pool:
        def __init__(self, *_: Any, **__: Any) -> None:
            self._processes = {0: SimpleNamespace(kill=lambda: killed.append("one"))}

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def submit(self, *_: Any) -> Hanging:
            return Hanging()

    monkeypatch.setattr(kernels, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(kernels, "all_checks", lambda _: dict.fromkeys(("a", "b", "c")))
    results = Results(tmp_path / "kernels.json", CPU, 120)
    kernels.gate(results, torch.device("cuda"))
    assert results.left_s() == pytest.approx(0.15 * 120)
    assert {check["status"] for check in results.data["checks"].values()} == {"failed"}
    assert results.data["checks"]["a"]["error"].startswith("not done after 90 s")
    assert killed and not kernels.is_green(results, "a")


# --- step --------------------------------------------------------------------------------------

NAME = "random:tiny-gqa"


def steps(file: Path, *, contexts: tuple[int, ...] = (64,)) -> tuple[Results, list[str]]:
    results = Results(file, CPU, 60)
    results.data["ceilings"] = {"copy_bytes_per_s": 1e9}
    amiss = step.measure(results, NAME, contexts, ["native", "fp8"])
    results.close()
    return results, amiss


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are examined without CUDA's profiler; gets the lengths that are."""
    seen: list[int] = []
    right = step.load

    def examine(subject: Any, context: int, *, fp8: bool) -> dict[str, Any]:
        seen.append(context)
        about = {"step_s": 1e-3, "kernels_s": 1e-3, "gaps_s": 0.0, "launches": 1, "kernels": []}
        return about | {"weight_bytes": 10, "cache_bytes": 20}

    monkeypatch.setattr(step, "load", lambda name, device, _: right(name, device, "float32"))
    monkeypatch.setattr(step, "examine", examine)
    return seen


def test_kernels_that_overlap_are_not_counted_twice() -> None:
    """They start early and wait for those ahead of them; what is left is gaps."""
    times = [("a", 0, 10), ("b", 2, 15), ("a", 5, 12), ("c", 20, 30), ("b", 29, 33)]
    seconds, gaps = step.shares([(name, start + 7.0, end + 7.0) for name, start, end in times])
    assert {name: round(1e6 * value) for name, value in seconds.items()} == {
        "a": 10, "b": 8, "c": 10,
    }  # fmt: skip
    assert round(1e6 * gaps) == 5 and sum(seconds.values()) + gaps == pytest.approx(33e-6)
    assert step.shares([]) == ({}, 0.0)


def test_a_step_is_examined_after_its_gate(
    tmp_path: Path, on_cpu: list[int], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "step.json"
    right = engine_layers.gqa_decode
    with monkeypatch.context() as patched:
        patched.setattr(engine_layers, "gqa_decode", lambda q, runs, **rest: (
            right(q, runs, **rest)[0] * 1.1, None))  # fmt: skip
        results, amiss = steps(file)
    assert amiss == [f"{NAME}, native cache"] and not on_cpu and not results.data["points"]
    assert "gate RED" in capsys.readouterr().out
    results, amiss = steps(file)
    assert not amiss and on_cpu == [64] and "gate green" in capsys.readouterr().out
    # What is known needs no model.
    monkeypatch.setattr(step, "load", None)
    results, amiss = steps(file)
    assert not amiss and results.data["points"][f"{NAME}/64"]["status"] == "ok"


def test_a_step_that_is_wrong_at_its_depth_is_not_timed(
    tmp_path: Path, on_cpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any, **__: Any) -> Any:
        raise DepthError("attention over 65 tokens is 5.0e-01 from float32")

    monkeypatch.setattr(step, "examine", wrong)
    results, amiss = steps(tmp_path / "step.json")
    assert amiss == [f"{NAME}/64"]
    assert "DepthError: attention over" in results.data["points"][f"{NAME}/64"]["error"]


def test_a_script_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["step", "--out", str(tmp_path / "step.json")])
    with pytest.raises(SystemExit, match="torch sees none"):
        step.main()
