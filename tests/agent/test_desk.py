"""A tool that hangs, dies, floods, grows or talks nonsense is a result, and the next call works.

pytest tests/agent/test_desk.py
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from internvideo3.harness.agent.tools.desk import Desk, Result, Tool

MODULE = """
import os, sys, time

def run(how, path=None):
    if how == "hang":
        time.sleep(600)
    if how == "die":
        os._exit(3)
    if how == "flood":
        return "x" * 10_000_000
    if how == "grow":
        kept = bytearray(600_000_000)
        kept[::4096] = b"x" * len(kept[::4096])
        time.sleep(600)
    if how == "garbage":
        return {1, 2}
    if how == "raise":
        raise ValueError("<|im_end|> cannot be read")
    if how == "talk":
        print("hello"); sys.stdout.flush(); os.write(1, b"not json")
    if how == "child":
        import subprocess
        return subprocess.Popen(["sleep", "600"]).pid
    return [how, os.getpid()]
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    (tmp_path / "iv3_misbehaving.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tools = {
        "quick": Tool(name="quick", module="iv3_misbehaving", seconds=2, cached=False),
        "odd": Tool(
            name="odd", module="iv3_misbehaving", seconds=60, memory_bytes=300 << 20,
            output_bytes=100_000, cached=False,
        ),
        "kept": Tool(name="kept", module="iv3_misbehaving", seconds=60),
        "absent": Tool(name="absent", module="iv3_misbehaving", needs=("no_such_package",)),
        "broken": Tool(name="broken", module="iv3_no_such_module", seconds=60),
    }  # fmt: skip
    with Desk(tools, tmp_path / "cache") as opened:
        yield opened


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("die", "crashed", "ended without a reply"),
        ("flood", "flood", "more than 100000 bytes"),
        ("grow", "memory", "more than 0.3 GiB"),
        ("garbage", "crashed", "ended without a reply"),
        ("raise", "ValueError", "<|im_end|> cannot be read"),
    ],
)
def test_a_misbehaving_tool_is_a_result(desk: Desk, how: str, error: str, said: str) -> None:
    result = desk.call("odd", {"how": how})
    assert (result.ok, result.error) == (False, error) and said in result.message
    assert desk.call("odd", {"how": "well"}).data[0] == "well"


def test_a_hanging_tool_is_killed_at_its_limit(desk: Desk, bar: Any) -> None:
    result = desk.call("quick", {"how": "hang"})
    assert result.error == "timeout" and "more than 2 s" in result.message
    # Two seconds for the call, the rest for starting and killing a process.
    bar("a tool that hangs, limit 2 s: killed after s", desk.timings[0]["seconds"], 8)


def test_what_a_tool_prints_is_no_reply(desk: Desk) -> None:
    assert desk.call("odd", {"how": "talk"}).data[0] == "talk"


def test_processes_live_on_and_end_with_the_desk(desk: Desk) -> None:
    first, second = (desk.call("odd", {"how": "well"}).data[1] for _ in range(2))
    child = desk.call("odd", {"how": "child"}).data
    assert first == second != os.getpid()
    desk.__exit__()
    psutil.wait_procs([psutil.Process(p) for p in (first, child) if psutil.pid_exists(p)], 5)
    running = [p for p in (first, child) if psutil.pid_exists(p)]
    # A child of a killed process may stay a zombie where nobody reaps it.
    assert [p for p in running if psutil.Process(p).status() != psutil.STATUS_ZOMBIE] == []


def test_a_tool_that_is_not_there_is_announced(desk: Desk) -> None:
    absent = desk.call("absent", {"how": "well"})
    assert absent.error == "unavailable" and "internvideo3[agent]" in absent.message
    assert desk.call("broken", {"how": "well"}).error == "crashed"


def test_results_are_kept_by_content(desk: Desk, tmp_path: Path) -> None:
    def call(content: str, name: str = "a.bin") -> Result:
        (tmp_path / name).write_text(content)
        return desk.call("kept", {"how": "well", "path": str(tmp_path / name)})

    one = call("first")
    assert not one.from_cache
    assert call("first", "b.bin").from_cache and call("first").data == one.data
    assert not call("other").from_cache
    for kept in (tmp_path / "cache/kept").iterdir():
        kept.write_text("{")
    assert not call("first").from_cache and call("first").from_cache


def test_another_thread_can_end_a_call_that_hangs(desk: Desk) -> None:
    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(desk.call, "odd", {"how": "hang"})
        while not hanging.done():
            time.sleep(0.05)
            desk.interrupt()
        assert hanging.result().error == "crashed"
    assert desk.call("odd", {"how": "fine"}).ok
