"""Put the model that was trained to act where the package ships it, with a card of its own.

Example: `python -m internvideo3.training.scale.publish_agent --run runs/agent/trained
--rollouts runs/agent/rollouts.jsonl`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from internvideo3.model.checkpoint import load_model, weights_digest
from internvideo3.model.scale.build import SCALE_FOLDER
from internvideo3.training.curation.records import read_rows

STAGE = "1-rollouts"
CARD, CURVE = "AGENT_CARD.md", "agent_curve.svg"
LAST_STEPS = 20
"""Steps whose mean loss the card names."""


def publish_agent(run: Path, rollouts: Path, target: Path = SCALE_FOLDER) -> None:
    """Write the checkpoint in bfloat16, as the other scale models are shipped, and its card.

    Args:
        run: Folder of `internvideo3 train scale_agent`.
        rollouts: What it was trained on.
        target: The folder that the package ships.

    Raises:
        FileNotFoundError: If the stage is not done; nothing is written.
    """
    stage = run / STAGE
    checkpoint = stage / "checkpoint"
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{checkpoint} is missing; let `internvideo3 train` finish first")
    steps = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    model, processor = load_model(checkpoint, "cpu")
    model.to(torch.bfloat16).save_pretrained(target / "agent")
    processor.save_pretrained(target / "agent")
    _plot(steps, target / CURVE)
    described = json.loads((stage / "stage.json").read_text())
    digest = hashlib.sha256(rollouts.read_bytes()).hexdigest()
    text = card(described, steps, read_rows(rollouts), digest)
    text = text.replace("WEIGHTS", weights_digest(target / "agent")[:16])
    (target / CARD).write_text(text, encoding="utf-8")


def card(
    stage: dict[str, Any], steps: list[dict[str, Any]], rows: list[dict[str, Any]], digest: str
) -> str:
    """What the model is, what it learnt from, and how the loss ended."""
    options = stage["options"]
    kinds = Counter(str(row["id"]).rpartition("/")[2] for row in rows)
    calls = [len(row["replies"]) - 1 for row in rows if str(row["id"]).endswith("/rollout")]
    minutes = sum(step["seconds"] for step in steps) / 60
    optimiser = options["optimiser"]
    return "\n".join(
        [
            "# The scale model that acts",
            "",
            f"`scale:agent` is `{stage['start']}` trained on rollouts: it calls `pick_clips` to "
            "look at short parts of a long video, and answers in plain words when it has seen "
            "enough. It acts with `--policy trained`. It has forgotten how to answer at once: take "
            f"`{stage['start']}` for that. Numbers about it are scale numbers: they say nothing "
            "about an 8B model.",
            "",
            "Weights digest `WEIGHTS`, in bfloat16.",
            "",
            f"![Training loss]({CURVE})",
            "",
            "| | |",
            "|---|---|",
            f"| recipe | `training/recipes/scale_agent.yaml`, seed {stage['seed']} |",
            f"| rollouts | {kinds['rollout']:,} of a teacher of rules, {fmean(calls):.1f} calls "
            f"each, and {kinds['alone']:,} answers from their closer looks alone; training split "
            "of `world_brief` |",
            f"| file | SHA-256 `{digest[:16]}` (`internvideo3 data rollouts`) |",
            f"| steps | {options['steps']:,} of {options['documents']} documents, "
            f"{fmean(step['tokens'] for step in steps):,.0f} tokens each |",
            f"| learning rate | {optimiser['learning_rate']:g} to "
            f"{optimiser['final_learning_rate']:g} |",
            f"| loss, last {LAST_STEPS} steps | "
            f"{fmean(step['loss'] for step in steps[-LAST_STEPS:]):.4f} |",
            f"| time | {minutes:.0f} minutes on one thread of a shared CPU, no GPU |",
            "",
            "Scores are in `reports/results/agent/README.md`.",
            "",
        ]
    )


def _plot(steps: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.5))
    axis.semilogy([step["step"] for step in steps], [step["loss"] for step in steps], lw=0.8)
    axis.set(title="Rollouts: loss of the policy's words", xlabel="step", ylabel="loss")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Parse and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of `train scale_agent`")
    parser.add_argument("--rollouts", type=Path, required=True, help="what it was trained on")
    given = parser.parse_args(arguments)
    publish_agent(given.run, given.rollouts)


if __name__ == "__main__":
    main()
