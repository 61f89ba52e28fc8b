"""Intervals and tests over samples that share images, beside scipy and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from capa_probe import CapaProbeError
from capa_probe.benchmark.statistics import holm, mean_interval, paired_difference, sign_flip_p


def clustered(n: int, size: int, seed: int, between: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """``n`` clusters of ``size`` normal values, of mean 0 over all, that have a part in common."""
    rng = np.random.default_rng(seed)
    values = between * rng.normal(size=(n, 1)) + 0.3 * rng.normal(size=(n, size))
    return values.ravel(), np.repeat(np.arange(n), size)


class TestInterval:
    def test_agrees_with_scipy_where_nothing_is_shared(self) -> None:
        values = np.random.default_rng(0).exponential(size=60)
        found = mean_interval(values)
        theirs = stats.bootstrap(
            (values,), np.mean, method="percentile", n_resamples=20_000, random_state=1
        ).confidence_interval
        assert found.mean == pytest.approx(values.mean())
        assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
        assert (found.n, found.n_clusters) == (60, 60)

    def test_agrees_with_a_loop_over_unequal_clusters(self) -> None:
        rng = np.random.default_rng(2)
        groups = [rng.normal(size=rng.integers(1, 6)) + rng.normal() for _ in range(25)]
        names = [f"image {number}" for number, group in enumerate(groups) for _ in group]
        means = []
        for _ in range(4000):
            drawn = [groups[number] for number in rng.integers(0, 25, size=25)]
            means.append(np.concatenate(drawn).mean())
        found = mean_interval(np.concatenate(groups), names)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.05)

    def test_copies_within_a_cluster_are_no_evidence(self) -> None:
        values = np.random.default_rng(3).normal(size=30)
        once, copied = mean_interval(values), mean_interval(np.repeat(values, 5), np.repeat(np.arange(30), 5))
        assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
        naive = mean_interval(np.repeat(values, 5))
        assert naive.high - naive.low < 0.6 * (once.high - once.low)

    def test_covers_the_true_mean_as_often_as_it_says(self) -> None:
        with_clusters, without = 0, 0
        for seed in range(300):
            values, clusters = clustered(40, 4, seed)
            right, wrong = (mean_interval(values, of, seed, resamples=500) for of in (clusters, None))
            with_clusters += right.low <= 0 <= right.high
            without += wrong.low <= 0 <= wrong.high
        assert 0.90 <= with_clusters / 300 <= 0.98
        assert without / 300 < 0.80

    def test_of_a_proportion_without_variation(self) -> None:
        found = mean_interval([1.0] * 30, np.arange(30) // 2)
        wilson = stats.binomtest(15, 15).proportion_ci(method="wilson")
        assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high))
        # A distance that is zero everywhere is no proportion.
        zero = mean_interval([0.0] * 30, proportion=False)
        assert (zero.low, zero.high) == (0.0, 0.0)

    def test_values_that_are_not_there(self) -> None:
        found = mean_interval([1.0, math.nan, 3.0, math.nan], ["a", "a", "b", "c"])
        assert (found.mean, found.n, found.n_clusters) == (2.0, 2, 2)
        nothing = mean_interval([math.nan])
        assert nothing.n == 0
        assert math.isnan(nothing.mean)
        alone = mean_interval([0.4, 0.6], ["a", "a"])
        assert alone.mean == 0.5
        assert math.isnan(alone.low)

    def test_seed_decides(self) -> None:
        values = np.random.default_rng(4).normal(size=20)
        assert mean_interval(values, seed=5) == mean_interval(values, seed=5)
        assert mean_interval(values, seed=5) != mean_interval(values, seed=6)


class TestPaired:
    @pytest.mark.parametrize("seed", range(5))
    def test_few_samples_are_counted_exactly(self, seed: int) -> None:
        differences = np.random.default_rng(seed).normal(0.4, 1, size=9)
        theirs = stats.permutation_test(
            (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
        )
        assert paired_difference(differences, np.zeros(9)).p == pytest.approx(theirs.pvalue)

    @pytest.mark.parametrize(("won", "lost"), [(9, 1), (5, 5), (6, 0), (25, 8), (0, 0)])
    def test_on_answers_it_is_mcnemar(self, won: int, lost: int) -> None:
        first = np.array([1] * won + [0] * lost + [1] * 20 + [0] * 7)
        second = np.array([0] * won + [1] * lost + [1] * 20 + [0] * 7)
        exact = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
        found = paired_difference(first, second)
        assert found.p == pytest.approx(exact, abs=0.002 if won + lost > 13 else 1e-12)
        assert found.mean == pytest.approx((won - lost) / len(first))

    def test_many_samples(self) -> None:
        rng = np.random.default_rng(7)
        first, second = rng.normal(0.12, 1, size=200), rng.normal(size=200)
        theirs = stats.ttest_rel(first, second).pvalue
        assert paired_difference(first, second).p == pytest.approx(theirs, abs=0.02)

    def test_chance_findings_are_as_rare_as_they_say(self) -> None:
        found = {"clusters": 0, "samples": 0}
        for seed in range(300):
            values, clusters = clustered(30, 4, seed)
            found["clusters"] += paired_difference(values, 0 * values, clusters, seed, 50, 999).p < 0.05
            found["samples"] += paired_difference(values, 0 * values, None, seed, 50, 999).p < 0.05
        assert 0.02 <= found["clusters"] / 300 <= 0.08
        assert found["samples"] / 300 > 0.2

    def test_answers_that_never_change_leave_room(self) -> None:
        same = paired_difference([1, 0, 1, 1], [1, 0, 1, 1], ["a", "a", "b", "c"], proportion=True)
        wilson = stats.binomtest(0, 3).proportion_ci(method="wilson").high
        assert (same.mean, same.low, same.high, same.p) == pytest.approx((0, -wilson, wilson, 1))

    def test_lengths_that_differ(self) -> None:
        with pytest.raises(CapaProbeError, match="3 and 2 values were given to a paired test"):
            paired_difference([1, 2, 3], [1, 2])
        with pytest.raises(CapaProbeError, match="2 values and 1 clusters were given"):
            mean_interval([1, 2], ["a"])

    def test_no_sample(self) -> None:
        assert math.isnan(sign_flip_p(np.zeros(0)))
        assert sign_flip_p(np.zeros(4)) == 1.0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_gap = holm([0.01, math.nan, 0.5, 0.6])
    assert with_gap[[0, 2, 3]].tolist() == pytest.approx([0.03, 1.0, 1.0])
    assert math.isnan(with_gap[1])
    assert holm([]).size == 0
