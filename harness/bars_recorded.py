"""Bars that take hours to measure, out of the files under reports/results/."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvideo3.model.checkpoint import read_json

RESULTS = Path(__file__).resolve().parents[1] / "reports" / "results"


@dataclass(frozen=True)
class Bar:
    """A figure that may not be above a limit, or not below it."""

    name: str
    found: dict[str, float]
    """By test, or by seed."""
    limit: float
    source: str
    """The test file that measured it now, or the results file."""
    measured: str
    """"now" or "recorded"."""
    least: bool = False
    """Whether the limit is the least that the figure may be."""

    @property
    def met(self) -> bool:
        """Whether every figure keeps the limit."""
        found = self.found.values()
        return all(one >= self.limit if self.least else one <= self.limit for one in found)

    def line(self) -> str:
        """In words."""
        found, count = self.found.values(), len(self.found)
        worst = min(found) if self.least else max(found)
        cases = f"worst of {count}" if count > 1 else ""
        verdict = "met" if self.met else "MISSED"
        return (
            f"{self.name:<70} {worst:>9.3g} {cases:<12} "
            f"{'at least' if self.least else 'at most '} {self.limit:<8.3g} {verdict:<7}"
            f"{self.measured}: {self.source}"
        )


class BarsError(ValueError):
    """Bars that cannot be measured; says why and what to do."""


def conversion(folder: Path = RESULTS / "conversion") -> Iterator[Bar]:
    """Bars of the conversion: on real models, by the reports of hours.

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


def agent(folder: Path = RESULTS / "agent") -> Iterator[Bar]:
    """Bars of the agent: Table 6 at scale, the difference and the lower end of its interval.

    Raises:
        BarsError: a file is missing, or a table lacks a row.
    """
    for table, system in (
        ("base", "agentic (controller)"),
        ("m2la", "agentic (controller)"),
        ("own", "scale:agent: agentic (trained)"),
        ("fresh", "scale:m2la: agentic (controller)"),
        ("fresh", "scale:agent: agentic (trained)"),
    ):
        read = _results(folder / table, "table6.json")["rows"]
        (row,) = [one for one in read if one["system"] == system] or [None]
        if row is None:
            raise BarsError(f"{folder / table}/table6.json has no row {system}.")
        where = f"{table}/table6.json"
        for title, key, most in (
            ("points over direct", "difference", 10.0),
            ("points over looks at random", "over_random", 5.0),
        ):
            for name, figure, limit in (
                (title, row[key], most), (f"{title}, lower end", row[f"{key}_low"], 0.0)
            ):  # fmt: skip
                said = f"{table}, {system.removeprefix('scale:')}: {name}"
                yield Bar(said, {"": 100 * figure}, limit, where, "recorded", True)


def _results(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise BarsError(f"{folder / name} is missing; its folder's README says how it is made.")
    return read_json(folder / name)


RECORDED: Mapping[str, Callable[[], Iterator[Bar]]] = {"conversion": conversion, "agent": agent}
"""By room."""
