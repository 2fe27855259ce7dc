"""Put trained checkpoints where the package ships them, with a card made from their metrics.

Example: `python -m internvideo3.training.scale.publish --work runs/scale_training`.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import transformers
from safetensors import safe_open

from internvideo3.model.scale.build import SCALE_FOLDER
from internvideo3.tasks.world.difficulty import digest

NAMES = ("base", "m2la", "control")
LANGUAGE_STAGES = ("early", *NAMES)
STAGES = ("vision", *LANGUAGE_STAGES)
LIMIT_BYTES = 20 * 2**20
LEGEND_ROWS = 9


def publish(work: Path, target: Path = SCALE_FOLDER) -> None:
    """Copy the checkpoints of a training folder and write the card.

    Args:
        work: Folder with `vision`, `early`, `base`, `m2la`, `control` (stages of `recipe.sh`).
        target: The folder that the package ships.

    Raises:
        FileNotFoundError: If a stage is missing; nothing is copied.
        ValueError: If the weights are larger than the repository allows.
    """
    missing = [name for name in NAMES if not (work / name / "checkpoint").is_dir()]
    if missing:
        raise FileNotFoundError(f"{work} lacks the checkpoints of {', '.join(missing)}")
    weights = [work / name / "checkpoint" / "model.safetensors" for name in NAMES]
    size = sum(path.stat().st_size for path in weights)
    if size > LIMIT_BYTES:
        raise ValueError(f"weights take {size} bytes together; at most {LIMIT_BYTES} are shipped")
    for name in NAMES:
        shutil.copytree(work / name / "checkpoint", target / name, dirs_exist_ok=True)
    plot_curves(work, target / "curves.svg")
    (target / "MODEL_CARD.md").write_text(card(work))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; of a step that was run twice (after a kill), the later one."""
    by_key: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        by_key[row["step"], "seconds" in row] = row
    return [by_key[key] for key in sorted(by_key)]


def plot_curves(work: Path, path: Path) -> None:
    """Vision scores, answer loss of every stage, base validation by family."""
    figure, (vision, loss, families) = plt.subplots(1, 3, figsize=(13, 4))
    rows = rows_of(work / "vision" / "vision_metrics.jsonl")
    for name in ("objects", "shape", "place", "flash", "token_shape", "token_motion"):
        vision.plot([r["step"] for r in rows], [r[name] for r in rows], label=name)
    vision.set(title="Stage 1: reading one second", xlabel="step", ylabel="accuracy")
    lasted = _rows(work, "early", "answer")[-1]["step"]
    for name in LANGUAGE_STAGES:
        rows = _rows(work, name, "answer")
        before = lasted if name == "base" else 0
        steps = [before + r["step"] for r in rows]
        loss.plot(steps, [r["answer"] for r in rows], label=name, alpha=0.8)
    loss.set(title="Answer loss (base after early)", xlabel="step", ylabel="nats (weighted)")
    rows = _rows(work, "early", "needle")
    rows += [{**r, "step": lasted + r["step"]} for r in _rows(work, "base", "needle")]
    names = sorted(
        {name for r in rows for name in r}
        - {"step"}
        - {n for r in rows for n in r if n.endswith(" s")}
    )
    for name in names:
        families.plot([r["step"] for r in rows], [r.get(name) for r in rows], label=name)
    families.set(title="Stage 2: exact answers, validation", xlabel="step", ylabel="share")
    for axis in (vision, loss):
        axis.legend(fontsize=7)
    families.legend(fontsize=6, ncols=2)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _rows(work: Path, stage: str, key: str) -> list[dict[str, Any]]:
    """Rows of a stage's metrics that hold a key."""
    return [r for r in rows_of(work / stage / "metrics.jsonl") if key in r]


def card(work: Path) -> str:
    """The model card: what it is, how it was made, what it scored while training."""
    lines = [
        "# The scale model",
        "",
        "Qwen3-VL's architecture at a size a laptop trains, for the scale world only. Three "
        "checkpoints: `base` (GQA), `m2la` (converted to a latent cache of half the bytes, then "
        "recovered) and `control` (`base` with exactly the extra training that `m2la` got). It "
        "answers with the option's text. Numbers about it are scale numbers: they say nothing "
        "about an 8B model.",
        "",
        f"World digest at publication: `{digest()}`. Parameters: "
        + ", ".join(f"{name} {_parameters(work, name):,}" for name in NAMES)
        + ".",
        "",
        "![Training curves](curves.svg)",
        "",
        "| stage | steps | options | wall time of the last process |",
        "|---|---|---|---|",
    ]
    for name in LANGUAGE_STAGES:
        rows = _rows(work, name, "seconds")
        options = json.loads((work / name / "options.json").read_text())
        shown = ", ".join(
            f"{key} {_stage(value) if '/' in str(value) else value}"
            for key, value in options.items()
            if key not in ("out", "steps") and value is not None
        )
        lines.append(f"| {name} | {options['steps']} | {shown} | {rows[-1]['seconds']:.0f} s |")
    vision = rows_of(work / "vision" / "vision_metrics.jsonl")[-1]
    lines += [
        "",
        f"Vision stage: {vision['step']} steps in {vision['seconds']:.0f} s; last batch: objects "
        f"{vision['objects']:.2f}, shape {vision['shape']:.2f}, place {vision['place']:.2f}, flash "
        f"{vision['flash']:.2f}, geometry error {vision['geometry_error']:.3f} picture widths; "
        f"single tokens tell shape {vision['token_shape']:.2f} and motion "
        f"{vision['token_motion']:.2f}.",
        "",
        f"Machine: {platform.machine()}, two shared cores, no GPU; torch {torch.__version__}, "
        f"transformers {transformers.__version__}. One run, seeds as above. Validation, exact "
        "answers:",
        "",
        "| family | " + " | ".join(NAMES) + " |",
        "|---|" + "---|" * len(NAMES),
    ]
    final = {name: _rows(work, name, "needle")[-1] for name in NAMES}
    for key in sorted(set(final["base"]) - {"step"}):
        cells = (f"{row[key]:.2f}" if key in row else "" for row in final.values())
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The mixture was changed once during `early`, and `late` asks what `early` left unlearnt, "
        "both after looking at validation seeds; `curriculum.py` says where and why. `early` was "
        "stopped and resumed at its change, so a fresh run of the recipe repeats the same batches, "
        "not the same last bits. Test seeds were never used for a choice.",
        "",
    ]
    return "\n".join(lines)


def _stage(path: str) -> str:
    """The training stage that a recorded path belongs to."""
    return next(part for part in reversed(Path(path).parts) if part in (*STAGES, "converted"))


def _parameters(work: Path, name: str) -> int:
    with safe_open(work / name / "checkpoint" / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118


def main(arguments: list[str] | None = None) -> None:
    """Parse and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="training folder of recipe.sh")
    publish(parser.parse_args(arguments).work)


if __name__ == "__main__":
    main()
