"""Several sources as one file with exact shares."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from internvideo3.training.curation.records import DataError, Row
from internvideo3.training.mixture import counts, dealt


def mixed(
    sources: Mapping[str, Sequence[Row]], shares: Mapping[str, float], total: int, seed: int
) -> list[Row]:
    """So many rows, each source's share exact and spread evenly; no row twice.

    Args:
        sources: Name → rows.
        shares: Name → share of the rows; they sum to 1.
        total: Rows in all.
        seed: Which rows of a source are drawn, and their order.

    Raises:
        DataError: A source has too few rows, or shares and sources differ in names.
        RecipeError: The shares do not sum to 1.
    """
    if sources.keys() != shares.keys():
        raise DataError(f"sources {sorted(sources)} and shares {sorted(shares)} differ")
    wanted = counts(shares, total)
    for name, count in wanted.items():
        if count > len(sources[name]):
            most = int(min(len(sources[n]) / s for n, s in shares.items() if s))
            raise DataError(
                f"{name} has {len(sources[name])} rows and {count} are wanted; with these shares "
                f"at most {most} rows in all can be drawn without repeating one"
            )
    drawn = {
        name: iter(random.Random(f"mix/{seed}/{name}").sample(list(sources[name]), count))
        for name, count in wanted.items()
    }
    return [{**next(drawn[name]), "source": name} for name in dealt(shares, total)]
