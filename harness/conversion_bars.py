"""Every bar of the conversion with its figure and verdict: `make conversion-bars`.

Two kinds. *Now*: identities and the quick form on a real model, which the tests measure; each test
that holds a bar says its figure and limit in pytest's JUnit file, so the figure is the one that the
test judges. *Recorded*: what takes hours, out of the files under reports/results/conversion/.

    python -m internvideo3.harness.conversion_bars --out reports/results/conversion/bars.json

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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from internvideo3.harness import provenance
from internvideo3.harness.store import write_json
from internvideo3.model.checkpoint import read_json

log = logging.getLogger("internvideo3.conversion")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "reports" / "results" / "conversion"

TESTS = (
    "tests/model/test_conversion.py",
    "tests/model/test_released.py",
    "tests/harness/test_conversion_real.py",
)
"""Whose tests hold bars."""

PROPERTY = "bar"
"""Name of the property by which a test says its bar in the JUnit file; see tests/conftest.py."""


@dataclass(frozen=True)
class Bar:
    """A figure that may not be above a limit."""

    name: str
    found: dict[str, float]
    """By test, or by seed."""
    limit: float
    source: str
    """The test file that measured it now, or the results file."""
    measured: str
    """"now" or "recorded"."""

    @property
    def met(self) -> bool:
        """Whether every figure keeps the limit."""
        return all(found <= self.limit for found in self.found.values())

    def line(self) -> str:
        """In words."""
        worst, count = max(self.found.values()), len(self.found)
        cases = f"worst of {count}" if count > 1 else ""
        verdict = "met" if self.met else "MISSED"
        return (
            f"{self.name:<56} {worst:>9.3g} {cases:<12} at most {self.limit:<8.3g} {verdict:<7}"
            f"{self.measured}: {self.source}"
        )


class BarsError(ValueError):
    """Bars that cannot be measured; says why and what to do."""


def measured_now(junit: Path) -> list[Bar]:
    """Bars that tests said in a JUnit file; one of several cases has the figure of each."""
    found: dict[str, Bar] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        for given in case.iter("property"):
            if given.get("name") != PROPERTY:
                continue
            said = json.loads(given.get("value", ""))
            source = case.get("classname", "").replace(".", "/") + ".py"
            first = Bar(said["name"], {}, said["limit"], source, "now")
            bar = found.setdefault(said["name"], first)
            bar.found[f"{case.get('name')} {len(bar.found)}"] = said["found"]
    return list(found.values())


def recorded(folder: Path = RESULTS) -> Iterator[Bar]:
    """Bars of the results files.

    Raises:
        BarsError: a file is missing.
    """
    for name, bar in _results(folder, "smollm2.json")["bars"].items():
        title = f"SmolLM2-135M, {name}"
        yield Bar(title, bar["found"], bar["limit"], "smollm2.json", "recorded")
    norms = _results(folder, "gemma3_norms.json")["bar"]
    title = "Gemma-3-270M, exact norm: change of perplexity"
    yield Bar(title, {"": norms["found"]}, norms["limit"], "gemma3_norms.json", "recorded")
    scale = _results(folder, "scale_ablation.json")["bar"]
    for title, figure in (("in the mean", "mean_lost"), ("in a suite", "most_lost_in_a_suite")):
        yield Bar(
            f"scale model, points of accuracy lost, {title}",
            {"": scale[figure]},
            scale["limit_points"],
            "scale_ablation.json",
            "recorded",
        )
    memory = _results(folder, "memory.json")
    for preset, key in (("half", "qwen3_vl_8b"), ("official", "qwen3_vl_8b_official")):
        yield Bar(
            f"8B, {preset}: planned GB above the weights",
            {"": memory[key]["most_above_weights_with_libraries"] / 1e9},
            memory[key]["limit_above_weights"] / 1e9,
            "memory.json",
            "recorded",
        )


def _results(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise BarsError(f"{folder / name} is missing; its folder's README says how it is made.")
    return read_json(folder / name)


def run_tests(junit: Path) -> bool:
    """Runs the tests that hold bars; whether all passed.

    Raises:
        BarsError: there are no tests here, or pytest could not run them.
    """
    lacking = [name for name in TESTS if not (ROOT / name).is_file()]
    if lacking:
        raise BarsError(f"{ROOT} has no {', '.join(lacking)}; run this in a checkout.")
    command = [sys.executable, "-m", "pytest", *TESTS, "-q", f"--junitxml={junit}"]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status not in (0, 1):
        raise BarsError(f"pytest ended with status {status}: {shlex.join(command)}")
    return status == 0


def report(bars: list[Bar], passed: bool) -> Mapping[str, Any]:
    """What the file holds."""
    commit, dirty = provenance.revision()
    return {
        "what": "bars of the conversion; recorded ones are of the commits that their files name",
        "command": shlex.join(["python", "-m", "internvideo3.harness.conversion_bars"]),
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="internvideo3-bars-") as place:
        junit = Path(place) / "junit.xml"
        passed = run_tests(junit)
        now = measured_now(junit)
    bars = [*now, *recorded()]
    write_json(given.out, report(bars, passed))
    for bar in bars:
        log.info("%s", bar.line())
    log.info("%d bars, %d missed", len(bars), sum(not bar.met for bar in bars))
    if not passed:
        log.error("tests failed: see above; a bar whose test failed early is not in the list.")
    sys.exit(0 if passed and all(bar.met for bar in now) else 1)


if __name__ == "__main__":
    main()
