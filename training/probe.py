"""How well a model predicts text, pictures' and videos' captions: what conversion costs.

Mean cross-entropy, nats a token, of the same documents whoever is asked. Section 4.1 says that
continued pretraining recovers what conversion lost; these numbers, before conversion, after it and
after continued pretraining, are that claim.

Letters: N predicted tokens, W text width, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from internvideo3.training.captions import WorldCaptions
from internvideo3.training.objectives.linear_cross_entropy import IGNORE, linear_cross_entropy
from internvideo3.training.packing import pack
from internvideo3.training.policy import Policy
from internvideo3.training.recipe import Modality, Shares, WorldData

FIRST_SEED = 9 * 10**8
"""Videos of the training split that no recipe trains on."""
EVEN = Shares(text=0.4, image=0.3, video=0.3)


@torch.no_grad()
def modality_losses(
    policy: Policy, processor: Any, lengths: dict[int, float], documents: int
) -> dict[str, float]:
    """Loss on so many documents of each kind.

    Args:
        policy: The model.
        processor: Its processor.
        lengths: Video length in seconds → share.
        documents: Documents of each kind.
    """
    data = WorldData(lengths=lengths, videos=documents, first_seed=FIRST_SEED)
    source = WorldCaptions(data, processor, 0, EVEN.by_kind())
    return {kind: _loss(policy, source, kind, documents) for kind in get_args(Modality)}


def _loss(policy: Policy, source: WorldCaptions, kind: Modality, documents: int) -> float:
    total = tokens = 0.0
    for index in range(documents):
        laid = pack([source.of_kind(kind, index)], policy.model)
        labels_N = laid.labels_T[laid.labels_T != IGNORE]

        def loss(hidden_NW: Tensor, head_VW: Tensor, labels_N: Tensor = labels_N) -> Tensor:
            ones_N = torch.ones(len(labels_N), device=hidden_NW.device)
            return linear_cross_entropy(hidden_NW, head_VW, labels_N.to(hidden_NW.device), ones_N)

        total += float(policy(laid.to(policy.device), loss))
        tokens += len(labels_N)
    return total / tokens


def note_losses(folder: Path, moment: str, losses: dict[str, float]) -> None:
    """Add a moment's losses to a stage's `losses.json`, if it has none yet."""
    path = folder / "losses.json"
    held = json.loads(path.read_text()) if path.is_file() else {}
    part = path.with_suffix(".part")
    part.write_text(json.dumps({moment: losses} | held, indent=1, sort_keys=True) + "\n")
    part.replace(path)
