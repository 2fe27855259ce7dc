"""The suite of brief events beside the world's own: `pytest tests/tasks/test_brief.py`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from internvideo3.harness import cli
from internvideo3.tasks.brief import BRIEF, build_suites
from internvideo3.tasks.world import difficulty, show
from internvideo3.tasks.world.build import BuildError, Built


def test_it_is_built_where_it_is_named_and_only_once(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    names = ["world_brief", "world_short"]
    built = build_suites(names, tmp_path, videos=1, workers=1, progress=lambda *a: told.append(a))
    assert [(one.suite, one.videos, one.made) for one in built] == [
        ("world_short", 1, 1), ("world_brief", 1, 1),
    ]  # fmt: skip
    assert told[-1] == ("world_brief", 1, 1)
    brief = built[1]
    assert brief.questions == len(brief.docs.read_text().splitlines()) > 0
    (again,) = build_suites(["world_brief"], tmp_path, videos=1)
    assert again.made == 0 and again.questions == brief.questions


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["world_brief", "world_shart"], {}, "unknown suite 'world_shart'"),
        (["world_short", "world_brief"], {"sound": True}, "world_brief has no sound"),
        (["world_brief"], {"videos": 0}, "must be at least 1, got 0"),
        (["world_brief"], {"split": "tset"}, "unknown split 'tset'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    names: list[str], options: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=said):
        build_suites(names, tmp_path, **options)  # type: ignore[arg-type]
    assert not any(tmp_path.rglob("*.*"))


def test_the_command_builds_it(tmp_path: Path) -> None:
    command = ["world", "build", "world_brief", "--videos", "1", "--root", str(tmp_path)]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0, result.output
    assert "world_brief: 1 videos, 7 questions" in result.output
    assert (tmp_path / "test/lmms/iv3_world_brief.yaml").is_file()


def build(root: Path, videos: int = 2, **options: int) -> Built:
    (built,) = build_suites(["world_brief"], root, videos=videos, **options)  # type: ignore[arg-type]
    return built


def content(root: Path) -> dict[str, bytes]:
    """Videos, documents and tasks."""
    return {str(path): path.read_bytes() for path in root.rglob("[!.]*") if path.is_file()}


def test_what_is_asked_and_shown_is_what_recorded_results_had(tmp_path: Path) -> None:
    docs = build(tmp_path, 2, workers=2).docs
    assert hashlib.sha256(docs.read_bytes()).hexdigest() == DIGEST
    assert not list(tmp_path.rglob("*.srt"))
    one = build(tmp_path / "one", 2, workers=1)
    for name in ("world_brief-0000.mp4", "world_brief-0001.mp4"):
        assert (one.folder / "videos" / name).read_bytes() == (
            docs.parent / "videos" / name
        ).read_bytes()


DIGEST = "938218a5954c02ea37d12185fa2786bc2b50636374a0b475a9e4d866a01fb4c8"
"""Of the documents of two videos, since the suite was first measured."""


def test_damage_is_repaired_as_in_the_worlds_other_suites(tmp_path: Path) -> None:
    built = build(tmp_path)
    whole = content(tmp_path)
    videos = built.folder / "videos"
    (videos / "world_brief-0000.mp4").write_bytes(b"")
    (videos / "world_brief-0001.mp4").write_bytes(b"rot")
    built.docs.write_text("{}\n")
    built.docs.with_name("world_brief.chat.jsonl").write_text("{}\n")
    assert build(tmp_path).made == 2
    assert content(tmp_path) == whole
    assert build(tmp_path).made == 0


def test_a_smaller_limit_leaves_the_questions_as_they_are(tmp_path: Path) -> None:
    """Their digest says which data a run answered."""
    docs = build(tmp_path, 2).docs.read_bytes()
    smaller = build(tmp_path, 1)
    assert (smaller.videos, smaller.made) == (2, 0)
    assert smaller.docs.read_bytes() == docs
    larger = build(tmp_path, 3)
    assert (larger.videos, larger.made) == (3, 1)
    assert larger.docs.read_bytes().startswith(docs)


def test_another_version_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path, 2)
    monkeypatch.setattr(difficulty, "digest", lambda: "another world")
    built = build(tmp_path, 1)
    assert (built.videos, built.made) == (1, 1)


@pytest.mark.parametrize("built", [False, True])
def test_a_question_of_it_is_shown(built: bool, tmp_path: Path) -> None:
    if built:
        build(tmp_path, 1)
    picture = tmp_path / "question.png"
    command = ["world", "show", "world_brief", "--index", "3", "--root", str(tmp_path)]
    result = CliRunner().invoke(cli.app, [*command, "--out", str(picture)])
    assert result.exit_code == 0, result.output
    assert picture.stat().st_size > 1000
    unknown = CliRunner().invoke(cli.app, ["world", "show", "world_brif"])
    assert unknown.exit_code == 1 and "did you mean world_brief" in unknown.output


def test_it_is_shown_as_it_is_built(tmp_path: Path) -> None:
    """What is drawn on the spot has the short visits, too."""
    doc = show._find(BRIEF, "test", 0, None)
    drawn = show._tiles(BRIEF, "test", doc, tmp_path)
    build(tmp_path, 1)
    read = show._tiles(BRIEF, "test", doc, tmp_path / "test")
    assert drawn.times_s == read.times_s and drawn.source != read.source
    off = np.abs(drawn.pixels_THWC.astype(float) - read.pixels_THWC).mean(axis=(1, 2, 3))
    assert off.max() < 8
