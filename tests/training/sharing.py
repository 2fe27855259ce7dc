"""One of two processes that share rows and differ, for test_loop.py: `sharing.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from internvideo3.training.documents import Document, WorldDocuments
from internvideo3.training.loop import TrainingError
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Gspo, Optimiser, Recipe, Sft, StageOptions, WorldData
from internvideo3.training.rollouts import Sampler
from internvideo3.training.train import quiet, train

COMMON: dict[str, Any] = {
    "steps": 1, "documents": 2, "pack_tokens": 2048, "sequence_parallel": 2,
    "data": WorldData(lengths={2: 1.0}, videos=4, profiles={"main": 1.0}),
    "optimiser": Optimiser(learning_rate=1e-3, warmup=0.0),
}  # fmt: skip


def trained(stage: StageOptions, out: Path, group: Processes) -> None:
    train(Recipe(about="test", start="scale:m2la", stages={"a": stage}), out, quiet, group)


def main() -> None:
    torch.set_num_threads(1)
    group, out = Processes(), Path(sys.argv[1])
    gspo = Gspo(kind="gspo", group=4, max_new_tokens=6, **COMMON)
    trained(gspo, out / "one sampler", group)
    answers, taught = Sampler.answers, WorldDocuments.taught

    def others(self: Sampler, trunk: Any, count: int, seed: int) -> Any:
        return answers(self, trunk, count, seed + group.rank)

    Sampler.answers = others  # type: ignore[method-assign]
    trained(gspo, out / "two samplers", group)

    def another(self: WorldDocuments, index: int) -> Document:
        return taught(self, index + group.rank)

    WorldDocuments.taught = another  # type: ignore[method-assign]
    try:
        trained(Sft(kind="sft", **COMMON), out / "two rows", group)
    except TrainingError as error:
        (out / f"{group.rank}.txt").write_text(str(error))
    finally:
        group.leave()


if __name__ == "__main__":
    main()
