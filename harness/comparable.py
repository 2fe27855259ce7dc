"""Whether a run's numbers can be set beside the paper's, suite by suite, and if not, why."""

from collections.abc import Sequence

from internvideo3.harness.preflight import Benchmark
from internvideo3.harness.store import Row
from internvideo3.tasks.benchmarks.protocol import Benchmark as Protocol

_WORLD = "the scale world and the scale model are this repository's own"
_SCALE = "the scale model is this repository's own"
_CAVEAT = (
    "The paper's model wrapper for lmms-eval is not published; settings are those of its scripts. "
    "Of some files decord, with which lmms-eval reads, gives other pictures than asked; here they "
    "are those asked for (tasks/README.md, Decoding)."
)


def comparable(
    benchmarks: Sequence[Benchmark], label: str | None, departures: Sequence[str]
) -> Row:
    """The `comparable` part of run.json.

    Args:
        benchmarks: the suites.
        label: the model's label; `scale` for a scale model.
        departures: what of the command leaves the protocol.
    """
    suites = {one.suite: _reasons(one, label, departures) for one in benchmarks}
    reasons = list(dict.fromkeys(reason for found in suites.values() for reason in found))
    if all(one.local is None for one in benchmarks):
        return {"paper": False, "reason": _WORLD}
    return {
        "paper": not reasons,
        "reason": "; ".join(reasons) or None,
        "caveat": _CAVEAT,
        "suites": {
            suite: {"paper": not found, "reasons": found} for suite, found in suites.items()
        },
    }


def _reasons(one: Benchmark, label: str | None, departures: Sequence[str]) -> list[str]:
    if one.local is None:
        return [_WORLD]
    return reasons_of(one.suite, one.local.benchmark, len(one.docs), label, departures)


def reasons_of(
    suite: str, benchmark: Protocol, answered: int, label: str | None, departures: Sequence[str]
) -> list[str]:
    """Why a benchmark's number cannot be set beside the paper's; empty if it can.

    Args:
        suite: its name, with the ending for subtitles where they are shown.
        benchmark: its protocol.
        answered: how many questions are answered.
        label: the model's label.
        departures: what of the command leaves the protocol.
    """
    expected = benchmark.data.questions
    found = [_SCALE] if label == "scale" else []
    if benchmark.column is None and not benchmark.not_comparable:
        found.append("the paper has no such number")
    if benchmark.not_comparable:
        found.append(benchmark.not_comparable)
    if suite != benchmark.name:
        found.append("subtitles are shown")
    if answered != expected:
        found.append(f"{answered:,} of {expected:,} questions")
    return [*found, *departures]
