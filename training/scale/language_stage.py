"""Stage 2: teach the language model to answer; also the equal extra training of stage 3.

    python -m internvideo3.training.scale.language_stage --vision VISION.safetensors --out DIR …
    python -m internvideo3.training.scale.language_stage --init CKPT --out DIR …
    python -m internvideo3.training.scale.language_stage --init CKPT --teacher CKPT --out DIR …

From random weights the vision tower goes on learning (at a lower rate, with its dense heads); with
`--init` it goes on from a checkpoint (GQA or latent) with the tower frozen. Every batch depends on
the seed and its step only; a killed run resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoModelForImageTextToText

import internvideo3.model.modeling  # noqa: F401  (registers the latent classes with Auto)
from internvideo3.model.scale.build import load_processor, random_model
from internvideo3.training.scale.batches import (
    FAMILY_NAMES,
    Batch,
    Difficulty,
    RowWriter,
    make_batch,
    rows_for,
    seed_stream,
)
from internvideo3.training.scale.curriculum import CURRICULA, difficulty_at, learning_rate_factor
from internvideo3.training.scale.objective import (
    PackedModel,
    answer_loss,
    distillation_loss,
    right_answers,
)
from internvideo3.training.scale.precision import native_bfloat16, products
from internvideo3.training.scale.scene_heads import SceneHeads
from internvideo3.training.scale.start import scale_weights
from internvideo3.training.scale.vision_stage import draw_seconds

log = logging.getLogger("internvideo3.train")
VISION_RATE = 0.5
"""Learning rate of the vision tower and its heads relative to the language model's."""
SCENE_WEIGHT = 0.3
"""Weight of the dense heads' loss beside the answers'."""
SAVE_EVERY_S = 120.0
VALIDATE_EVERY = 400


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that decides the weights, apart from the machine's rounding."""

    out: Path
    steps: int
    vision: Path | None
    """Weights of stage 1; needed where `init` is None."""
    init: Path | None
    """Checkpoint folder to go on from."""
    teacher: Path | None
    """Checkpoint folder whose answers are distilled beside the labels."""
    learning_rate: float
    batch_tokens: int
    warmup: int
    weight_decay: float
    seed: int
    curriculum: str
    """Name in `CURRICULA`."""
    bfloat16: bool = False
    """Whether matrix products run in bf16; the weights are float32 either way."""


def start_model(options: Options) -> Any:
    """The model a run starts from, float32; from a checkpoint, with a frozen vision tower.

    Raises:
        ValueError: If neither `init` nor `vision` is given.
    """
    if options.init is not None:
        model: Any = AutoModelForImageTextToText.from_pretrained(options.init, dtype=torch.float32)
        model.model.visual.requires_grad_(False)
    elif options.vision is not None:
        model = random_model(options.seed)
        scale_weights(model, draw_seconds(0)[0])
        model.model.visual.load_state_dict(_part(options.vision, "visual."))
    else:
        raise ValueError("give --vision (weights of stage 1) or --init (a checkpoint folder)")
    return model


def _part(path: Path, prefix: str) -> dict[str, Tensor]:
    state = load_file(path)
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def start_heads(options: Options, width: int) -> SceneHeads | None:
    """The dense heads of stage 1 while the vision tower learns, None where it is frozen."""
    if options.vision is None or options.init is not None:
        return None
    heads = SceneHeads(width)
    heads.load_state_dict(_part(options.vision, "heads."))
    return heads


class StepStream(IterableDataset[Batch]):
    """Batches of the remaining steps; worker w of n makes every n-th, so the order is fixed."""

    def __init__(self, options: Options, first_step: int) -> None:
        self.options = options
        self.first_step = first_step

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        options = self.options
        writer = RowWriter(load_processor().tokenizer)
        for step in range(self.first_step + worker, options.steps, workers):
            difficulty = difficulty_at(options.curriculum, step / options.steps)
            rng = random.Random(f"batch/{options.seed}/{step}")
            length = rng.choices(list(difficulty.lengths), list(difficulty.lengths.values()))[0]
            rows = rows_for(length, options.batch_tokens)
            seeds = seed_stream("train", (options.seed * 10**6 + step) * 1024, rows)
            yield make_batch(writer, seeds, length, difficulty)


class Trainer:
    """Holds the model, its optimiser and the step count of one run."""

    def __init__(self, options: Options, *, fuse: bool = True) -> None:
        """Start from the options' weights; `fuse` compiles what runs at every step."""
        self.options = options
        torch.manual_seed(options.seed)
        self.processor = load_processor()
        self.model = start_model(options)
        self.answer = PackedModel(self.model, fuse=fuse)
        self.teach = None
        if options.teacher is not None:
            teacher = AutoModelForImageTextToText.from_pretrained(
                options.teacher, dtype=torch.float32
            )
            self.teach = PackedModel(teacher.requires_grad_(False))
        self.heads = start_heads(options, self.model.config.text_config.hidden_size)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.95))
        self.step = 0

    def _groups(self) -> list[dict[str, Any]]:
        seeing: list[Tensor] = list(self.model.model.visual.parameters())
        seeing += [] if self.heads is None else list(self.heads.parameters())
        vision = {id(p) for p in seeing}
        reading = [p for p in self.model.parameters() if id(p) not in vision]
        decay = self.options.weight_decay
        groups = [
            {"params": [p for p in part if p.requires_grad and (p.ndim > 1) == wide],
             "rate": rate, "weight_decay": decay if wide else 0.0}
            for part, rate in ((reading, 1.0), (seeing, VISION_RATE))
            for wide in (True, False)
        ]  # fmt: skip
        return [group for group in groups if group["params"]]

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns the losses and the gradient norm."""
        options = self.options
        factor = learning_rate_factor(self.step, options.steps, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * factor * group["rate"]
        with products(options.bfloat16):
            answers = self.answer(batch)
            losses = {"answer": answer_loss(answers)}
            if self.heads is not None and answers.vision_FMW.requires_grad:
                scene = self.heads.loss(answers.vision_FMW, batch.truth)
                losses["scene"] = SCENE_WEIGHT * scene
            if self.teach is not None:
                with torch.no_grad():
                    taught = self.teach(batch)
                losses["distil"] = distillation_loss(answers, taught)
        torch.stack(list(losses.values())).sum().backward()
        learned = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(learned, 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at step {self.step}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        shown = {name: float(value.detach()) for name, value in losses.items()}
        return shown | {"norm": float(norm)}

    @torch.no_grad()
    def validate(self, lengths: tuple[int, ...], videos: int) -> dict[str, float]:
        """Share of answers with every token right, by family and length (validation seeds)."""
        writer = RowWriter(self.processor.tokenizer)
        hard = Difficulty(lengths={}, easy_share=0.0)
        found: dict[str, list[float]] = {}
        for length in lengths:
            for start in range(0, videos, rows_for(length, 4000)):
                count = min(rows_for(length, 4000), videos - start)
                seeds = seed_stream("validation", start, count)
                batch = make_batch(writer, seeds, length, hard)
                with products(self.options.bfloat16):
                    answers = self.answer(batch)
                for family, right in right_answers(answers, batch):
                    found.setdefault(FAMILY_NAMES[family], []).append(right)
                    found.setdefault(f"{length} s", []).append(right)
        return {name: sum(rights) / len(rights) for name, rights in sorted(found.items())}

    def save(self) -> None:
        """Write the state; a half-written one never replaces a whole one."""
        folder = self.options.out / "state"
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / "model.part"))
        state = {"optimizer": self.optimizer.state_dict(), "step": self.step}
        if self.heads is not None:
            state["heads"] = self.heads.state_dict()
        torch.save(state, folder / "optimizer.part")
        for name in ("model", "optimizer"):
            (folder / f"{name}.part").replace(folder / name)

    def resume(self) -> bool:
        """Load the state in `out`, if there is one."""
        folder = self.options.out / "state"
        if not (folder / "optimizer").is_file():
            return False
        load_model(self.model, str(folder / "model"))
        state = torch.load(folder / "optimizer", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if self.heads is not None:
            self.heads.load_state_dict(state["heads"])
        return True

    def export(self) -> Path:
        """Write the model as a transformers checkpoint in bf16, with its processor."""
        folder = self.options.out / "checkpoint"
        self.model.to(torch.bfloat16).save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return folder


def run(
    options: Options,
    *,
    threads: int = 1,
    workers: int = 1,
    stop_after_s: float | None = None,
    stop_at: int | None = None,
) -> bool:
    """Train to the last step or a limit of time or steps; True when the last step is done."""
    torch.set_num_threads(threads)
    trainer = Trainer(options)
    log.info("%s, step %d", "resumed" if trainer.resume() else "start", trainer.step)
    stream = StepStream(options, trainer.step)
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None
    )
    started = saved = time.monotonic()
    with (options.out / "metrics.jsonl").open("a") as metrics:
        since, window = started, trainer.step
        for batch in loader:
            losses = trainer.train_step(batch)
            now = time.monotonic()
            if trainer.step % 50 == 0:
                row = {"step": trainer.step, **losses, "seconds": now - started}
                row["steps_per_s"] = (trainer.step - window) / (now - since)
                _note(metrics, row)
                since, window = now, trainer.step
            if trainer.step % VALIDATE_EVERY == 0:
                _note(metrics, {"step": trainer.step, **trainer.validate((4, 8, 16), 12)})
            if now - saved > SAVE_EVERY_S:
                trainer.save()
                saved = now
            late = stop_after_s is not None and now - started > stop_after_s
            if late or trainer.step == stop_at:
                break
        trainer.save()
        finished = trainer.step >= options.steps
        _note(metrics, {"step": trainer.step, **trainer.validate((4, 8, 16, 32, 64), 24)})
    trainer.export()
    return finished


def _note(metrics: TextIO, row: dict[str, float]) -> None:
    metrics.write(json.dumps(row) + "\n")
    metrics.flush()
    log.info("%s", {name: round(value, 2) for name, value in row.items()})


def main(arguments: list[str] | None = None) -> None:
    """Parse, record the options, train."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for state and checkpoint")
    parser.add_argument("--steps", type=int, required=True, help="optimiser steps in all")
    parser.add_argument("--vision", type=Path, help="weights of stage 1")
    parser.add_argument("--init", type=Path, help="checkpoint folder to go on from")
    parser.add_argument("--teacher", type=Path, help="checkpoint folder to distil from")
    parser.add_argument(
        "--curriculum", choices=list(CURRICULA), default="base", help="what is asked"
    )
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--batch-tokens", type=int, default=3000)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=native_bfloat16(),
        help="matrix products in bf16; by default where the CPU has them in hardware",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the training process")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw batches")
    parser.add_argument("--stop-at", type=int, help="save and stop at this step")
    parser.add_argument("--stop-after-s", type=float, help="save and stop after so many seconds")
    named = vars(parser.parse_args(arguments))
    pace = {name: named.pop(name) for name in ("threads", "workers", "stop_after_s", "stop_at")}
    options = Options(**named)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(options), default=str, indent=1)
    (options.out / "options.json").write_text(text + "\n")
    run(options, **pace)


if __name__ == "__main__":
    main()
