"""How sure a mean is when questions about one video are not independent.

Clusters are videos. Interval: percentile bootstrap over whole clusters, widened for few clusters
(the "expanded percentile" of Hesterberg, "What Teachers Should Know About the Bootstrap", 2015).
Standard error: the clustered formula of Miller, "Adding Error Bars to Evals", 2024 (equation 4),
with the factor C / (C - 1). Two systems on the same samples are compared by the paired difference,
resampled in the same clusters, and by McNemar's exact test.

Letters: N samples, C clusters, R resamples.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import bdtr, ndtr, ndtri, stdtrit

Floats = NDArray[np.float64]
Part = TypeVar("Part", bound=Hashable)
RESAMPLES = 10_000
_CHUNK = 2_000_000  # draws held at once in full width
_KEPT = 40_000_000  # draws kept for the next system, a byte each


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the interval that contains the true one with probability `level`."""

    mean: float
    low: float
    high: float
    se: float
    """Clustered standard error; nan for a single cluster."""
    n: int
    clusters: int
    level: float = 0.95


@dataclass(frozen=True, slots=True)
class Difference:
    """System b minus system a on the samples that both answered."""

    interval: Interval
    wins: int
    """Samples where b scores higher."""
    losses: int
    """Samples where b scores lower."""
    ties: int
    p_mcnemar: float
    """Exact two-sided McNemar (sign) test on wins and losses; ignores clustering."""


@dataclass(frozen=True, slots=True)
class _Clustered:
    """Per-cluster sums of the values and sizes."""

    sums_C: Floats
    sizes_C: Floats

    @property
    def mean(self) -> float:
        return float(self.sums_C.sum() / self.sizes_C.sum())


def cluster_interval(
    values: Sequence[float] | Floats,
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """Return the mean of `values` with a cluster-bootstrap interval.

    Args:
        values: [N] one score per sample.
        clusters: [N] the cluster (video) of each sample.
        level: Coverage of the interval.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling; equal inputs give equal intervals.
        bounds: Smallest and largest possible value. Where every cluster has the same mean the
            bootstrap has no spread, and Wilson's limit for unseen deviations is given instead;
            with a single cluster the interval is the bounds themselves.

    Raises:
        ValueError: No values, or not one cluster per value.
    """
    data = _gather(values, clusters)
    count = len(data.sums_C)
    mean, se = data.mean, _standard_error(data)
    if count == 1:
        low, high = bounds
    elif np.ptp(data.sums_C / data.sizes_C) < 1e-12:
        low, high = _unspread(mean, count, level, bounds)
    else:
        means_R = _resampled_means(data, resamples, seed)
        tail = _expanded_tail(level, count)
        low, high = (float(q) for q in np.quantile(means_R, [tail, 1 - tail]))
    return Interval(mean, low, high, se, int(data.sizes_C.sum()), count, level)


def statistic_interval(
    value: float,
    units: Sequence[tuple[str, Part, float]],
    statistic: Callable[[Mapping[Part, float | None]], float | None],
    *,
    n: int,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Interval:
    """Return a cluster-bootstrap interval of what is made of the means of parts.

    Args:
        value: The statistic of all units.
        units: Cluster (video), part and value of each; a part's mean is over its units.
        statistic: Means by part to number, `None` for a part of which no unit was drawn; itself
            `None` where it is not defined, and the draw does not count.
        n: Samples that the units are made of.
        level: Coverage of the interval.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
        bounds: Smallest and largest possible value; the interval where there is no spread to see.

    Raises:
        ValueError: No units.
    """
    if not units:
        raise ValueError("need units for an interval, got none")
    names, clusters_N = np.unique([cluster for cluster, _, _ in units], return_inverse=True)
    parts = list(dict.fromkeys(part for _, part, _ in units))
    column = {part: at for at, part in enumerate(parts)}
    table_C2P = np.zeros((len(names), 2, len(parts)))
    for cluster, (_, part, number) in zip(clusters_N, units, strict=True):
        table_C2P[cluster, :, column[part]] += number, 1.0
    drawn_R2P = _resampled(table_C2P.reshape(len(names), -1), resamples, seed).reshape(
        resamples, 2, len(parts)
    )
    found = [statistic(_means(parts, *drawn_2P)) for drawn_2P in drawn_R2P.tolist()]
    values_R = np.asarray([one for one in found if one is not None], float)
    if len(names) == 1 or len(values_R) < 2 or np.ptp(values_R) < 1e-6:
        low, high = bounds
    else:
        tail = _expanded_tail(level, len(names))
        low, high = (float(q) for q in np.quantile(values_R, [tail, 1 - tail]))
    se = float(values_R.std(ddof=1)) if len(values_R) > 1 else float("nan")
    return Interval(value, low, high, se, n, len(names), level)


def _means(
    parts: Sequence[Part], sums_P: Sequence[float], sizes_P: Sequence[float]
) -> dict[Part, float | None]:
    return {
        part: total / size if size else None
        for part, total, size in zip(parts, sums_P, sizes_P, strict=True)
    }


def clustered_se(values: Sequence[float] | Floats, clusters: Sequence[str]) -> float:
    """Return the clustered standard error of the mean of `values`; nan for one cluster."""
    return _standard_error(_gather(values, clusters))


def paired_difference(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    clusters: Sequence[str],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Compare two systems on the same samples: b minus a, [N] scores each.

    Raises:
        ValueError: No values, or lengths that differ.
    """
    a_N, b_N = np.asarray(a, float), np.asarray(b, float)
    if a_N.shape != b_N.shape:
        raise ValueError(f"paired scores differ in length: {a_N.shape} and {b_N.shape}")
    interval = cluster_interval(
        b_N - a_N, clusters, level=level, resamples=resamples, seed=seed, bounds=(-1.0, 1.0)
    )
    wins, losses = int((b_N > a_N).sum()), int((b_N < a_N).sum())
    return Difference(interval, wins, losses, len(a_N) - wins - losses, mcnemar(wins, losses))


def mcnemar(wins: int, losses: int) -> float:
    """Return the exact two-sided p-value that wins and losses are equally likely."""
    discordant = wins + losses
    if discordant == 0:
        return 1.0
    return float(min(1.0, 2 * bdtr(min(wins, losses), discordant, 0.5)))


def _gather(values: Sequence[float] | Floats, clusters: Sequence[str]) -> _Clustered:
    values_N = np.asarray(values, float)
    if values_N.ndim != 1 or not len(values_N):
        raise ValueError(f"need a non-empty list of scores, got shape {values_N.shape}")
    if len(clusters) != len(values_N):
        raise ValueError(f"{len(values_N)} scores but {len(clusters)} cluster names")
    _, index_N = np.unique(np.asarray(clusters), return_inverse=True)
    count = int(index_N.max()) + 1
    sums_C, sizes_C = np.zeros(count), np.zeros(count)
    np.add.at(sums_C, index_N, values_N)
    np.add.at(sizes_C, index_N, 1.0)
    return _Clustered(sums_C, sizes_C)


def _standard_error(data: _Clustered) -> float:
    count = len(data.sums_C)
    if count == 1:
        return float("nan")
    residuals_C = data.sums_C - data.mean * data.sizes_C
    variance = float((residuals_C**2).sum()) * count / (count - 1)
    return float(np.sqrt(variance) / data.sizes_C.sum())


def _resampled_means(data: _Clustered, resamples: int, seed: int) -> Floats:
    """Return [R] means of resamples of C whole clusters with replacement."""
    sums_R, sizes_R = _resampled(np.stack([data.sums_C, data.sizes_C], 1), resamples, seed).T
    return np.asarray(sums_R / sizes_R)


def _resampled(table_CX: Floats, resamples: int, seed: int) -> Floats:
    """Return [R, X] the column sums of resamples of C rows with replacement."""
    clusters = len(table_CX)
    kept = clusters * resamples <= _KEPT
    draws = _kept_draws(clusters, resamples, seed) if kept else _draws(clusters, resamples, seed)
    table32_CX = table_CX.astype(np.float32)
    return np.concatenate(
        [counts_NC.astype(np.float32) @ table32_CX for counts_NC in draws]
    ).astype(np.float64)


def _draws(clusters: int, resamples: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Yield [N, C], R rows in all: how often each cluster was drawn; once on average."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // clusters)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        index_NC = rng.integers(0, clusters, (size, clusters), dtype=np.int32)
        index_NC += np.arange(size, dtype=np.int32)[:, None] * clusters
        counted = np.bincount(index_NC.ravel(), minlength=size * clusters)
        yield counted.reshape(size, clusters).astype(np.uint8)


# Systems on one suite have the same number of videos, so they share their draws.
@lru_cache(maxsize=2)
def _kept_draws(clusters: int, resamples: int, seed: int) -> tuple[NDArray[np.uint8], ...]:
    return tuple(_draws(clusters, resamples, seed))


def _expanded_tail(level: float, clusters: int) -> float:
    """Return the bootstrap quantile whose interval is as wide as a t interval would be."""
    t = float(stdtrit(clusters - 1, (1 - level) / 2))
    return float(ndtr(t * np.sqrt(clusters / (clusters - 1))))


def _unspread(
    mean: float, clusters: int, level: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Return an interval for clusters that all have the same mean.

    Wilson's upper limit for 0 deviating clusters of C, each of which could reach a bound.
    """
    z2 = float(ndtri(0.5 + level / 2)) ** 2
    rate = z2 / (clusters + z2)
    return mean - (mean - bounds[0]) * rate, mean + (bounds[1] - mean) * rate
