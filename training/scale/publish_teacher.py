"""Put the deeper teacher where the package ships it, with a card of its own.

Example: `python -m internvideo3.training.scale.publish_teacher --run runs/scale_training/teacher`.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import transformers

from internvideo3.model.checkpoint import load_model, weights_digest
from internvideo3.model.scale.build import SCALE_FOLDER
from internvideo3.tasks.world.difficulty import digest
from internvideo3.training.scale.language_stage import Options, Trainer
from internvideo3.training.scale.publish import rows_of

CARD, CURVE, NAME = "TEACHER_CARD.md", "teacher_curve.svg", "teacher"
LENGTHS_S, VIDEOS = (4, 8, 16, 32, 64), 96
"""Validation videos of each length that the card's table is about."""
SMOOTHED = 10
"""Rows of the metrics, 50 steps apart, that a point of the curve is the mean of."""


def publish_teacher(run: Path, target: Path = SCALE_FOLDER) -> None:
    """Write the checkpoint in bfloat16, as the other scale models are shipped, and its card.

    Args:
        run: Folder of the language stage that trained it.
        target: The folder that the package ships.

    Raises:
        FileNotFoundError: If it is not trained to its end; nothing is written.
    """
    options = json.loads((run / "options.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    checkpoint = run / "checkpoint"
    if not checkpoint.is_dir() or max(row["step"] for row in rows) < options["steps"]:
        raise FileNotFoundError(
            f"{run} is not trained to its {options['steps']} steps; repeat the language stage"
        )
    model, processor = load_model(checkpoint, "cpu")
    model.to(torch.bfloat16).save_pretrained(target / NAME)
    processor.save_pretrained(target / NAME)
    _plot(rows_of(run / "metrics.jsonl"), target / CURVE)
    scores = {name: _validated(target / name) for name in (NAME, "control")}
    sizes = {name: _parameters(target / name) for name in (NAME, "control")}
    told = card(options, rows, scores, sizes)
    told = told.replace("WEIGHTS", weights_digest(target / NAME)[:16])
    (target / CARD).write_text(told, encoding="utf-8")


def _validated(checkpoint: Path) -> dict[str, float]:
    """Share of answers with every token right, by family and length (validation seeds)."""
    options = Options(
        out=checkpoint, steps=1, vision=None, init=checkpoint, teacher=None, learning_rate=0.0,
        batch_tokens=3000, warmup=1, weight_decay=0.0, seed=0, curriculum="final",
    )  # fmt: skip
    return Trainer(options, fuse=False).validate(LENGTHS_S, VIDEOS)


def _parameters(checkpoint: Path) -> int:
    model, _ = load_model(checkpoint, "cpu")
    return sum(one.numel() for one in model.parameters())


def card(
    options: dict[str, Any],
    rows: list[dict[str, Any]],
    scores: dict[str, dict[str, float]],
    sizes: dict[str, int],
) -> str:
    """What the model is, how it was made, and what it knows beside the model it grew from."""
    table = [
        f"| {name} | {scores['control'][name]:.2f} | {ours:.2f} |"
        for name, ours in sorted(scores[NAME].items())
    ]
    return "\n".join(
        [
            "# The scale teacher",
            "",
            f"`scale:teacher` is `scale:control` with twice the decoder layers ({sizes[NAME]:,} "
            f"parameters, control {sizes['control']:,}): each layer is followed by a copy that at "
            "first adds nothing, and all of it was trained on, the vision tower frozen. Numbers "
            "about it are scale numbers: they say nothing about an 8B model. It has trained longer "
            "than the control and on more of what that did not know; what depth alone is worth was "
            "not measured.",
            "",
            f"Weights digest `WEIGHTS`, in bfloat16. World digest at publication: `{digest()}`.",
            "",
            f"![Training loss]({CURVE})",
            "",
            *_making(options, _seconds(rows)),
            "",
            f"Validation, exact answers, {VIDEOS} videos of each length:",
            "",
            "| family | control | teacher |",
            "|---|---|---|",
            *table,
            "",
            "The curriculum was chosen by the validation table of `scale:control`; test seeds were "
            "never used for a choice. Both models through `internvideo3 eval`, with intervals: "
            "`reports/results/training/teacher.json`.",
            "",
        ]
    )


def _making(options: dict[str, Any], seconds: float) -> list[str]:
    """How it was made: options, time, machine, commands."""
    return [
        "| | |",
        "|---|---|",
        f"| steps | {options['steps']:,} of {options['batch_tokens']:,} tokens, curriculum "
        f"`{options['curriculum']}`, seed {options['seed']} |",
        f"| learning rate | {options['learning_rate']:g}, warm-up {options['warmup']} steps, "
        f"weight decay {options['weight_decay']:g}; matrix products in "
        f"{'bfloat16' if options['bfloat16'] else 'float32'} |",
        f"| time | {seconds / 60:.0f} minutes on one thread, one more process that draws batches |",
        f"| machine | {platform.machine()}, two shared cores, no GPU; torch {torch.__version__}, "
        f"transformers {transformers.__version__} |",
        "",
        "```sh",
        "python -m internvideo3.training.scale.grow --source scale:control --out "
        f"{options['init']}",
        "python -m internvideo3.training.scale.language_stage " + _arguments(options),
        f"python -m internvideo3.training.scale.publish_teacher --run {options['out']}",
        "```",
    ]


def _arguments(options: dict[str, Any]) -> str:
    """The recorded options as they are given on the command line."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words.append(f"{flag} {value}")
    return " ".join(words)


def _seconds(rows: list[dict[str, Any]]) -> float:
    """Time of all processes that trained it; each counts from its own start."""
    told = [float(row["seconds"]) for row in rows if "seconds" in row]
    ends = [a for a, b in zip(told, told[1:], strict=False) if b < a]
    return sum(ends) + (told[-1] if told else 0.0)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    told = [(row["step"], row["answer"]) for row in rows if "answer" in row]
    steps, losses = [step for step, _ in told], [loss for _, loss in told]
    smooth = [fmean(losses[max(0, n - SMOOTHED) : n]) for n in range(1, len(losses) + 1)]
    figure, axis = plt.subplots(figsize=(6, 3.5))
    axis.plot(steps, losses, lw=0.5, alpha=0.35)
    axis.plot(steps, smooth, lw=1.4)
    axis.set(title="Teacher: loss of the answers", xlabel="step", ylabel="loss")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Parse and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the language stage")
    publish_teacher(parser.parse_args(arguments).run)


if __name__ == "__main__":
    main()
