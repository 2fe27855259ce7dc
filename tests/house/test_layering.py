"""Who may import whom, read from the source of every room.

pytest tests/house/test_layering.py
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "internvideo3"
MAY_IMPORT = {
    "harness": {"training", "model", "tasks", "reports"},
    "training": {"model", "tasks"},
    "model": {"kernels"},
    "reports": {"tasks"},
    "tasks": set(),
    "kernels": set(),
}
PROFILERS = ("harness/gpu/", "harness/profile")
"""The part of the harness that may reach past the model to the kernels."""
WITHOUT_TORCH = ("tasks", "reports")
TORCH = {"torch", "torchvision", "transformers", "triton"}
LMMS = "harness/lmms.py"
LMMS_MANIFEST = "harness/lmms_manifest.py"
"""lmms-eval's own entry point loads it, so lmms-eval is imported by then; we never import it."""
NOTHING_NAMES = {"utils.py", "misc.py", "common.py", "helpers.py"}


def sources(root: Path) -> list[Path]:
    return sorted(path for room in MAY_IMPORT for path in (root / room).rglob("*.py"))


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a module imports, relative imports made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -(node.level - 1) or None] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            yield node.lineno, base
            # `from internvideo3 import model` names a room only in its second half.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            yield from (
                (node.lineno, argument.value)
                for argument in node.args[:1]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            )


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def climbs(tree: ast.AST, depth: int) -> Iterator[int]:
    """Lines with a relative import that leaves the room; `depth` folders lie inside the room."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > depth:
            yield node.lineno


def complaints(root: Path) -> list[str]:
    found = []
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"), name)
        inside = path.parent.relative_to(root).parts
        package = ".".join((PACKAGE, *inside))
        found += [
            f"{name}:{line} climbs out of its room; import {PACKAGE}.<room>.<file>"
            for line in climbs(tree, len(inside))
        ]
        for line, what in imported(tree, package):
            found += [f"{name}:{line} {reason}" for reason in _judge(name, inside[0], what)]
    return sorted(set(found))


def _judge(name: str, room: str, what: str) -> Iterator[str]:
    top, _, rest = what.partition(".")
    if top == PACKAGE:
        yield from _judge_room(name, room, rest.partition(".")[0])
        if rest.startswith("harness.lmms_manifest"):
            yield "imports lmms_manifest, which only lmms-eval's entry point may load"
    elif top in MAY_IMPORT:
        yield f"imports {what}; rooms are imported as {PACKAGE}.{what}"
    elif room in WITHOUT_TORCH and top in TORCH:
        yield f"imports {top}; {room}/ runs without torch"
    elif top == "triton" and Path(name).stem.partition("_")[0] not in ("triton", "gluon"):
        yield "imports triton; only files named triton or gluon may"
    elif top == "lmms_eval" and name not in (LMMS, LMMS_MANIFEST):
        yield f"imports lmms_eval; only {LMMS} may (it costs 10-20 s and 1 GB)"


def _judge_room(name: str, room: str, other: str) -> Iterator[str]:
    if other not in MAY_IMPORT or other == room or other in MAY_IMPORT[room]:
        return
    if other == "kernels" and name.startswith(PROFILERS):
        return
    allowed = ", ".join(sorted(MAY_IMPORT[room])) or "nothing of ours"
    yield f"imports {other}/; {room}/ may import only {allowed}"


def test_every_room_keeps_to_its_floor() -> None:
    assert len(sources(ROOT)) > 50
    assert complaints(ROOT) == []


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("kernels/a.py", "import internvideo3.harness.cli", "may import only nothing of ours"),
        ("model/a.py", "from internvideo3.tasks.video import Frames", "may import only kernels"),
        ("model/a.py", "from internvideo3 import training", "imports training/"),
        ("reports/a.py", "import importlib\nimportlib.import_module('internvideo3.model.x')",
         "reports/ may import only tasks"),
        ("harness/a.py", "from internvideo3.kernels.choice import x", "imports kernels/"),
        ("tasks/a.py", "def f():\n    import torch", "tasks/ runs without torch"),
        ("reports/a.py", "from transformers import AutoModel", "reports/ runs without torch"),
        ("kernels/x/naive.py", "import triton.language as tl", "only files named triton or gluon"),
        ("harness/a.py", "import lmms_eval.evaluator", "only harness/lmms.py may"),
        ("harness/a.py", "from internvideo3.harness.lmms_manifest import manifests",
         "only lmms-eval's entry point"),
        ("model/a.py", "from kernels.choice import x", "imported as internvideo3.kernels"),
        ("tasks/a.py", "from .video import Frames", ""),
        ("tasks/a.py", "from ..model import config", "climbs out of its room"),
        ("tasks/world/a.py", "from ...model.config import x", "tasks/ may import only nothing"),
        ("tasks/world/a.py", "from ..video import Frames", ""),
        ("harness/gpu/a.py", "from internvideo3.kernels.choice import x", ""),
        ("harness/lmms.py", "import lmms_eval", ""),
        ("kernels/x/triton.py", "import triton", ""),
        ("kernels/x/gluon_fp8.py", "from triton.experimental import gluon", ""),
    ],
)  # fmt: skip
def test_a_planted_import_is_found(tmp_path: Path, name: str, code: str, said: str) -> None:
    planted = tmp_path / name
    planted.parent.mkdir(parents=True)
    planted.write_text(code)
    found = "\n".join(complaints(tmp_path))
    assert (said in found) if said else (found == "")
    assert not said or found.startswith(f"{name}:")


def test_rooms_are_namespaces_and_files_have_names_that_tell() -> None:
    # A regular package always beats a namespace folder: with an __init__.py, kernels/ would
    # shadow Hugging Face's package of that name whenever the repository is on sys.path.
    assert [room for room in MAY_IMPORT if (ROOT / room / "__init__.py").exists()] == []
    assert [str(path) for path in sources(ROOT) if path.name in NOTHING_NAMES] == []


def test_each_kernel_lies_beside_its_definition_and_its_derivation() -> None:
    for kernel in ROOT.glob("kernels/*/triton.py"):
        assert (kernel.parent / "naive.py").is_file(), kernel
        assert (kernel.parent / "README.md").is_file(), kernel


def test_the_door_links_to_every_room() -> None:
    door = ROOT / "src" / PACKAGE
    links = {path.name: path.readlink().as_posix() for path in door.iterdir() if path.is_symlink()}
    assert links == {room: f"../../{room}" for room in MAY_IMPORT}


def test_tasks_and_reports_load_without_torch() -> None:
    names = [
        f"{PACKAGE}.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
        for path in sources(ROOT)
        if path.relative_to(ROOT).parts[0] in WITHOUT_TORCH and path.name != "__init__.py"
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n    importlib.import_module(name)\n"
        f"print('HEAVY', sorted({TORCH | {'lmms_eval'}!r} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr
