"""One of two processes that share every row, for test_attention.py: `divided.py CHECKPOINT OUT`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from internvideo3.model.checkpoint import load_model
from internvideo3.training.objectives.linear_cross_entropy import IGNORE
from internvideo3.training.packing import Pack
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
SIGHTS: dict[str, list[list[int]]] = {
    "even frames": [[4, 4, 4]],
    "odd frames": [[3, 4, 8]],
    "a process without frames": [[1, 8, 4]],
    "videos and images": [[2, 4, 4], [1, 8, 8], [1, 4, 12], [3, 4, 4], [2, 4, 4]],
    "text alone": [],
}
"""Grids of what a row shows."""


def sight(model: Any, grids: list[list[int]]) -> Pack:
    """A row that shows so many frames, with words before, between and behind them."""
    torch.manual_seed(len(grids))
    config, visual = model.config, model.model.visual
    words = [torch.randint(10, 60, (5,)) for _ in range(len(grids) + 1)]
    pieces = [words[0]]
    for (frames, height, width), said in zip(grids, words[1:], strict=True):
        tokens = frames * height * width // visual.spatial_merge_size**2
        pieces += [torch.full((tokens,), config.video_token_id), said]
    ids_T = torch.cat(pieces)
    shown = ids_T == config.video_token_id
    patches = int(shown.sum()) * visual.spatial_merge_size**2
    zeros_T = torch.zeros_like(ids_T)
    return Pack(
        ids_T, torch.arange(len(ids_T)).expand(3, -1), zeros_T, zeros_T,
        torch.where(shown, IGNORE, ids_T), zeros_T,
        torch.randn(patches, visual.patch_embed.proj.weight[0].numel()),
        torch.tensor(grids, dtype=torch.long).view(-1, 3),
    )  # fmt: skip


def own_words(row: Pack) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of a row's words."""
    labels_N = row.labels_T[row.labels_T != IGNORE]
    return lambda hidden_NW, head_VW: functional.cross_entropy(hidden_NW @ head_VW.T, labels_N)


def learned(policy: Policy) -> dict[str, Tensor]:
    """Gradients of all that learns, whole."""
    grads = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


def shared_rows(checkpoint: str, group: Processes) -> dict[str, dict[str, Tensor]]:
    """Each stage and each sight: loss and gradients of rows that both processes share."""
    found = {}
    for name, options in STAGES.items():
        model, processor = load_model(checkpoint, "cpu", torch.float32)
        policy = Policy(model, sharing=group.sharing)
        works, _ = build_stage(options, processor, policy, 0, group).works(0, policy)
        loss = torch.stack([policy(work.pack, work.loss) for work in works]).sum()
        (loss / group.parts).backward()
        found[name] = {"loss": loss.detach(), **learned(policy)}
    for name, grids in SIGHTS.items():
        model, _ = load_model(checkpoint, "cpu", torch.float64)
        policy = Policy(model, train_vision=True, recompute=True, sharing=group.sharing)
        row = sight(model, grids)
        loss = policy(row, own_words(row))
        (loss / group.parts).backward()
        found[name] = {"loss": loss.detach(), **learned(policy)}
    for one in found.values():
        # In one order on both: a set's differs.
        for name in sorted(one.keys() - {"loss"}):
            dist.all_reduce(one[name])
    return found


def sharded_weights(checkpoint: str, group: Processes) -> dict[str, dict[str, Tensor]]:
    """Weights that both share, of a policy whose tower learns and of a frozen copy of it.

    Their rows differ: what one shows five times, the other does not show at all.
    """
    model, _ = load_model(checkpoint, "cpu", torch.float64)
    row = sight(model, list(SIGHTS.values())[(3, 4)[group.rank]])
    policy = Policy(model, train_vision=True, sharing=group.sharing)
    reference = policy.copied()
    group.shard(policy)
    group.shard(reference)
    loss = policy(row, own_words(row))
    loss.backward()
    with torch.no_grad():
        apart = (reference(row, own_words(row)) - loss).abs()
    total = loss.detach().clone()
    dist.all_reduce(total)
    # FSDP2 averages over the processes.
    grads = {name: 2 * grad for name, grad in learned(policy).items()}
    whole = group.whole_weights(reference)
    return {
        "sharded": {"loss": total, **grads},
        "frozen": {"loss": apart, **whole},
    }


def main() -> None:
    torch.set_num_threads(1)
    group = Processes()
    group.divide_rows(2)
    found = shared_rows(sys.argv[1], group)
    group.divide_rows(1)
    found |= sharded_weights(sys.argv[1], group)
    if group.first:
        torch.save(found, sys.argv[2])
    group.leave()


if __name__ == "__main__":
    main()
