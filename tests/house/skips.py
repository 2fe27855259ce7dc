"""Which tests of a JUnit file were not run, and whether that is allowed: only gpu tests may skip.

python tests/house/skips.py JUNIT.xml
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree


@dataclass(frozen=True)
class Verdict:
    """What a run of the tests left out."""

    tests: int
    gpu: int
    """Skipped, and marked gpu."""
    others: tuple[str, ...]
    """Skipped or expected to fail for any other reason: name and reason."""


def judge(junit: Path) -> Verdict:
    """Read a JUnit file that pytest wrote; `tests/conftest.py` marks the gpu tests in it."""
    cases = list(ElementTree.parse(junit).iter("testcase"))
    skipped = [(case, skip) for case in cases if (skip := case.find("skipped")) is not None]
    others = tuple(
        f"{case.get('classname')}::{case.get('name')}: {skip.text or skip.get('message')}"
        for case, skip in skipped
        if case.find("properties/property[@name='gpu']") is None
    )
    return Verdict(len(cases), len(skipped) - len(others), others)


def main(arguments: list[str]) -> int:
    """Print the verdict; 1 where something was skipped that is not marked gpu, or nothing ran."""
    verdict = judge(Path(arguments[0]))
    say = f"{verdict.tests} tests, {verdict.gpu} skipped for want of a GPU"
    sys.stdout.write(f"{say}, {len(verdict.others)} skipped for other reasons\n")
    sys.stdout.writelines(f"  {one}\n" for one in verdict.others)
    return 1 if verdict.others or verdict.tests == verdict.gpu else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
