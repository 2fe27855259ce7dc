"""One of two processes, of which the second fails, for test_loop.py: `failing.py OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from internvideo3.training.curation.records import DataError
from internvideo3.training.documents import Document, WorldDocuments
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Optimiser, Recipe, Sft, WorldData
from internvideo3.training.train import quiet, train


def main() -> None:
    torch.set_num_threads(1)
    group = Processes()
    taught = WorldDocuments.taught

    def fails(self: WorldDocuments, index: int) -> Document:
        # The third step's; two steps are done by then, and no state is due.
        if group.rank == 1 and index >= 4:
            raise DataError("this process alone fails")
        return taught(self, index)

    WorldDocuments.taught = fails  # type: ignore[method-assign]
    stage = Sft(
        kind="sft", steps=4, documents=2, pack_tokens=2048, save_every=50,
        optimiser=Optimiser(learning_rate=1e-3), data=WorldData(lengths={2: 1.0}, videos=8),
    )  # fmt: skip
    recipe = Recipe(about="test", start="scale:m2la", stages={"sft": stage})
    try:
        train(recipe, Path(sys.argv[1]), quiet, group)
    finally:
        group.leave()


if __name__ == "__main__":
    main()
