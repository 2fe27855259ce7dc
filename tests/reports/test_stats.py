"""Run with: pytest tests/reports/test_stats.py -q."""

import itertools
import math

import numpy as np
import pytest

from internvideo3.reports.stats import (
    _expanded_tail,
    cluster_interval,
    clustered_se,
    mcnemar,
    paired_difference,
)


def test_singleton_clusters_give_the_textbook_standard_error() -> None:
    values = np.array([0.1, 0.5, 0.9, 0.4, 0.7])
    names = list("abcde")
    assert clustered_se(values, names) == pytest.approx(values.std(ddof=1) / math.sqrt(5))


def test_equal_clusters_give_the_standard_error_of_cluster_means() -> None:
    rng = np.random.default_rng(1)
    values_CK = rng.random((30, 4))
    names = [f"v{c}" for c in range(30) for _ in range(4)]
    expected = values_CK.mean(1).std(ddof=1) / math.sqrt(30)
    assert clustered_se(values_CK.ravel(), names) == pytest.approx(expected)


def test_identical_answers_within_a_video_count_once() -> None:
    one = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    alone = clustered_se(one, list("abcdef"))
    repeated = clustered_se(np.repeat(one, 10), [c for c in "abcdef" for _ in range(10)])
    assert repeated == pytest.approx(alone)


def test_bootstrap_interval_agrees_with_the_normal_one_on_many_clusters() -> None:
    rng = np.random.default_rng(2)
    values = (rng.random(2000) < 0.6).astype(float)
    names = [f"v{i // 5}" for i in range(2000)]
    got = cluster_interval(values, names)
    assert got.mean == pytest.approx(values.mean())
    assert got.low == pytest.approx(got.mean - 1.966 * got.se, abs=0.002)
    assert got.high == pytest.approx(got.mean + 1.966 * got.se, abs=0.002)
    assert (got.n, got.clusters) == (2000, 400)


@pytest.mark.parametrize(
    ("clusters", "t"),
    [(5, 2.7764451052), (12, 2.2009851601), (61, 2.0002978220)],
)
def test_quantiles_of_few_clusters_are_those_of_a_t_interval(clusters: int, t: float) -> None:
    """Resamples spread by the root of (C - 1) / C too little, and t of C - 1 is wider than normal.

    The values of t are a table's; the normal distribution is from the error function.
    """
    at = t * math.sqrt(clusters / (clusters - 1))
    assert _expanded_tail(0.95, clusters) == pytest.approx(math.erfc(at / math.sqrt(2)) / 2)


def test_the_interval_of_five_clusters_is_known() -> None:
    """Means of 0.1 to 0.9: quantiles 0.00095 and 0.99905 of all 3125 resamples, counted out."""
    values = [0.1, 0.3, 0.5, 0.7, 0.9]
    every = sorted(sum(drawn) / 5 for drawn in itertools.product(values, repeat=5))
    got = cluster_interval(values, list("abcde"), resamples=40_000)
    # Of 3125 resamples one has a mean of 0.1, five of 0.14, and fifteen of 0.18.
    assert every[:7] == pytest.approx([0.1] + [0.14] * 5 + [0.18])
    assert (got.low, got.high) == pytest.approx((0.14, 0.86), abs=1e-6)


def test_intervals_are_reproducible_and_need_no_order() -> None:
    rng = np.random.default_rng(3)
    values = rng.random(60)
    names = [f"v{i // 3}" for i in range(60)]
    first = cluster_interval(values, names, seed=7)
    assert cluster_interval(values, names, seed=7) == first
    assert cluster_interval(values, names, seed=8) != first
    back = cluster_interval(values[::-1], names[::-1], seed=7)
    assert (back.low, back.high) == pytest.approx((first.low, first.high))


@pytest.mark.parametrize("clusters", [12, 60])
def test_coverage_of_the_interval_is_near_95_percent(clusters: int) -> None:
    """Videos differ in difficulty, so that ignoring clusters would cover far less."""
    rng = np.random.default_rng(4)
    names = [f"v{c}" for c in range(clusters) for _ in range(6)]
    trials, hits, naive_hits = 400, 0, 0
    for trial in range(trials):
        rate_C = rng.beta(1.2, 0.8, clusters)
        values = (rng.random((clusters, 6)) < rate_C[:, None]).astype(float).ravel()
        got = cluster_interval(values, names, resamples=800, seed=trial)
        hits += got.low <= 0.6 <= got.high
        half = 1.96 * values.std() / math.sqrt(len(values))
        naive_hits += abs(values.mean() - 0.6) <= half
    assert 0.92 <= hits / trials <= 0.98
    assert naive_hits / trials < 0.85


def test_paired_interval_covers_and_is_narrower_than_the_unpaired() -> None:
    rng = np.random.default_rng(5)
    clusters, trials, hits = 40, 300, 0
    names = [f"v{c}" for c in range(clusters) for _ in range(5)]
    widths = []
    for trial in range(trials):
        level_C = rng.beta(1, 1, clusters)[:, None]
        noise_CK = rng.random((clusters, 5))
        a = (noise_CK < level_C * 0.9).astype(float).ravel()
        b = (noise_CK < level_C).astype(float).ravel()
        got = paired_difference(a, b, names, resamples=800, seed=trial).interval
        hits += got.low <= 0.05 <= got.high
        alone = cluster_interval(b, names, resamples=800, seed=trial)
        widths.append((got.high - got.low) / (alone.high - alone.low))
    assert 0.91 <= hits / trials <= 0.99
    assert np.mean(widths) < 0.6


def test_difference_counts_wins_and_losses() -> None:
    got = paired_difference([0, 1, 1, 0.5], [1, 1, 0, 0.75], ["a", "a", "b", "c"])
    assert (got.wins, got.losses, got.ties) == (2, 1, 1)
    assert got.interval.mean == pytest.approx(0.0625)
    assert got.interval.low <= got.interval.mean <= got.interval.high


def test_equal_systems_differ_by_nothing_but_not_with_certainty() -> None:
    got = paired_difference([1, 0, 1, 1], [1, 0, 1, 1], ["a", "b", "c", "d"])
    assert got.interval.mean == 0 and got.p_mcnemar == 1
    assert got.interval.low == -got.interval.high
    # Rule of three: at most about 3.84 / (C + 3.84) of the videos may differ, here of 4.
    assert got.interval.high == pytest.approx(3.8415 / 7.8415, abs=1e-3)


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (8, 2, 2 * 56 / 1024), (6, 6, 1.0)],
)
def test_mcnemar_is_the_exact_sign_test(wins: int, losses: int, p: float) -> None:
    assert mcnemar(wins, losses) == pytest.approx(p)


def test_mcnemar_rejects_at_its_level_under_no_difference() -> None:
    rng = np.random.default_rng(6)
    wins = rng.binomial(40, 0.5, 2000)
    rejected = np.mean([mcnemar(int(w), 40 - int(w)) <= 0.05 for w in wins])
    assert rejected <= 0.06


def test_a_perfect_score_is_not_certain() -> None:
    got = cluster_interval([1.0] * 20, [f"v{i // 2}" for i in range(20)])
    assert got.high == 1 and 0.6 < got.low < 0.8
    assert got.se == 0


def test_a_single_video_says_nothing() -> None:
    got = cluster_interval([1.0, 0.0], ["v", "v"])
    assert (got.mean, got.low, got.high) == (0.5, 0, 1)
    assert math.isnan(got.se)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        cluster_interval([], [])
    with pytest.raises(ValueError, match="cluster names"):
        cluster_interval([1.0], [])
    with pytest.raises(ValueError, match="length"):
        paired_difference([1.0], [1.0, 0.0], ["a"])
