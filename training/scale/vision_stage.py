"""Stage 1: teach the vision tower what is in a second of video, before any language.

    python -m internvideo3.training.scale.vision_stage --out DIR --seconds-of-video 150000

Dense heads read objects, shapes, positions, place and flash from each second's four tokens. They
go on beside the language model in stage 2 and are thrown away after it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from internvideo3.model.scale.build import random_model
from internvideo3.tasks.world.scenes import draw_video
from internvideo3.training.scale.batches import PROFILE_SHARES, seed_stream
from internvideo3.training.scale.curriculum import learning_rate_factor
from internvideo3.training.scale.pixels import training_patches
from internvideo3.training.scale.precision import native_bfloat16, products
from internvideo3.training.scale.scene_heads import SceneHeads, Truth, join_truth, scene_truth
from internvideo3.training.scale.start import scale_weights
from internvideo3.training.scale.vision import FrameEncoder

log = logging.getLogger("internvideo3.train")
LENGTHS_S = (2, 2, 4, 8)
BATCH_SECONDS = 128


class Seconds(IterableDataset[tuple[Tensor, Truth]]):
    """Batches of about `BATCH_SECONDS` seconds of short videos, each from its own seeds."""

    def __init__(self, seed: int, steps: int) -> None:
        self.seed = seed
        self.steps = steps

    def __iter__(self) -> Iterator[tuple[Tensor, Truth]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for step in range(worker, self.steps, workers):
            yield draw_seconds(self.seed * 10**8 + step * BATCH_SECONDS)


def draw_seconds(first_seed: int) -> tuple[Tensor, Truth]:
    """Patches `[P,16,D]` and truth of about `BATCH_SECONDS` seconds of short videos."""
    patches, truths, total = [], [], 0
    noise = np.random.default_rng(first_seed)
    for seed in seed_stream("train", first_seed, BATCH_SECONDS):
        rng = random.Random(f"vision/{seed}")
        kind = rng.choices(list(PROFILE_SHARES), list(PROFILE_SHARES.values()))[0]
        spec = draw_video(seed, rng.choice(LENGTHS_S), kind)
        patches.append(training_patches(spec, noise))
        truths.append(scene_truth(spec))
        total += int(spec.length_s)
        if total >= BATCH_SECONDS:
            break
    return torch.cat(patches), join_truth(truths)


def train(out: Path, seconds_of_video: int, learning_rate: float, seed: int) -> None:
    """Train the tower from random weights and write `vision.safetensors` and its metrics."""
    out.mkdir(parents=True, exist_ok=True)
    model: Any = random_model(seed)
    visual: Any = model.model.visual
    scale_weights(model, draw_seconds(seed * 10**8)[0])
    heads = SceneHeads(model.config.text_config.hidden_size)
    encoder = FrameEncoder(visual)
    embed = list(visual.patch_embed.parameters())
    rest = [
        p for p in [*visual.parameters(), *heads.parameters()] if all(p is not e for e in embed)
    ]
    groups = [{"params": embed, "rate": 0.2}, {"params": rest, "rate": 1.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.02)
    steps = seconds_of_video // BATCH_SECONDS
    loader = DataLoader(Seconds(seed, steps), batch_size=None, num_workers=1, prefetch_factor=8)
    started = time.monotonic()
    with (out / "vision_metrics.jsonl").open("w") as metrics:
        for step, (patches_PKV, truth) in enumerate(loader):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * learning_rate * learning_rate_factor(step, steps, 50)
            with products(native_bfloat16()):
                vision_PMW, deep = encoder(patches_PKV)
            # The DeepStack branch reaches the language model too: train it by the same heads.
            loss = heads.loss(vision_PMW.float() + sum(level.float() for level in deep), truth)
            loss.backward()
            nn.utils.clip_grad_norm_([*visual.parameters(), *heads.parameters()], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % 25 == 0 or step + 1 == steps:
                scores = heads.scores(
                    vision_PMW.float() + sum(level.float() for level in deep), truth
                )
                row = {"step": step + 1, "loss": float(loss.detach()), **scores}
                row["seconds"] = time.monotonic() - started
                metrics.write(json.dumps(row) + "\n")
                metrics.flush()
                log.info("%s", {k: round(v, 3) for k, v in row.items()})
    state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    state |= {f"heads.{name}": value for name, value in heads.state_dict().items()}
    save_file(state, str(out / "vision.safetensors"))


def main(arguments: list[str] | None = None) -> None:
    """Parse and train."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and metrics")
    parser.add_argument("--seconds-of-video", type=int, default=150_000)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of the training process")
    named = vars(parser.parse_args(arguments))
    torch.set_num_threads(named.pop("threads"))
    train(**named)


if __name__ == "__main__":
    main()
