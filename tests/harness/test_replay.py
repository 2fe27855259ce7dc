"""`trace replay` and `trace show`: the same rollout from its file, and what tells that it is not.

pytest tests/harness/test_replay.py
"""

import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from internvideo3.harness.ask import AskOptions, ask
from internvideo3.harness.locks import lock
from internvideo3.harness.replay import replay, show
from internvideo3.harness.traces import LOCK, ROLLOUT, claimed

QUESTION = (
    "What does the man say?\nA. hello\nB. goodbye\nC. nothing\nAnswer with the text of one option."
)
SAID = "1\n00:00:01,000 --> 00:00:02,000\nHello, said the man.\n"


@pytest.fixture(scope="module")
def asked(world: Path, tmp_path_factory: pytest.TempPathFactory) -> AskOptions:
    """A rollout that has called a tool: what is said is read from subtitles."""
    folder = tmp_path_factory.mktemp("asked")
    video = folder / "video.mp4"
    shutil.copy(min((world / "test/videos").glob("*.mp4")), video)
    video.with_suffix(".srt").write_text(SAID)
    options = AskOptions(
        video=video, question=QUESTION, out=folder / "out", cache=folder / "cache", turns=3,
        tool_calls=3, max_new_tokens=8, max_frames=16, temperature=1.0, seed=4,
    )  # fmt: skip
    ask(options)
    return options


def trace_of(options: AskOptions) -> dict[str, Any]:
    trace: dict[str, Any] = json.loads((options.out / "trace.json").read_text())
    return trace


def again(asked: AskOptions, out: Path, **other: Any) -> AskOptions:
    given = {"video": asked.video, "model": "", "cache": asked.cache} | other
    return AskOptions(question="", out=out, **given)


@pytest.mark.parametrize("live", [False, True])
def test_the_same_rollout_comes_of_its_file(asked: AskOptions, tmp_path: Path, live: bool) -> None:
    done = replay(asked.out / "trace.json", again(asked, tmp_path), live=live)
    assert done.differing == () and done.page.is_file()
    assert (tmp_path / "trace.json").read_bytes() == (asked.out / "trace.json").read_bytes()
    assert any(row["tool"] == "subtitles" for row in done.trace["tool_results"])


def test_recorded_results_stand_in_for_the_tools(asked: AskOptions, tmp_path: Path) -> None:
    """Other words in the record are what the rollout hears; without a record, it hears why."""
    trace = trace_of(asked)
    told = json.dumps(trace["tool_results"]).replace("Hello", "Goodbye")
    for results, heard in ((json.loads(told), "Goodbye, said"), ([], "no result of this call")):
        changed = tmp_path / "changed.json.gz"
        changed.write_bytes(gzip.compress(json.dumps(trace | {"tool_results": results}).encode()))
        done = replay(changed, again(asked, tmp_path / heard.split()[0]), live=False)
        (entry,) = [one for one in done.trace["entries"] if one["source"] == "asr"]
        assert heard in entry["text"] and "entries" in done.differing


def test_another_video_or_an_old_trace_is_refused(asked: AskOptions, tmp_path: Path) -> None:
    other = tmp_path / "other.mp4"
    other.write_bytes(asked.video.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="is not the video of the trace, video.mp4"):
        replay(asked.out / "trace.json", again(asked, tmp_path, video=other), live=False)
    old = tmp_path / "old.json"
    old.write_text(json.dumps(trace_of(asked) | {"schema": 1}))
    with pytest.raises(ValueError, match="is of version 1"):
        replay(old, again(asked, tmp_path), live=False)
    with pytest.raises(ValueError, match="is of version 1"):
        show(old, None, tmp_path / "old.html")


def test_a_rollout_is_not_written_over(asked: AskOptions) -> None:
    """Least of all by its own replay."""
    before = (asked.out / "trace.json").read_bytes()
    with pytest.raises(ValueError, match="already holds a rollout"):
        replay(asked.out / "trace.json", again(asked, asked.out), live=False)
    with pytest.raises(ValueError, match="already holds a rollout"):
        ask(asked)
    assert (asked.out / "trace.json").read_bytes() == before


def test_two_rollouts_at_once_have_folders_of_their_own(asked: AskOptions, tmp_path: Path) -> None:
    place = tmp_path / "ask"
    with claimed(place, numbered=True) as one, claimed(place, numbered=True) as other:
        assert (one, other) == (place, tmp_path / "ask-2")
        with pytest.raises(ValueError, match="another process is writing a rollout to"):
            ask(replace(asked, out=place))
    assert not place.exists() and not other.exists()  # nothing came of them
    place.mkdir()
    (place / LOCK).touch()  # of a process that was killed
    with claimed(place, numbered=True) as again_:
        assert again_ == place
    (place / "timings.json").write_text("[]")
    with claimed(place, numbered=True) as beside:
        assert beside == tmp_path / "ask-2"
    with pytest.raises(ValueError, match=r"already holds a rollout \(timings.json\)"):
        ask(replace(asked, out=place))
    assert (place / "timings.json").read_text() == "[]"


def test_a_rollout_that_came_while_waiting_for_the_lock_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "ask"

    def lock_late(path: Path) -> IO[str]:
        (path.parent / ROLLOUT).write_text("of another process")
        return lock(path)

    monkeypatch.setattr("internvideo3.harness.traces.lock", lock_late)
    with pytest.raises(ValueError, match="already holds a rollout"), claimed(place):
        pytest.fail("two have it")
    assert [one.name for one in place.iterdir()] == [ROLLOUT]


def test_commands_replay_and_show(asked: AskOptions, tmp_path: Path) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "internvideo3.harness.cli", "trace", *words]
        return subprocess.run(
            line, capture_output=True, text=True, timeout=200, check=False, cwd=tmp_path
        )

    trace, video = str(asked.out / "trace.json"), str(asked.video)
    replayed = command("replay", trace, video)
    assert replayed.returncode == 0, replayed.stderr
    answer, same, page = replayed.stdout.splitlines()
    assert answer == trace_of(asked)["answer"]["answer"] and same == "The same rollout."
    assert Path(page.removeprefix("Page: ")).is_file()
    shown = command("show", trace, "--video", video)
    assert shown.returncode == 0 and (tmp_path / "trace.html").stat().st_size > 10_000
    assert Path(page.removeprefix("Page: ")).parent.name == "replay"
    assert command("replay", trace, video).returncode == 0
    assert (tmp_path / "replay-2/trace.json").is_file(), "the first replay is kept"
    for words in (("show", "nowhere.json"), ("replay", trace, "nowhere.mp4")):
        failed = command(*words)
        assert failed.returncode == 1 and "Traceback" not in failed.stderr
        assert "nowhere" in failed.stderr
