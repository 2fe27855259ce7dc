"""The run directory: append, resume, repair, refuse.

pytest tests/harness/test_store.py
"""

import gzip
import hashlib
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internvideo3.harness import store
from internvideo3.harness.store import RunStore, StoreError, read_rows
from internvideo3.harness.traces import TraceError, read_trace, trace_path, write_trace


def run_json(**changes: Any) -> dict[str, Any]:
    config = {"fps": 2.0, "limit": None} | changes.pop("config", {})
    run = {
        "schema": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "mode": "direct",
        "model": {"name": "scale:base", "digest": "abc"},
        "suites": {"world_long": {"n": 3, "data_digest": "d"}},
        "config": config,
        "commit": "c1",
        "dirty": False,
    }
    return run | changes


def rows(*keys: str) -> list[dict[str, Any]]:
    return [{"id": key, "prediction": f"answer {key} ü\u2028"} for key in keys]


def seconds(*keys: str) -> list[dict[str, Any]]:
    return [{"id": key, "decode_s": 0.1} for key in keys]


def test_what_is_added_is_there_after_reopening_and_finish_sorts_it(tmp_path: Path) -> None:
    with RunStore.open(tmp_path / "run", run_json()) as first:
        first.add("world_long", rows("b"), seconds("b"))
    with RunStore.open(tmp_path / "run", run_json()) as second:
        assert list(second.answered("world_long")) == ["b"]
        second.add("world_long", rows("c", "a"), seconds("c", "a"))
        second.finish("world_long", ["a", "b", "c"], {"value": 0.5})
    samples = read_rows(tmp_path / "run/samples/world_long.jsonl")
    assert samples == rows("a", "b", "c")
    assert read_rows(tmp_path / "run/timings/world_long.jsonl") == seconds("a", "b", "c")
    digest = hashlib.sha256((tmp_path / "run/samples/world_long.jsonl").read_bytes()).hexdigest()
    result = {"value": 0.5, "samples_sha256": digest}
    assert json.loads((tmp_path / "run/results.json").read_text()) == {"world_long": result}


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, run_json()) as run:
        run.add("s", rows("a", "b"), ())
    path = tmp_path / "samples/s.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        path.write_bytes(whole[:length])
        assert read_rows(path) == rows("a")
        with RunStore.open(tmp_path, run_json()) as run:
            assert path.read_bytes() == whole[:first]
            run.add("s", rows("b"), ())
        assert path.read_bytes() == whole


def test_damage_in_the_middle_is_an_error_not_a_loss(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, run_json()) as run:
        run.add("s", rows("a", "b"), ())
    path = tmp_path / "samples/s.jsonl"
    path.write_bytes(b"\0\0\0\n" + path.read_bytes())
    with pytest.raises(StoreError, match="line 1, is not a JSON object"):
        RunStore.open(tmp_path, run_json())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.permutations(["a", "b", "c", "d"]), st.integers(0, 4))
def test_the_merged_bytes_do_not_depend_on_the_order_of_answering(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], cut: int
) -> None:
    root = tmp_path_factory.mktemp("run")
    for part in (order[:cut], order[cut:]):
        with RunStore.open(root, run_json()) as run:
            run.add("s", rows(*part), seconds(*part))
    with RunStore.open(root, run_json()) as run:
        run.finish("s", ["a", "b", "c", "d"], {})
    expected = "".join(store.dumps(row) + "\n" for row in rows("a", "b", "c", "d"))
    assert (root / "samples/s.jsonl").read_text() == expected


def test_another_command_is_refused_with_what_differs(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, run_json()) as run:
        run.add("s", rows("a"), seconds("a"))
    other = run_json(config={"fps": 4.0, "limit": 5}, model={"name": "x", "digest": "def"})
    with pytest.raises(StoreError) as refusal:
        RunStore.open(tmp_path, other)
    message = str(refusal.value)
    assert "config.fps: 2.0 in the directory, 4.0 now" in message
    assert "config.limit: null in the directory, 5 now" in message
    assert "model: scale:base (abc) in the directory, x (def) now" in message
    assert "created" not in message
    assert json.loads((tmp_path / "run.json").read_text()) == run_json()


def test_a_directory_in_which_nothing_was_answered_is_anybodys(tmp_path: Path) -> None:
    """As after weights that could not be loaded: the repaired command may use the same --out."""
    RunStore.open(tmp_path, run_json()).__exit__()
    other = run_json(config={"fps": 4.0})
    with pytest.raises(StoreError, match="holds the run of another command"):
        RunStore.open(tmp_path, other, "rank-0")  # beside processes that may be at work
    RunStore.open(tmp_path, other).__exit__()
    assert json.loads((tmp_path / "run.json").read_text()) == other


def test_a_resume_by_other_code_is_recorded(tmp_path: Path) -> None:
    RunStore.open(tmp_path, run_json()).__exit__()
    RunStore.open(tmp_path, run_json(commit="c2", created="later")).__exit__()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["commit"] == "c1"
    assert run["resumed"] == [{"created": "later", "commit": "c2", "dirty": False}]


def test_a_directory_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="not a run directory .it holds thesis.tex"):
        RunStore.open(tmp_path, run_json())
    assert not (tmp_path / "run.json").exists()


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    with (
        RunStore.open(tmp_path, run_json()),
        pytest.raises(StoreError, match="in use by another process"),
    ):
        RunStore.open(tmp_path, run_json())
    RunStore.open(tmp_path, run_json()).__exit__()


FULL_DISK = """
import resource, sys
from pathlib import Path
from internvideo3.harness.store import RunStore, StoreError
sys.path.insert(0, {tests!r})
from test_store import rows, run_json, seconds
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
with RunStore.open(Path({root!r}), run_json()) as run:
    try:
        for number in range(1000):
            run.add("s", rows(f"key-{{number:04}}"), seconds(f"key-{{number:04}}"))
    except StoreError as error:
        print(number, str(error))
"""


def test_no_space_left_is_a_clear_error_and_keeps_what_is_finished(tmp_path: Path) -> None:
    code = FULL_DISK.format(tests=str(Path(__file__).parent), root=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {}
    )
    assert done.returncode == 0, done.stderr
    number, message = done.stdout.split(" ", 1)
    assert "no space left" in message
    assert "repeat the command to continue" in message
    kept = read_rows(tmp_path / "samples/s.jsonl")
    assert len(kept) == int(number) > 3
    assert (tmp_path / "samples/s.jsonl").read_bytes().endswith(b"\n")


def test_a_damaged_result_is_named_with_the_way_out(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, run_json()) as run:
        run.add("s", rows("a"), seconds("a"))
        (tmp_path / "results.json").write_text("")
        with pytest.raises(StoreError, match=r"results.json is damaged.*internvideo3 score"):
            run.finish("s", ["a"], {})


def test_a_full_disk_at_the_end_leaves_the_unsorted_file(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, run_json()) as run:
        run.add("s", rows("b", "a"), seconds("b", "a"))
        before = (tmp_path / "samples/s.jsonl").read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        try:
            with pytest.raises(StoreError, match="no space left"):
                run.finish("s", ["a", "b"], {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "samples/s.jsonl").read_bytes() == before
    assert not [path for path in (tmp_path / "samples").iterdir() if path.name != "s.jsonl"]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bytes]]:
    """Name and content of each file when it was synced, in order."""
    seen: list[tuple[str, bytes]] = []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        seen.append((path.name, path.read_bytes()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    return seen


def test_what_is_added_is_synced_whole_its_timings_first(
    tmp_path: Path, synced: list[tuple[str, bytes]]
) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "timings").mkdir()
    RunStore(tmp_path, {}, ()).add("s", rows("a", "b"), seconds("a", "b"))
    samples, timings = (tmp_path / name / "s.jsonl" for name in ("samples", "timings"))
    assert synced == [("s.jsonl", timings.read_bytes()), ("s.jsonl", samples.read_bytes())]


def test_what_is_rewritten_is_synced_whole_before_it_takes_its_name(
    tmp_path: Path, synced: list[tuple[str, bytes]]
) -> None:
    path = tmp_path / "results.json"
    store.write_json(path, {"a": 1})
    ((name, content),) = synced
    assert name.endswith(".part") and content == path.read_bytes()


def test_a_trace_is_on_disk_like_the_rest_of_a_run(
    tmp_path: Path, synced: list[tuple[str, bytes]]
) -> None:
    write_trace(tmp_path, "world_long/000001", {"entries": []})
    path = trace_path(tmp_path, "world_long/000001")
    assert read_trace(path) == {"entries": []}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [content for _, content in synced] == [path.read_bytes()]


def test_what_a_killed_process_left_of_traces_is_swept(tmp_path: Path) -> None:
    RunStore.open(tmp_path, run_json()).__exit__()
    write_trace(tmp_path, "suite/clips.part/a b", {"entries": []})
    folder = trace_path(tmp_path, "suite/clips.part/a b").parent
    litter = [folder / name for name in (".a b.json.gz.x1_.part", "tmpx1_.part")]
    for path in litter:
        path.touch()
    RunStore.open(tmp_path, run_json(), "rank-0").__exit__()
    assert all(path.exists() for path in litter), "another rank may be writing them"
    RunStore.open(tmp_path, run_json()).__exit__()
    assert [path.name for path in folder.iterdir()] == ["a b.json.gz"]


@pytest.mark.parametrize(
    "name",
    ["字" * 30, "a person " * 60 + "sits down", "/".join(["ü" * 60] * 3)],
    ids=["chinese", "sentence", "folders"],
)
def test_an_id_that_no_file_name_holds_has_a_trace_all_the_same(tmp_path: Path, name: str) -> None:
    first, second = f"activitynet/{name} 1.0 2.0", f"activitynet/{name} 1.0 3.0"
    write_trace(tmp_path, first, {"entries": [1]})
    write_trace(tmp_path, second, {"entries": [2]})
    assert read_trace(trace_path(tmp_path, first)) == {"entries": [1]}
    assert read_trace(trace_path(tmp_path, second)) == {"entries": [2]}
    assert trace_path(tmp_path, first).is_relative_to(tmp_path / "traces")


def test_an_id_that_a_file_name_holds_keeps_its_trace_where_it_was(tmp_path: Path) -> None:
    """Runs of earlier versions are continued, and their traces read."""
    longest = "x" * (255 - len(".json.gz"))
    for folder in ("y" * 255, "a b"):
        path = tmp_path / "traces" / folder / f"{longest}.json.gz"
        assert trace_path(tmp_path, f"{folder}/{longest}") == path
        write_trace(tmp_path, f"{folder}/{longest}", {"entries": []})
        assert path.is_file()


DAMAGED = {
    "a deflate stream": gzip.compress(b'{"entries": []}')[:10] + b"\xff" * 20,
    "cut off": gzip.compress(b'{"entries": []}' * 9)[:-9],
    "another format": b"PK\x03\x04",
    "no text": gzip.compress(b"\xff\xfe\x00"),
    "no JSON": gzip.compress(b"{"),
    "nested without end": gzip.compress(b"[" * 200_000),
    "no object": gzip.compress(b"[]"),
    "nothing": b"",
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_trace_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "one.json.gz"
    path.write_bytes(DAMAGED[what])
    with pytest.raises(TraceError, match=r"one\.json\.gz is "):
        read_trace(path)
