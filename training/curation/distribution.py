"""What a corpus of questions is like, beside the paper's own: Table 1 and Figure 5."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from internvideo3.training.curation.records import Row, user_text, videos_of
from internvideo3.training.curation.synthesis import DIMENSIONS, PUBLISHED, shares


def distribution(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts and shares by category, lengths, words, and where right options stand."""
    by_category = Counter(row["category"] for row in rows)
    total = max(1, len(rows))
    published = shares()
    categories = {
        name: {"count": by_category[name], "percent": 100 * by_category[name] / total,
               "paper_percent": 100 * share}
        for name, share in published.items()
    }  # fmt: skip
    dimensions = {
        dimension: {
            "count": sum(by_category[name] for name in names),
            "percent": 100 * sum(by_category[name] for name in names) / total,
            "paper_percent": 100 * sum(published[name] for name in names),
        }
        for dimension, names in DIMENSIONS.items()
    }
    gaps = [abs(one["percent"] - one["paper_percent"]) for one in categories.values()]
    return {
        "questions": len(rows),
        "videos": len(_durations(rows)),
        "mean_minutes": float(np.mean(list(_durations(rows).values()) or [0.0])) / 60,
        "paper_mean_minutes": PUBLISHED["long_video"]["mean_minutes"],
        "dimensions": dimensions,
        "categories": categories,
        "total_variation_percent": sum(gaps) / 2,
        "unknown_categories": sorted(set(by_category) - set(published)),
        "right_option": dict(sorted(Counter(_place(row) for row in rows).items())),
        "mean_words": {name: float(np.mean(w or [0])) for name, w in word_counts(rows).items()},
    }


def word_counts(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Words of context, question, answer and options of each row (Figure 5, bottom)."""
    return {
        "context": [_words(row.get("context", "")) for row in rows],
        "question": [_words(user_text(row).split("\n")[0]) for row in rows],
        "answer": [_words(row["answer"]) for row in rows],
        "option": [_words(option) for row in rows for option in row["options"]],
    }


def table1(told: dict[str, Any]) -> str:
    """Table 1 as Markdown, ours beside the paper's."""
    lines = ["| dimension, category | questions | % | paper % |", "| --- | ---: | ---: | ---: |"]
    for dimension, names in DIMENSIONS.items():
        lines.append(_line(f"**{dimension}**", told["dimensions"][dimension]))
        lines += [_line(name, told["categories"][name]) for name in names]
    lines.append(f"\nTotal variation from Table 1: {told['total_variation_percent']:.1f} %.")
    return "\n".join(lines)


def figure5(rows: Sequence[Row], path: Path) -> None:
    """Lengths of videos above, words of context, question, answer and options below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    top, *bottom = figure.subplot_mosaic("AAAA;BCDE").values()
    durations = _durations(rows)
    top.hist(np.asarray(list(durations.values())) / 60, bins=30, color="tab:blue")
    top.set(xlabel="length of a video, minutes", ylabel="videos", title=f"N = {len(durations)}")
    for axis, (name, words) in zip(bottom, word_counts(rows).items(), strict=True):
        axis.hist(words, bins=20, color="tab:orange")
        axis.set(xlabel=f"words of a {name}", ylabel="questions" if name == "context" else "")
    figure.savefig(path)


def _durations(rows: Sequence[Row]) -> dict[str, float]:
    return {video: float(row["duration_s"]) for row in rows for video in videos_of(row)}


def _place(row: Row) -> str:
    return "ABCDEF"[row["options"].index(row["answer"])]


def _words(text: str) -> int:
    return len(text.split())


def _line(name: str, told: dict[str, float]) -> str:
    return f"| {name} | {told['count']} | {told['percent']:.1f} | {told['paper_percent']:.1f} |"
