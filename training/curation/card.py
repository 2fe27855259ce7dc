"""A data card: what a file of training data is, where it comes from, what was dropped and why."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvideo3.training.curation.distribution import distribution, table1
from internvideo3.training.curation.records import Row, videos_of


def data_card(
    name: str,
    path: Path,
    rows: Sequence[Row],
    dropped: Mapping[str, str],
    provenance: Mapping[str, Any],
) -> str:
    """The card as Markdown.

    Args:
        name: Of the data set.
        path: Its file.
        rows: Its rows, in the chat form.
        dropped: id → reason, of all steps.
        provenance: Command, commit, models, sources and licences: whatever its maker knows.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    videos = {video for row in rows for video in videos_of(row)}
    parts = [
        f"# {name}",
        f"{len(rows)} rows about {len(videos)} videos; {path.name}, {path.stat().st_size} bytes, "
        f"SHA-256 {digest}.",
        "## Where it comes from",
        "\n".join(f"- {key}: {value}" for key, value in provenance.items()),
        "## What was dropped",
        _drops(dropped),
    ]
    if all("category" in row for row in rows):
        parts += ["## What is asked", table1(distribution(rows))]
    return "\n\n".join(parts) + "\n"


def _drops(dropped: Mapping[str, str]) -> str:
    if not dropped:
        return "Nothing."
    # Numbers and names in a reason differ from row to row; its first words tell the kind.
    kinds = Counter(" ".join(reason.split()[:4]) for reason in dropped.values())
    lines = [f"| {kind} … | {count} |" for kind, count in kinds.most_common()]
    return "\n".join(["| reason | rows |", "| --- | ---: |", *lines])
