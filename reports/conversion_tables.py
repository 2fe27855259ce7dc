"""The tables of `model/conversion/README.md`, written from the files under `results/conversion/`.

A table stands between two comment lines, `<!-- NAME -->` and `<!-- end NAME -->`; a test holds the
page to what this writes.

    python -m internvideo3.reports.conversion_tables model/conversion/README.md
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from internvideo3.reports.markdown import table

RESULTS = Path(__file__).parent / "results" / "conversion"
Report = Mapping[str, Any]


def written(page: str, results: Path = RESULTS) -> str:
    """The page with every table as the files say.

    Args:
        page: Markdown with pairs of comment lines.
        results: folder of the files.

    Raises:
        KeyError: a comment names no table.
    """

    def fill(match: re.Match[str]) -> str:
        file, draw = TABLES[match["name"]]
        report = json.loads((results / file).read_text(encoding="utf-8"))
        return f"<!-- {match['name']} -->\n{draw(report)}\n<!-- end {match['name']} -->"

    return re.sub(
        r"<!-- (?P<name>[a-z0-9 ]+) -->\n.*?<!-- end (?P=name) -->", fill, page, flags=re.DOTALL
    )


def _smollm2(report: Report) -> str:
    names = list(dict.fromkeys(name for rows in report["seeds"].values() for name in rows))
    head = ["row", "perplexity ratio, by seed", "KL, nats", "same first choice"]
    return table(head, (_of_seeds(name, report["seeds"]) for name in names))


def _of_seeds(name: str, seeds: Report) -> list[str]:
    rows = [by_name[name] for by_name in seeds.values() if name in by_name]
    return [
        name,
        " / ".join(f"{row['perplexity_ratio']:.3f}" for row in rows),
        " / ".join(f"{row['kl']:.3f}" for row in rows),
        " / ".join(f"{row['top1']:.1%}" for row in rows),
    ]


def _norms(report: Report) -> str:
    head = ["norm", "perplexity", "ratio", "KL, nats", "same first choice"]
    source = [f"{next(iter(report['rows'].values()))['source_perplexity']:.2f}", "1", "0", "100 %"]
    rows = [
        [
            name,
            f"{row['perplexity']:,.2f}",
            f"{row['perplexity_ratio']:,.4g}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.1%}",
        ]
        for name, row in report["rows"].items()
    ]
    return table(head, [["the source", *source], *rows])


def _concentration(report: Report) -> str:
    """CV and R² over layers: smallest, median, largest of the heads' means."""
    names = {
        "key_cv": "CV of key rms",
        "query_cv": "CV of query rms",
        "key_r2_constant": "R² of equation 7, keys",
        "key_r2": "R² of the learned map, keys",
        "query_r2_constant": "R² of equation 7, queries",
        "query_r2": "R² of the learned map, queries",
    }
    rows = []
    for name, title in names.items():
        layers = [sum(layer[name]) / len(layer[name]) for layer in report["layers"]]
        rows.append([title, *(f"{pick(layers):.3f}" for pick in (min, median, max))])
    return table(["over layers", "least", "median", "most"], rows)


def _memory(report: Report) -> str:
    """Measured (and planned) by case, planned for 8B."""
    cases: Mapping[str, Report] = report["cases"]
    plans = [report["qwen3_vl_8b"], report["qwen3_vl_8b_official"]]
    steps = plans[1]["planned_above_weights"]
    rows = [
        [
            step,
            *(_both(case, step) for case in cases.values()),
            *(_above(plan["planned_above_weights"], step) for plan in plans),
        ]
        for step in steps
    ]
    weights = [_mib(part["weights"]) for part in (*cases.values(), *plans)]
    libraries = [_mib(case["libraries"]) for case in cases.values()]
    names = [Path(name).name for name in cases]
    head = ["MiB above the weights", *names, "8B, half, planned", "8B, official, planned"]
    last = [["weights themselves", *weights], ["libraries", *libraries, "", ""]]
    return table(head, [*rows, *last])


def _both(case: Report, step: str) -> str:
    if step not in case["planned_above_weights"]:
        return "–"
    measured, planned = (
        _mib(case[f"{kind}_above_weights"][step]) for kind in ("measured", "planned")
    )
    return f"{measured} (plan {planned})"


def _above(planned: Report, step: str) -> str:
    return _mib(planned[step]) if step in planned else "–"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}".replace("-", "−")


def _ablation(part: str) -> Callable[[Report], str]:
    """One part of the rows on the scale model; the reference row first."""

    def draw(report: Report) -> str:
        chosen = {
            name: row
            for name, row in report["rows"].items()
            if name == "best" or row["part"] == part
        }
        head = [
            "changed", "slots", "ranks", "mean of suites, points", "most in a suite",
            "more counting, points", "KL on answers",
        ]  # fmt: skip
        return table(head, (_ablation_row(row) for row in chosen.values()))

    return draw


def _ablation_row(row: Report) -> Sequence[str]:
    worst = min(row["suites"].items(), key=lambda item: item[1]["difference"]["mean"])
    counting = row.get("counting")
    return [
        row["what"],
        str(row["rotary_slots"]),
        _ranks(row),
        _points(row["mean_difference"]),
        f"{_signed(worst[1]['difference']['mean'])} {worst[0].removeprefix('world_')}",
        _points(counting["difference"]) if counting else "–",
        f"{row['answers']['kl']:.4f}",
    ]


def _ranks(row: Report) -> str:
    """Ranks by layer, those of vision tokens behind a stroke if they are others."""
    both = dict.fromkeys((tuple(row["ranks"]), tuple(row["vision_ranks"])))
    return " / ".join(
        str(ranks[0]) if len(set(ranks)) == 1 else " ".join(map(str, ranks)) for ranks in both
    )


def _points(found: Report) -> str:
    ends = ", ".join(_signed(found[name]) for name in ("low", "high"))
    return f"{_signed(found['mean'])} [{ends}]"


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


TABLES: dict[str, tuple[str, Callable[[Report], str]]] = {
    "smollm2": ("smollm2.json", _smollm2),
    "norms": ("gemma3_norms.json", _norms),
    "concentration": ("gemma3_norms.json", _concentration),
    "memory": ("memory.json", _memory),
    "ablation of parts": ("scale_ablation.json", _ablation("parts")),
    "ablation of choices": ("scale_ablation.json", _ablation("choices")),
    "ablation of shapes": ("scale_ablation.json", _ablation("shapes")),
}
"""File and form of each table, by the name in its comment lines."""


def main(arguments: Iterable[str] | None = None) -> None:
    """Writes the tables of a page anew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page", type=Path, help="Markdown file")
    given = parser.parse_args(None if arguments is None else list(arguments))
    given.page.write_text(written(given.page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
