"""Train the scale model: `python -m internvideo3.training.scale.train --help`.

One loop for all of its history: base training from random weights (vision heads first), and the
equal extra training of the converted model and its GQA control. Every batch depends on the seed
and its step number only, so a killed run resumes where its last checkpoint left off.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from internvideo3.model.scale.build import load_processor, random_model
from internvideo3.training.scale.batches import (
    FAMILY_NAMES,
    Batch,
    Difficulty,
    RowWriter,
    batches,
    make_batch,
    rows_for,
    seed_stream,
)
from internvideo3.training.scale.curriculum import difficulty_at, learning_rate_factor
from internvideo3.training.scale.objective import (
    Answers,
    PackedForward,
    SceneHeads,
    answer_loss,
    distillation_loss,
)

log = logging.getLogger("internvideo3.train")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that decides the weights, apart from the machine's rounding."""

    out: Path
    steps: int
    """All steps, vision heads included."""
    vision_steps: int
    """First steps: the vision tower and its dense heads only."""
    init: Path | None
    """Checkpoint folder to start from (GQA or latent); random weights where it is None."""
    teacher: Path | None
    """GQA checkpoint whose answers are distilled; none by default."""
    curriculum_from: float
    """Where in the curriculum step 0 stands; 1.0 trains on the final mixture throughout."""
    learning_rate: float
    vision_rate: float
    """Learning rate of the vision tower relative to the text model's."""
    scene_weight: float
    """Weight of the dense heads' loss after the vision steps."""
    batch_tokens: int
    compile: bool
    """Compile the decoder layers; worth its minute on a GPU only."""
    warmup: int
    weight_decay: float
    seed: int


class StepStream(IterableDataset[tuple[int, Batch]]):
    """Batches of the remaining steps; worker w of n makes every n-th, so the order is fixed."""

    def __init__(self, options: Options, first_step: int) -> None:
        self.options = options
        self.first_step = first_step

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        options = self.options
        steps = range(self.first_step + worker, options.steps, workers)
        mixture = {step: step_difficulty(options, step) for step in steps}
        tokenizer = load_processor().tokenizer
        return batches(tokenizer, steps, mixture, options.batch_tokens, options.seed)


def step_difficulty(options: Options, step: int) -> Difficulty:
    """Mixture of a step: short videos for the vision heads, then the curriculum."""
    if step < options.vision_steps:
        return Difficulty(lengths={4: 0.4, 8: 0.6}, easy_share=1.0, narration_share=0.0)
    share = (step - options.vision_steps) / max(1, options.steps - options.vision_steps)
    start = options.curriculum_from
    return difficulty_at(min(1.0, start + (1.0 - start) * share))


class Trainer:
    """Holds the model, its optimiser and the log of one run."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options = options
        self.device = device
        torch.manual_seed(options.seed)
        self.processor = load_processor()
        self.model = _start_model(options).to(device)
        self.model.train()
        if options.compile:
            for layer in self.model.model.language_model.layers:
                layer.compile()
        self.heads = SceneHeads(self.model.config.text_config.hidden_size).to(device)
        mask_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.forward = PackedForward(self.model, device, mask_dtype)
        self.teacher = _teacher(options, device, mask_dtype)
        self.optimizer = torch.optim.AdamW(
            self._groups(), betas=(0.9, 0.95), fused=device.type == "cuda"
        )
        self.noise = torch.Generator(device=device)
        self.step = 0
        self.started = time.monotonic()

    def _groups(self) -> list[dict[str, Any]]:
        options, visual = self.options, self.model.model.visual
        vision = {id(p) for p in visual.parameters()}
        heads = {id(p) for p in self.heads.parameters()}
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for p in [*self.model.parameters(), *self.heads.parameters()]:
            rate = options.vision_rate if id(p) in vision or id(p) in heads else 1.0
            decay = options.weight_decay if p.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(p)
        return [
            {"params": params, "rate": rate, "weight_decay": decay, "lr": 0.0}
            for (rate, decay), params in groups.items()
        ]

    def autocast(self) -> torch.autocast:
        """bf16 on a GPU; float32 on a CPU, where small bf16 kernels are slower."""
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        )

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step; returns detached losses."""
        options = self.options
        vision_only = self.step < options.vision_steps
        factor = self._rate(vision_only)
        for group in self.optimizer.param_groups:
            # While the heads lead, the vision tower learns at the full rate.
            relative = 1.0 if vision_only else group["rate"]
            group["lr"] = options.learning_rate * relative * factor
        self.noise.manual_seed(options.seed * 10**9 + self.step)
        losses = self._losses(batch, vision_only)
        total = torch.stack(list(losses.values())).sum()
        total.backward()  # type: ignore[no-untyped-call]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {name: value.detach() for name, value in losses.items()} | {"norm": norm}

    def _rate(self, vision_only: bool) -> float:
        options = self.options
        if vision_only:
            return learning_rate_factor(self.step, 10 * options.vision_steps, 100)
        return learning_rate_factor(
            self.step - options.vision_steps, options.steps - options.vision_steps, options.warmup
        )

    def _losses(self, batch: Batch, vision_only: bool) -> dict[str, Tensor]:
        data = self.forward.to_device(batch)
        with self.autocast():
            vision_PMW, deep = self.forward.encode(data["shown"], self.noise)
            scene = self.heads(vision_PMW, data["shown"])
            if vision_only:
                return {"scene": scene}
            answers = self.forward(data, vision_PMW, deep)
            losses = {"answer": answer_loss(answers)}
            if self.options.scene_weight > 0:
                losses["scene"] = self.options.scene_weight * scene
            if self.teacher is not None:
                losses["distil"] = distillation_loss(answers, self._taught(batch))
        return losses

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Answers:
        assert self.teacher is not None
        data = self.teacher.to_device(batch)
        self.noise.manual_seed(self.options.seed * 10**9 + self.step)
        return self.teacher(data, *self.teacher.encode(data["shown"], self.noise))

    @torch.no_grad()
    def validate(self, lengths: tuple[int, ...], rows: int) -> dict[str, float]:
        """Share of answers with every token right, by family and by length (validation seeds)."""
        self.model.eval()
        writer = RowWriter(self.processor.tokenizer)
        hard = Difficulty(lengths={}, easy_share=0.0, narration_share=0.0)
        found: dict[str, list[float]] = {}
        for length in lengths:
            count = min(rows, rows_for(length, self.options.batch_tokens))
            batch = make_batch(writer, seed_stream("validation", 0, count), length, hard)
            data = self.forward.to_device(batch)
            with self.autocast():
                vision_PMW, deep = self.forward.encode(data["shown"], None)
                answers = self.forward(data, vision_PMW, deep)
            for family, right in _right_answers(answers):
                found.setdefault(FAMILY_NAMES[family], []).append(right)
                found.setdefault(f"{length} s", []).append(right)
        self.model.train()
        return {name: sum(rights) / len(rights) for name, rights in sorted(found.items())}

    def save(self) -> None:
        """Write the checkpoint; a half-written one never replaces a whole one."""
        folder = self.options.out / "state"
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in (("model", self.model), ("heads", self.heads)):
            save_model(module, str(folder / f"{name}.part"))
        torch.save(
            {"optimizer": self.optimizer.state_dict(), "step": self.step}, folder / "optimizer.part"
        )
        for name in ("model", "heads", "optimizer"):
            os.replace(folder / f"{name}.part", folder / name)

    def resume(self) -> bool:
        """Load the checkpoint in `out`, if there is one."""
        folder = self.options.out / "state"
        if not (folder / "optimizer").is_file():
            return False
        load_model(self.model, str(folder / "model"))
        load_model(self.heads, str(folder / "heads"))
        state = torch.load(folder / "optimizer", map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        return True

    def export(self) -> Path:
        """Write the model as a transformers checkpoint in bf16, with its processor."""
        folder = self.options.out / "checkpoint"
        self.model.to(torch.bfloat16).save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return folder


def _start_model(options: Options) -> Any:
    if options.init is None:
        model = random_model(options.seed)
        # Text embeddings start as large as the vision tower's outputs; at transformers' 0.02 the
        # video drowns the words for thousands of steps.
        torch.nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.1)
        return model
    # Importing the modelling file registers our classes with transformers' Auto classes.
    from transformers import AutoModelForImageTextToText

    import internvideo3.model.modeling  # noqa: F401

    return AutoModelForImageTextToText.from_pretrained(options.init, dtype=torch.float32)


def _teacher(
    options: Options, device: torch.device, mask_dtype: torch.dtype
) -> PackedForward | None:
    if options.teacher is None:
        return None
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(options.teacher, dtype=torch.float32)
    return PackedForward(model.to(device).eval().requires_grad_(False), device, mask_dtype)


def _right_answers(answers: Answers) -> list[tuple[int, float]]:
    """(family, 1.0 or 0.0) of every answer."""
    right_A = answers.logits_AV.argmax(-1) == answers.labels_A
    ids, index_A = answers.answer_A.unique(return_inverse=True)
    wrong = torch.zeros(len(ids), device=right_A.device).index_add_(0, index_A, (~right_A).float())
    family = torch.zeros(len(ids), dtype=torch.long, device=right_A.device)
    family[index_A] = answers.family_A
    return [(f, float(w == 0)) for f, w in zip(family.tolist(), wrong.tolist(), strict=True)]


def run(options: Options, device: torch.device, workers: int, stop_after_s: float | None) -> bool:
    """Train until the last step or the time limit; True when the last step is done."""
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options, device)
    resumed = trainer.resume()
    log.info("%s at step %d of %d", "resumed" if resumed else "start", trainer.step, options.steps)
    loader = DataLoader(
        StepStream(options, trainer.step),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=6 if workers else None,
    )
    metrics = (options.out / "metrics.jsonl").open("a")
    since, window = time.monotonic(), trainer.step
    for step, batch in loader:
        assert step == trainer.step
        losses = trainer.train_step(batch)
        if trainer.step % 100 == 0:
            rate = (trainer.step - window) / (time.monotonic() - since)
            row = {name: round(float(value), 4) for name, value in losses.items()}
            row |= {"step": trainer.step, "steps_per_s": round(rate, 2), "length": batch.length_s}
            _note(metrics, row)
            since, window = time.monotonic(), trainer.step
        if trainer.step % 1000 == 0 and trainer.step > options.vision_steps:
            scores = trainer.validate((8, 16, 32), 32)
            _note(metrics, {"step": trainer.step, "validation": scores})
            trainer.save()
            since = time.monotonic()
        if stop_after_s is not None and time.monotonic() - trainer.started > stop_after_s:
            break
    trainer.save()
    finished = trainer.step >= options.steps
    scores = trainer.validate((4, 8, 16, 32, 64, 120), 64)
    _note(metrics, {"step": trainer.step, "validation": scores, "finished": finished})
    trainer.export()
    return finished


def _note(metrics: Any, row: dict[str, Any]) -> None:
    metrics.write(json.dumps(row) + "\n")
    metrics.flush()
    shown = {k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}
    if "validation" in shown:
        shown["validation"] = {k: round(v, 2) for k, v in row["validation"].items()}
    log.info("%s", json.dumps(shown))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for state and checkpoint")
    parser.add_argument("--steps", type=int, required=True, help="optimiser steps in all")
    parser.add_argument("--vision-steps", type=int, default=0, help="first steps: vision only")
    parser.add_argument("--init", type=Path, help="checkpoint folder to start from")
    parser.add_argument("--teacher", type=Path, help="checkpoint folder to distil from")
    parser.add_argument("--curriculum-from", type=float, default=0.0, help="0 = start, 1 = end")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--vision-rate", type=float, default=0.4, help="relative to the text's")
    parser.add_argument("--scene-weight", type=float, default=0.1, help="dense heads' loss")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers")
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw batches")
    parser.add_argument("--stop-after-s", type=float, help="save and stop after so many seconds")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Parse, record the options, train."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    named = vars(_parse(arguments))
    device, workers, stop = (named.pop(name) for name in ("device", "workers", "stop_after_s"))
    options = Options(**named)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(options) | {"device": device}, default=str, indent=1)
    (options.out / "options.json").write_text(text + "\n")
    run(options, torch.device(device), workers, stop)


if __name__ == "__main__":
    main()
