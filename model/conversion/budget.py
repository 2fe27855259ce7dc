"""Dynamic latent budgeting: one budget of cached numbers, spent by layer and by modality.

Paper section 3.2.2. Dropping direction ν of layer l costs ½ sv²_{l,ν} of loss per token in the
Fisher metric, so the cheapest way to keep N directions in all is one threshold τ for all layers:
keep every direction with sv² ≥ τ. That minimum is of the linearised loss; measured on real models
the allocation does better when tempered, r_l ∝ √(r_l of the threshold), within bounds around the
uniform rank.

Modalities share a latent and differ in its prefix: vision tokens use, and cache, the first r_v
coordinates. Where they take less than the mean, text tokens get what is left (`text_rank`): of a
long video's context they are few, and a budget in bytes hardly feels them.

Axes: L layers, Q directions of a layer (largest energy first).
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDS = (0.5, 1.35)
"""Ranks stay within these multiples of the uniform rank."""

EXPONENT = 0.5
"""Of the threshold's allocation; 1 would be the threshold itself."""


def threshold_ranks(energies_LQ: list[Tensor], total: int) -> list[int]:
    """Ranks of the `total` most energetic directions of all layers together."""
    flat = torch.cat(energies_LQ)
    owner = torch.cat([torch.full((len(e),), layer) for layer, e in enumerate(energies_LQ)])
    kept = owner[flat.cpu().argsort(descending=True, stable=True)[:total]]
    return torch.bincount(kept, minlength=len(energies_LQ)).tolist()


def tempered_ranks(energies_LQ: list[Tensor], uniform: int) -> list[int]:
    """Ranks of every layer, `uniform` on average.

    Raises:
        ValueError: the uniform rank leaves nothing to allocate.
    """
    if uniform < 2:
        raise ValueError(f"a mean rank of {uniform} leaves nothing to allocate; give more bytes.")
    layers = len(energies_LQ)
    raw = torch.tensor(threshold_ranks(energies_LQ, uniform * layers), dtype=torch.float64)
    shape = raw.clamp_min(1).pow(EXPONENT)
    top = [min(len(e), int(BOUNDS[1] * uniform)) for e in energies_LQ]
    return _fit(shape, uniform * layers, max(1, int(BOUNDS[0] * uniform)), top)


def _fit(shape_L: Tensor, total: int, low: int, top: list[int]) -> list[int]:
    """Integers proportional to `shape_L` within bounds, with the given sum where that is possible.

    The factor is found by bisection; what rounding leaves goes to the largest remainders.
    """
    highest = torch.tensor(top, dtype=torch.float64).clamp_min(low)

    def at(factor: float) -> Tensor:
        return (factor * shape_L).clamp(min=low).minimum(highest)

    lower, upper = 0.0, float(highest.max() / shape_L.min())
    for _ in range(60):
        middle = (lower + upper) / 2
        lower, upper = (middle, upper) if at(middle).sum() < total else (lower, middle)
    exact = at(upper)
    ranks = exact.floor()
    for layer in (exact - ranks).argsort(descending=True).tolist():
        if ranks.sum() < total and ranks[layer] < highest[layer]:
            ranks[layer] += 1
    return [int(r) for r in ranks]


def text_rank(mean_rank: float, vision_share: float, vision_tokens: float, most: int) -> int:
    """Rank of text tokens where vision tokens have a share of it.

    With a share f of vision tokens and ranks r and s r, the mean is r (1 - f (1 - s)).

    Args:
        mean_rank: that the budget leaves, over all tokens.
        vision_share: s.
        vision_tokens: f.
        most: rank beyond which nothing is left to keep.
    """
    return min(most, int(mean_rank / (1 - vision_tokens * (1 - vision_share))))


def vision_ranks(vision_LR: list[Tensor], ranks: list[int], mean_rank: float) -> list[int]:
    """Rank of vision tokens per layer, `mean_rank` on average: the coordinates they need most.

    A nested rank drops coordinates from the end, so a coordinate costs what vision tokens lose
    from it on: energies are made monotone before the threshold, whose ranks are tempered as those
    of the layers are.

    Args:
        vision_LR: energy of each latent coordinate on vision tokens, per layer.
        ranks: ranks of the layers, which no vision rank exceeds.
        mean_rank: wanted mean.
    """
    monotone = [
        e[:r].flip(0).cummax(0).values.flip(0) for e, r in zip(vision_LR, ranks, strict=True)
    ]
    total = round(mean_rank * len(ranks))
    raw = torch.tensor(threshold_ranks(monotone, total), dtype=torch.float64)
    low = min(max(1, int(BOUNDS[0] * mean_rank)), *ranks)
    return _fit(raw.clamp_min(1).pow(EXPONENT), total, low, ranks)
