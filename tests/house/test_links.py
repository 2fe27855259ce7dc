"""What the documents say exists: links, files, commands, options, make targets, pinned versions.

pytest tests/house/test_links.py
"""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.requirements import Requirement

from internvideo3.harness.cli import app

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("harness", "kernels", "model", "reports", "tasks", "training")
DOCUMENTS = sorted(
    path
    for folder in ("", ".github", "docs", "tests", *ROOMS)
    for path in (ROOT / folder).glob("*.md" if folder == "" else "**/*.md")
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


def broken(path: Path) -> Iterator[str]:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"(https?|mailto):", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        if not linked.exists():
            yield f"{path.name} links to {target}, which does not exist"
        elif anchor and anchor not in anchors(linked):
            yield f"{path.name} links to {target}; {linked.name} has no such heading"


def commands(program: str) -> Iterator[tuple[str, list[str]]]:
    """Every command line in the documents that starts with a program: document and words."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        fences = [block for kind, block in FENCE.findall(text) if kind in ("", "sh")]
        lines = [line for block in fences for line in block.splitlines()]
        for line in (*lines, *SPAN.findall(FENCE.sub("", text))):
            if line.startswith(f"{program} "):
                yield name(path), shlex.split(line, comments=True)[1:]


def test_links_lead_somewhere() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= {name(path) for path in DOCUMENTS}
    assert [fault for path in DOCUMENTS for fault in broken(path)] == []


def test_documents_that_the_code_names_exist() -> None:
    code = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    told = {
        word
        for path in (ROOT / "Makefile", *code)
        for word in re.findall(r"\b[\w./]+/\w+\.md\b", path.read_text(encoding="utf-8"))
    }
    assert "model/scale/MODEL_CARD.md" in told
    assert {word for word in told if not (ROOT / word).exists()} == set()


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](gone.md) [b](#a-title) [c](#no-title) [d](https://x.org)\n")
    assert list(broken(page)) == [
        "page.md links to gone.md, which does not exist",
        "page.md links to #no-title; page.md has no such heading",
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_a_sign_that_names_files_which_exist(room: str) -> None:
    text = (ROOT / room / "README.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    told = [one for cell in cells for one in SPAN.findall(cell) if re.search(r"\.\w+$|/$", one)]
    known = {folder for folder in (ROOT / room).rglob("*") if folder.is_dir()} | {ROOT / room}
    missing = [one for one in told if not any((folder / one).exists() for folder in known)]
    assert missing == []


def test_commands_in_the_documents_exist_with_their_options() -> None:
    known = typer.main.get_command(app)
    told = list(commands("internvideo3"))
    assert len(told) > 5
    for document, words in told:
        command: Any = known
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands"), f"{document}: internvideo3 has no {words[:1]}"
        options = {option for parameter in command.params for option in parameter.opts}
        unknown = {word for word in words if word.startswith("--")} - options - {"--help"}
        assert not unknown, f"{document}: internvideo3 {command.name} has no {unknown}"


def test_make_targets_in_the_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w.-]+):", makefile, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert set(phony.split()) - targets == set()
    told = {word for _, words in commands("make") for word in words if "=" not in word}
    assert {"demo", "test", "check"} <= told
    assert told - targets == set()


def test_each_test_file_opens_with_its_command() -> None:
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        assert f"pytest {name(path)}" in docstring, name(path)


def test_the_constraints_pin_every_dependency_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *_with_extras(project["optional-dependencies"], "dev")]
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    pinned = {_normal(package): version for package, version in pins.items()}
    for requirement in map(Requirement, wanted):
        version = pinned.get(_normal(requirement.name))
        assert version, f"{requirement.name} has no line in constraints.txt"
        assert version in requirement.specifier, f"{requirement} against {version}"


def _with_extras(extras: dict[str, list[str]], extra: str) -> Iterator[str]:
    """Requirements of an extra; where it names the project's own extras, theirs too."""
    for text in extras[extra]:
        requirement = Requirement(text)
        if requirement.name != "internvideo3":
            yield text
        for inner in requirement.extras if requirement.name == "internvideo3" else ():
            yield from _with_extras(extras, inner)


def _normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
