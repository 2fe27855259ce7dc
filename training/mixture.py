"""Mixtures with exact shares: how many samples of each kind, and in which order.

A mixture is dealt, not drawn: of any number of samples each kind has its share to within one
sample, so that a short run sees the mixture that a long one sees.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

from internvideo3.training.recipe import RecipeError

Kind = TypeVar("Kind", bound=Hashable)
BLOCK, LARGEST_BLOCK = 1000, 10**6
"""Samples that are dealt at a time."""


def in_order(shares: Mapping[Kind, float]) -> dict[Kind, float]:
    """Shares sorted by what they are of.

    Which sample comes where depends on the order of the shares; a recipe's mapping has none.
    """
    keys: list[Any] = list(shares)
    return {key: shares[key] for key in sorted(keys)}


def check_shares(name: str, shares: Mapping[Kind, float]) -> None:
    """Make sure that shares are shares.

    Raises:
        RecipeError: There is none, one is negative, or they do not sum to 1.
    """
    if any(share < 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise RecipeError(
            f"the shares of {name} must be positive and sum to 1, got {dict(shares)} "
            f"with the sum {sum(shares.values()):g}"
        )


def counts(shares: Mapping[Kind, float], total: int) -> dict[Kind, int]:
    """Whole numbers of each kind that sum to a total (largest remainders first).

    Raises:
        RecipeError: The shares are none.
    """
    check_shares("a mixture", shares)
    whole = {kind: int(share * total + 1e-9) for kind, share in shares.items()}
    rest = sorted(shares, key=lambda kind: whole[kind] - shares[kind] * total)
    for kind in rest[: total - sum(whole.values())]:
        whole[kind] += 1
    return whole


def block_of(shares: Mapping[Kind, float]) -> int:
    """Samples after which shares are exact: 1000, or more where a small one would have none.

    Raises:
        RecipeError: The shares are none, or one is too small.
    """
    block = BLOCK
    while block <= LARGEST_BLOCK:
        held = counts(shares, block)
        if all(held[kind] for kind, share in shares.items() if share):
            return block
        block *= 10
    small = min((kind for kind in shares if shares[kind]), key=lambda kind: shares[kind])
    raise RecipeError(
        f"the share {shares[small]:g} of {small} is less than one sample in {LARGEST_BLOCK}, so "
        "that nothing of it would be read; raise it, or leave it out"
    )


def dealt(shares: Mapping[Kind, float], total: int) -> list[Kind]:
    """A kind for each of so many places; each kind's places are spread evenly.

    Raises:
        RecipeError: The shares are none.
    """
    places = [
        ((place + 0.5) / count, order, kind)
        for order, (kind, count) in enumerate(counts(shares, total).items())
        for place in range(count)
    ]
    return [kind for *_, kind in sorted(places, key=lambda one: one[:2])]
