"""Every bar of a room with its figure and verdict: `make conversion-bars`, `make agent-bars`.

Two kinds. *Now*: what tests measure; each test that holds a bar says its figure and limit in
pytest's JUnit file, so the figure is the one that the test judges. *Recorded*: what takes hours,
out of the files under reports/results/.

    python -m internvideo3.harness.bars conversion --out reports/results/conversion/bars.json

The exit status is 1 if a test fails now, or a bar measured now is missed.
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from internvideo3.harness import provenance
from internvideo3.harness.bars_recorded import RECORDED, Bar, BarsError
from internvideo3.harness.store import write_json

log = logging.getLogger("internvideo3.conversion")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "reports" / "results"

TESTS = {
    "conversion": (
        "tests/model/test_conversion.py",
        "tests/model/test_released.py",
        "tests/harness/test_conversion_real.py",
    ),
    "agent": (
        "tests/agent/test_tools.py",
        "tests/agent/test_context.py",
        "tests/agent/test_rollout.py",
        "tests/agent/test_desk.py",
    ),
}
"""Whose tests hold bars."""

PROPERTY = "bar"
"""Name of the property by which a test says its bar in the JUnit file; see tests/conftest.py."""


def measured_now(junit: Path) -> list[Bar]:
    """Bars that tests said in a JUnit file; one of several cases has the figure of each."""
    found: dict[str, Bar] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        for given in case.iter("property"):
            if given.get("name") != PROPERTY:
                continue
            said = json.loads(given.get("value", ""))
            source = case.get("classname", "").replace(".", "/") + ".py"
            first = Bar(said["name"], {}, said["limit"], source, "now", said["least"])
            bar = found.setdefault(said["name"], first)
            bar.found[f"{case.get('name')} {len(bar.found)}"] = said["found"]
    return list(found.values())


def run_tests(tests: Sequence[str], junit: Path) -> bool:
    """Runs the tests that hold bars; whether all passed.

    Raises:
        BarsError: there are no tests here, or pytest could not run them.
    """
    lacking = [name for name in tests if not (ROOT / name).is_file()]
    if lacking:
        raise BarsError(f"{ROOT} has no {', '.join(lacking)}; run this in a checkout.")
    command = [sys.executable, "-m", "pytest", *tests, "-q", f"--junitxml={junit}"]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status not in (0, 1):
        raise BarsError(f"pytest ended with status {status}: {shlex.join(command)}")
    return status == 0


def report(room: str, bars: list[Bar], passed: bool) -> Mapping[str, Any]:
    """What the file holds."""
    commit, dirty = provenance.revision()
    return {
        "what": f"bars of the {room}; recorded ones are of the commits that their files name",
        "command": shlex.join(["python", "-m", "internvideo3.harness.bars", room]),
        "commit": commit,
        "dirty": dirty,
        "made_at": provenance.now(),
        "packages": provenance.packages(),
        "tests_passed": passed,
        "bars": [asdict(bar) | {"met": bar.met} for bar in bars],
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures what is quick, reads the rest, says every verdict."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("room", choices=tuple(TESTS), help="whose bars")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="internvideo3-bars-") as place:
        junit = Path(place) / "junit.xml"
        passed = run_tests(TESTS[given.room], junit)
        now = measured_now(junit)
    bars = [*now, *RECORDED[given.room]()]
    write_json(given.out, report(given.room, bars, passed))
    for bar in bars:
        log.info("%s", bar.line())
    log.info("%d bars, %d missed", len(bars), sum(not bar.met for bar in bars))
    if not passed:
        log.error("tests failed: see above; a bar whose test failed early is not in the list.")
    sys.exit(0 if passed and all(bar.met for bar in now) else 1)


if __name__ == "__main__":
    main()
