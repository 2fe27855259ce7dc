"""One of two processes that share every row, for test_attention.py: `divided.py CHECKPOINT OUT`."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from internvideo3.model.checkpoint import load_model
from internvideo3.training.policy import Policy
from internvideo3.training.processes import Processes
from internvideo3.training.recipe import Gspo, Opd, Optimiser, Sft, WorldData
from internvideo3.training.train import build_stage

COMMON: dict[str, Any] = {
    "steps": 1, "documents": 2, "pack_tokens": 2048,
    "data": WorldData(lengths={2: 0.5, 4: 0.5}, videos=6, questions=3),
    "optimiser": Optimiser(learning_rate=1e-3),
}  # fmt: skip
STAGES = {
    "sft": Sft(kind="sft", **COMMON),
    "gspo": Gspo(kind="gspo", group=2, max_new_tokens=4, **COMMON),
    "opd": Opd(kind="opd", teacher="scale:base", group=2, max_new_tokens=4, **COMMON),
}


def main() -> None:
    torch.set_num_threads(1)
    group = Processes()
    group.divide_rows(2)
    found = {}
    for name, options in STAGES.items():
        model, processor = load_model(sys.argv[1], "cpu", torch.float32)
        policy = Policy(model, sharing=group.sharing)
        works, _ = build_stage(options, processor, policy, 0, group).works(0, policy)
        loss = torch.stack([policy(work.pack, work.loss) for work in works]).sum()
        (loss / group.parts).backward()
        grads = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        for grad in grads.values():
            dist.all_reduce(grad)
        found[name] = {"loss": loss.detach(), **grads}
    if group.first:
        torch.save(found, sys.argv[2])
    group.leave()


if __name__ == "__main__":
    main()
