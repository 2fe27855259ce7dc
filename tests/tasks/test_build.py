"""Building suites on disk: contents, cache, resume, damage, full disks, lmms-eval's files.

Run: python -m pytest tests/tasks/test_build.py
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from internvideo3.tasks.video import read_frames
from internvideo3.tasks.world import build as build_module
from internvideo3.tasks.world import difficulty, files, media, workers
from internvideo3.tasks.world.build import (
    BuildError,
    Built,
    build_suite,
    documents,
    world_build,
    world_root,
)
from internvideo3.tasks.world.suites import SUITES

FIELDS = [
    "id", "video_id", "video", "subtitles", "suite", "family", "length_s", "question", "options",
    "answer", "answer_letter", "answer_type", "evidence", "prompt",
]  # fmt: skip


def build(root: Path, limit: int = 3, **options: Any) -> Built:
    return build_suite("world_short", root, limit_videos=limit, **options)


def docs_of(built: Built) -> list[dict[str, Any]]:
    return [json.loads(line) for line in built.docs.read_text().splitlines()]


def content(folder: Path) -> dict[str, str]:
    """Digest of every data file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in (".mp4", ".srt", ".jsonl")
    }


def manifest(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "test" / "manifest.json").read_text())
    return found


def test_what_a_build_leaves(tmp_path: Path) -> None:
    built = build(tmp_path, 4)
    docs = docs_of(built)
    assert built.folder == tmp_path / "test"
    assert (built.videos, built.made, built.questions) == (4, 4, len(docs))
    assert docs == list(documents(SUITES["world_short"], "test", 4))
    assert [doc["id"] for doc in docs] == [f"world_short/{n:06d}" for n in range(len(docs))]
    for doc in docs:
        assert list(doc) == FIELDS
        frames = read_frames(built.folder / doc["video"])
        assert frames.duration_s == doc["length_s"]
        assert frames.source_fps == difficulty.FILE_FPS
        assert frames.pixels_THWC.shape[1] in difficulty.FRAME_SIZES_PX
        assert (built.folder / doc["subtitles"]).read_text().startswith("1\n00:00:")
    assert not list(tmp_path.rglob("*.part"))


def test_the_manifest_tells_what_was_built(tmp_path: Path) -> None:
    built = build(tmp_path)
    entry = manifest(tmp_path)["suites"]["world_short"]
    assert entry["world"] == difficulty.digest()
    assert (entry["videos"], entry["questions"]) == (3, built.questions)
    assert entry["docs_sha256"] == content(built.folder)["world_short.jsonl"]
    assert entry["files"] == {
        name: sha for name, sha in content(built.folder).items() if name.startswith("videos/")
    }
    assert entry["bytes"] == sum(path.stat().st_size for path in built.folder.rglob("*.mp4"))
    assert set(entry["packages"]) == {"av", "numpy"}


def test_a_second_build_touches_nothing(tmp_path: Path) -> None:
    first = build(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*.*")}
    second = build(tmp_path)
    assert second.made == 0
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*.*")} == stamps


def test_a_smaller_limit_keeps_the_larger_suite_and_a_larger_one_grows_it(tmp_path: Path) -> None:
    first = build(tmp_path, 3)
    ids = [doc["id"] for doc in docs_of(first)]
    smaller = build(tmp_path, 1)
    assert (smaller.videos, smaller.made) == (3, 0)
    larger = build(tmp_path, 5)
    assert (larger.videos, larger.made) == (5, 2)
    assert [doc["id"] for doc in docs_of(larger)][: len(ids)] == ids


def test_damaged_and_missing_files_are_made_again(tmp_path: Path) -> None:
    built = build(tmp_path)
    whole = content(built.folder)
    videos = built.folder / "videos"
    (videos / "world_short-0000.mp4").write_bytes(b"rot")
    (videos / "world_short-0001.srt").unlink()
    assert build(tmp_path).made == 2
    assert content(built.folder) == whole


def test_damaged_documents_are_written_again(tmp_path: Path) -> None:
    built = build(tmp_path)
    whole = content(built.folder)
    built.docs.write_text("{}\n")
    assert build(tmp_path).made == 0
    assert content(built.folder) == whole
    (built.folder / "manifest.json").write_text("{torn")
    assert build(tmp_path).made == 0
    assert manifest(tmp_path)["suites"]["world_short"]["videos"] == 3


def test_another_version_of_the_world_is_built_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path)
    monkeypatch.setattr(difficulty, "digest", lambda: "another world")
    built = build(tmp_path, 2)
    assert (built.videos, built.made) == (2, 2)
    assert manifest(tmp_path)["suites"]["world_short"]["world"] == "another world"


def test_sound_is_another_build(tmp_path: Path) -> None:
    silent = build(tmp_path, 1)
    video = silent.folder / "videos" / "world_short-0000.mp4"
    size = video.stat().st_size
    assert build(tmp_path, 1, sound=True).made == 1
    assert video.stat().st_size > 1.2 * size


def test_splits_have_their_own_videos(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        build_suite("world_short", tmp_path, split, limit_videos=1)
    bytes_of = {path.read_bytes() for path in tmp_path.rglob("world_short-0000.mp4")}
    assert len(bytes_of) == 3


def test_workers_make_the_same_bytes(tmp_path: Path) -> None:
    one = build(tmp_path / "one", 4, workers=1)
    two = build(tmp_path / "two", 4, workers=2)
    assert two.made == 4
    assert content(one.folder) == content(two.folder)


def test_progress_counts_up_to_all(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build(tmp_path, 2)
    build(tmp_path, 4, progress=lambda *step: seen.append(step))
    assert seen == [("world_short", n, 4) for n in (2, 3, 4)]


_BUILD = """
import sys
from internvideo3.tasks.world.build import build_suite
build_suite("world_short", sys.argv[1], limit_videos=int(sys.argv[2]), workers=int(sys.argv[3]),
            progress=lambda suite, done, total: print(done, flush=True))
"""


def start(root: Path, limit: int, count: int) -> subprocess.Popen[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-c", _BUILD, str(root), str(limit), str(count)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_build_continues(tmp_path: Path, count: int) -> None:
    limit = 9
    killed = start(tmp_path / "killed", limit, count)
    assert killed.stdout is not None
    for line in killed.stdout:
        if int(line) >= 3:
            killed.send_signal(signal.SIGKILL)
            break
    killed.wait()
    journal = tmp_path / "killed" / "test" / ".world_short.journal"
    finished = len(journal.read_text().splitlines())
    assert not (tmp_path / "killed" / "test" / "world_short.jsonl").exists()
    with journal.open("a") as file:
        file.write('{"video_id": "world_sh')  # a line torn by the kill
    again = build_suite("world_short", tmp_path / "killed", limit_videos=limit, workers=1)
    assert 3 <= finished < limit
    assert again.made == limit - finished
    whole = build_suite("world_short", tmp_path / "whole", limit_videos=limit, workers=1)
    assert content(again.folder) == content(whole.folder)
    assert build_suite("world_short", tmp_path / "killed", limit_videos=limit).made == 0


def test_workers_of_a_killed_build_end(tmp_path: Path) -> None:
    builder = start(tmp_path, 200, 2)
    assert builder.stdout is not None
    assert builder.stdout.readline()
    children = _children(builder.pid)
    while len(children) < 2 and builder.poll() is None:
        time.sleep(0.05)
        children = _children(builder.pid)
    builder.stdout.readline()
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    deadline = time.monotonic() + 20
    while any(_lives(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(children) == 2
    assert not any(_lives(pid) for pid in children)


def _children(pid: int) -> list[int]:
    task = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in task.read_text().split()] if task.exists() else []


def _lives(pid: int) -> bool:
    """Whether a process runs; one that ended but was not yet collected does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_two_builds_of_one_folder_take_turns(tmp_path: Path) -> None:
    builders = [start(tmp_path, 3, 1) for _ in range(2)]
    seen = [builder.communicate(timeout=60)[0].split() for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0]
    # One made three videos, the other found them.
    assert sorted(seen) == [["0", "1", "2", "3"], ["3"]]


def test_a_full_disk_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "world_short-0002.mp4" in path.name:
            write_bytes(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BuildError, match=r"no space left.*2 of 5 videos are finished and kept"):
        build(tmp_path, 5, workers=1)
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "test" / "world_short.jsonl").exists()
    monkeypatch.undo()
    assert build(tmp_path, 5).made == 3


def test_an_error_of_the_disk_comes_back_from_a_worker(tmp_path: Path) -> None:
    job = build_module._Build(SUITES["world_short"], "test", tmp_path, False, build_module.WORLD)
    job.wanted = 2
    (tmp_path / "videos").write_text("a file where the folder should be")
    with pytest.raises(NotADirectoryError) as caught:
        list(workers.make_videos(job._jobs(), workers=2))
    assert "world_short-000" in str(caught.value)


def test_a_worker_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = workers._start

    def dying() -> subprocess.Popen[str]:
        process = real()
        process.kill()
        return process

    monkeypatch.setattr(workers, "_start", dying)
    with pytest.raises(BuildError, match=r"ended with status -9.*0 of 4 videos"):
        build(tmp_path, 4, workers=2)


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    root = tmp_path / "file"
    root.write_text("")
    with pytest.raises(BuildError, match=r"cannot build world_short: Not a directory"):
        build(root)


def test_unknown_names_offer_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="unknown suite 'world_grond'.*world_grounding"):
        world_build(["world_short", "world_grond"], root=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(BuildError, match="unknown split 'valid'; did you mean validation"):
        build_suite("world_short", tmp_path, "valid")
    with pytest.raises(BuildError, match="at least 1, got 0"):
        build(tmp_path, 0)


def test_where_the_world_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IV3_WORLD", raising=False)
    assert world_root() == Path.home() / ".cache/internvideo3/world"
    monkeypatch.setenv("IV3_WORLD", str(tmp_path))
    assert world_root() == tmp_path
    assert world_root("~/w") == Path.home() / "w"


def test_several_suites_share_a_manifest(tmp_path: Path) -> None:
    built = world_build(["world_short", "world_spatial"], root=tmp_path, limit_videos=1)
    assert [one.suite for one in built] == ["world_short", "world_spatial"]
    assert set(manifest(tmp_path)["suites"]) == {"world_short", "world_spatial"}


def test_the_key_follows_everything_that_decides_the_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = SUITES["world_short"]
    keys = [
        build_module.suite_key(suite, "test", False),
        build_module.suite_key(suite, "test", True),
        build_module.suite_key(suite, "train", False),
        build_module.suite_key(SUITES["world_long"], "test", False),
    ]
    monkeypatch.setattr(media, "ENCODING", "another")
    keys.append(build_module.suite_key(suite, "test", False))
    assert len(set(keys)) == 5


class _Loader(yaml.SafeLoader):
    """Reads lmms-eval's YAML; a function stays the text that names it."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_the_task_file_names_the_data_and_the_functions(tmp_path: Path) -> None:
    built = build(tmp_path, 1)
    task = yaml.load((built.tasks / "iv3_world_short.yaml").read_text(), _Loader)
    assert task["task"] == "iv3_world_short"
    assert task["dataset_kwargs"]["data_files"] == {"test": str(built.docs.resolve())}
    assert task["metric_list"][0]["metric"] == SUITES["world_short"].metric
    functions = _functions(built)
    for key in ("doc_to_visual", "doc_to_text", "process_results"):
        file, name = task[key].split(".")
        assert file == "iv3_world" and callable(getattr(functions, name))
    doc = docs_of(built)[0]
    assert functions.doc_to_visual(doc) == [str((built.folder / doc["video"]).resolve())]
    assert functions.doc_to_text(doc, {"pre_prompt": "x"}) == doc["prompt"]


def test_answers_are_scored_for_lmms_eval(tmp_path: Path) -> None:
    built = build(tmp_path, 2)
    functions, docs = _functions(built), docs_of(built)
    rows = [
        functions.process_results(doc, [doc["answer"] if n % 2 == 0 else "no idea"])["accuracy"]
        for n, doc in enumerate(docs)
    ]
    assert [row["score"] for row in rows] == [float(n % 2 == 0) for n in range(len(docs))]
    assert rows[1]["official"]["outcome"] == "unreadable"
    assert rows[0]["video_id"] == docs[0]["video_id"]
    expected = sum(row["score"] for row in rows) / len(rows)
    assert functions.mean_score(rows) == pytest.approx(expected)


def _functions(built: Built) -> Any:
    path = built.tasks / "iv3_world.py"
    spec = importlib.util.spec_from_file_location("iv3_world", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_folder_that_was_moved_gets_its_new_path(tmp_path: Path) -> None:
    build(tmp_path / "old", 1)
    (tmp_path / "old").rename(tmp_path / "new")
    built = build(tmp_path / "new", 1)
    assert built.made == 0
    assert str(tmp_path / "new") in (built.tasks / "iv3_world_short.yaml").read_text()


def test_journal_ignores_other_keys_and_nonsense(tmp_path: Path) -> None:
    journal = files.Journal(tmp_path / "journal")
    assert journal.read("k") == {}
    fields = {"video_sha256": "a", "subtitles_sha256": "b", "size": 1}
    records = [
        files.Record(video_id=name, key=key, **fields)
        for name, key in (("one", "k"), ("two", "other"), ("three", "k"))
    ]
    assert list(journal.append(records[:2])) == records[:2]
    with journal.path.open("a") as file:
        file.write('[1, 2]\n{"video_id": "x"}\n{"torn')
    assert list(journal.append(records[2:])) == records[2:]
    assert journal.read("k") == {"one": records[0], "three": records[2]}
