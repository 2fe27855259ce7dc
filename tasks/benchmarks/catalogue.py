"""All benchmarks by name, and the suites that are made of them."""

from . import grounding, long, short, spatial
from .protocol import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    one.name: one for part in (long, short, grounding, spatial) for one in part.BENCHMARKS
}
SUBTITLED = "_subtitles"
"""Ending of a benchmark's name where its subtitles are shown too."""


def suites() -> dict[str, tuple[str, ...]]:
    """Names that stand for several benchmarks: the paper's groups, `paper` for all of them.

    The subset of EgoSchema, the classic grounding annotations and TempCompass' other kinds of
    question are in no group of the paper; ask for them by name, or by `classic`.
    """
    in_paper = [one for one in BENCHMARKS.values() if one.group != "classic"]
    whole = [one for one in in_paper if one.name != "egoschema_subset"]
    groups = {
        group: tuple(one.name for one in whole if one.group == group)
        for group in ("long", "short", "grounding", "spatial")
    }
    classic = tuple(one.name for one in BENCHMARKS.values() if one.group == "classic")
    return groups | {"paper": tuple(one.name for one in whole), "classic": classic}
