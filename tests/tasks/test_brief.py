"""The suite of brief events beside the world's own: `pytest tests/tasks/test_brief.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from internvideo3.harness import cli
from internvideo3.tasks.brief import build_suites
from internvideo3.tasks.world.build import BuildError


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
