"""The wheel holds all that the demo needs, and the demo runs from it where no repository is.

pytest tests/house/test_wheel.py

How it is isolated: the wheel is built from a copy of the sources and installed by pip into a
virtual environment of its own. That environment is empty but for one path line, which lends it
the third-party packages of the environment that runs the tests, so that torch is not downloaded
again. A path line does not run the `.pth` files of the folder it names, so an editable install of
this repository stays out of reach, and the test asks the new environment where its code lies. The
home folder is empty too, the working folder is new, and there is no network to be used.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("harness", "kernels", "model", "reports", "tasks", "training")
CHECKPOINTS = ("base", "m2la", "control", "agent", "teacher")


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel in it."""

    folder: Path
    home: Path

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's commands in an empty folder."""
        empty = self.home / "empty"
        empty.mkdir(exist_ok=True)
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "TMPDIR") if key in os.environ}
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        return subprocess.run(
            [str(self.folder / "bin" / command[0]), *command[1:]],
            cwd=empty,
            env=kept | quiet | {"HOME": str(self.home), "COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )


def pip(*arguments: str | Path) -> None:
    offline = ("--no-index", "--no-deps", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", *map(str, arguments), *offline]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that the checkout gets no build/ and no egg-info."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*ROOMS, "src"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip("wheel", copy, "--no-build-isolation", "--wheel-dir", out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    pip("--python", folder / "bin" / "python", "install", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    lent = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (site / "lent.pth").write_text("\n".join(sorted(lent)))
    return Installed(folder, tmp_path_factory.mktemp("home"))


def test_the_wheel_holds_every_file_that_is_not_python_by_kind(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = [f"internvideo3/model/scale/{name}" for name in CHECKPOINTS]
    wanted = {f"{folder}/{name}" for folder in folders
              for name in ("config.json", "model.safetensors", "tokenizer.json")}  # fmt: skip
    wanted |= {
        "internvideo3/py.typed",
        "internvideo3/reports/templates/report.html.jinja",
        "internvideo3/reports/templates/report.css",
        "internvideo3/reports/templates/report.js",
        "internvideo3/kernels/latent_decode/README.md",
    }
    assert sorted(wanted - names) == []


def test_the_wheel_holds_what_the_rooms_hold(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for room in ROOMS:
        files = {path.relative_to(ROOT) for path in (ROOT / room).rglob("*") if path.is_file()}
        told = {path.as_posix() for path in files if "__pycache__" not in path.parts}
        left_out = {name for name in told if f"internvideo3/{name}" not in names}
        # Shell scripts are for a checkout: nothing reads them at run time.
        assert {name for name in left_out if not name.endswith((".sh", ".log"))} == set()


def test_no_code_comes_from_the_repository(installed: Installed) -> None:
    code = (
        "import internvideo3, internvideo3.harness.cli as cli, sys\n"
        "print(*internvideo3.__path__, cli.__file__, *sys.path, sep='\\n')"
    )
    done = installed.run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    lent = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    told = [line for line in done.stdout.splitlines() if line not in lent]
    assert told[0].startswith(str(installed.folder))
    assert [line for line in told if Path(line).is_relative_to(ROOT)] == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_runs_from_the_wheel(installed: Installed) -> None:
    done = installed.run("internvideo3", "demo", "--videos", "2", "--out", "demo", timeout=550)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    page = installed.home / "empty" / "demo" / "report.html"
    assert f"Page: {page}" in done.stdout
    assert "scale:m2la" in page.read_text(encoding="utf-8")
    for run in ("base", "m2la", "blind"):
        results = json.loads((page.parent / "runs" / run / "results.json").read_text())
        assert {name: result["errors"] for name, result in results.items()} == dict.fromkeys(
            ("world_long", "world_ego", "world_short", "world_grounding", "world_spatial",
             "world_manyq"), 0)  # fmt: skip
