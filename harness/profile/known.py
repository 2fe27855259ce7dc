"""Which points of a workload are measured already: by this code, on this device, often enough.

The newest row of a point rules, here as in the figures: what other code measured says nothing of
this one, and is measured again. Its rows stay in the file.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from internvideo3.harness import provenance
from internvideo3.harness.gpu.measure import MEASURED_CODE
from internvideo3.harness.profile.workload import Point, Workload
from internvideo3.harness.provenance import DECODING

Row = dict[str, Any]
ENDINGS = ("cache", "none")
"""Kinds of a point's last row; a process may have been killed while it wrote the others."""
TRIED_AGAIN = ("failed", "gate red")
MEASURED, MISSING, OTHER_CODE = "measured", "missing", "other code"
PACKAGES = ("torch", "triton", "transformers", "flash-attn")
DECODERS = ("av",)
"""Packages that read a video."""


@functools.cache
def made_by() -> Mapping[str, Any]:
    """What measures now: a digest of the sources, and the versions of what they run on."""
    return {
        "code": provenance.code_digest(MEASURED_CODE),
        "versions": {name: _version(name) for name in PACKAGES},
    }


@functools.cache
def stages_made_by() -> Mapping[str, Any]:
    """The same of what times a video's stages, to which its decoder belongs."""
    return {
        "code": provenance.code_digest((*MEASURED_CODE, *DECODING)),
        "versions": {name: _version(name) for name in (*PACKAGES, *DECODERS)},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_of_this_code(row: Row) -> bool:
    """Whether a row was measured by what measures now."""
    return made_by().items() <= row.items()


def standing(rows: Sequence[Row], point: Point, device: str, workload: Workload) -> str:
    """How a point stands in a file: `MEASURED`, `MISSING`, or of `OTHER_CODE`.

    Args:
        rows: of the file.
        point: it.
        device: name of the device that is to be measured.
        workload: how often it is to be repeated.
    """
    row = _newest(rows, point, device)
    if row is None or (row["status"] != "ok" and is_tried_again(row)):
        return MISSING
    if not is_of_this_code(row):
        return OTHER_CODE
    return MEASURED if row["status"] != "ok" or _is_enough(row, workload) else MISSING


def _newest(rows: Sequence[Row], point: Point, device: str) -> Row | None:
    mine = (
        row
        for row in reversed(rows)
        if row.get("point") == point.key and row["kind"] in ENDINGS and row.get("device") == device
    )
    return next(mine, None)


def is_tried_again(row: Row) -> bool:
    """Whether a point that was not measured may be so another time; rows say it themselves."""
    return bool(row.get("retry", row["status"] in TRIED_AGAIN))


def _is_enough(row: Row, workload: Workload) -> bool:
    """Whether a point was repeated as often as is wanted, or as its device's memory lets it."""
    often = row["repeats"] >= workload.repeats and row.get("warmups", 0) >= workload.warmups
    ran_out = str(row.get("ended_by", "")).startswith("out of memory")
    return bool(often or (ran_out and not row.get("retry")))
