"""Means with intervals, and paired tests, over samples that may share an image.

Questions about one image are not independent, so that the unit of resampling is the *cluster*: all samples of one
image.

- Interval of a mean: the percentile interval of the cluster bootstrap, which draws clusters with replacement and takes
  the mean of their samples (Field and Welsh 2007, "Bootstrapping clustered data"; Efron and Tibshirani 1993, ch. 13).
- Paired test: signs of the clusters' summed differences are flipped; under the hypothesis that the two conditions may
  be exchanged within an image, all sign patterns are equally likely (Fisher's randomisation test; for its use on
  benchmark scores see Dror et al. 2018, "The Hitchhiker's Guide to Testing Statistical Significance in NLP"). With few
  clusters that differ all patterns are counted. On 0/1 scores with one sample per image that is exact McNemar.
- Several tests of one table: Holm's correction (1979).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest

from capa_probe.errors import CapaProbeError

Array = npt.NDArray[np.float64]

#: Resamples of a bootstrap, and sign patterns of a test; so the smallest p-value that can be found is 1/10,000.
RESAMPLES, FLIPS = 2000, 9999
#: Up to so many clusters that differ, all 2^n sign patterns are counted.
EXACT = 13
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and where it may lie.

    Attributes:
        mean: over all samples.
        low: lower end of the 95 % interval.
        high: upper end.
        n: samples; those without a value (NaN) are left out.
        n_clusters: images they belong to.
    """

    mean: float
    low: float
    high: float
    n: int
    n_clusters: int


@dataclass(frozen=True)
class Paired(Interval):
    """A mean difference between two conditions on the same samples.

    Attributes:
        p: two-sided p-value of the hypothesis that the conditions may be exchanged; NaN without samples.
    """

    p: float


def mean_interval(
    values: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    proportion: bool = True,
) -> Interval:
    """Mean with its 95 % percentile interval under the cluster bootstrap.

    Where all values are equal a bootstrap has no width. If they are all 0 or all 1, Wilson's interval of a proportion
    is given instead, over the clusters (which understates rather than overstates what is known).

    Args:
        values: (sample,) numbers; NaN where a sample has none.
        clusters: (sample,) anything that samples of one image share; None takes each sample for itself.
        seed: of the resampling.
        resamples: how often clusters are drawn.
        proportion: False for a measure that may well be 0 or 1 for all samples without being a proportion.

    Returns:
        NaN and n = 0 where there is no value; NaN for the ends where there is but one cluster.
    """
    sums, sizes = _per_cluster(values, clusters)
    n, k = int(sizes.sum()), len(sums)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0, 0)
    mean = float(sums.sum() / n)
    if proportion and mean in (0.0, 1.0) and bool((sums == mean * sizes).all()):
        ends = binomtest(round(mean * k), k).proportion_ci(LEVEL, method="wilson")
        return Interval(mean, float(ends.low), float(ends.high), n, k)
    if k == 1:  # nothing to resample
        return Interval(mean, math.nan, math.nan, n, k)
    drawn = _draws(k, resamples, seed)
    low, high = np.quantile((drawn @ sums) / (drawn @ sizes), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), n, k)


def paired_difference(
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    clusters: npt.ArrayLike | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    flips: int = FLIPS,
    proportion: bool = False,
) -> Paired:
    """Mean of ``first - second`` over the same samples, with its interval and the p-value of the sign-flip test.

    The statistic is the absolute sum of the differences. With more than 13 clusters that differ, p is
    ``(1 + extreme) / (1 + flips)`` over random sign patterns, which never is 0 (Phipson and Smyth 2010).

    Where all differences are equal a bootstrap has no width. Of 0/1 scores that are the same under both conditions for
    every sample, the interval is from -w to w, with w the upper end of Wilson's interval for no change in any cluster.

    Args:
        first: (sample,) numbers under one condition; NaN where a sample has none.
        second: (sample,) under the other.
        clusters: as for :func:`mean_interval`.
        seed: of the resampling.
        resamples: of the interval.
        flips: sign patterns of the test.
        proportion: the numbers are 0/1 scores.

    Raises:
        CapaProbeError: the two are not of one length.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise CapaProbeError(
            f"{a.size} and {b.size} values were given to a paired test; give one of each per sample."
        )
    differences = a - b
    interval = mean_interval(differences, clusters, seed, resamples, proportion=False)
    sums, _ = _per_cluster(differences, clusters)
    if proportion and len(sums) and not np.nan_to_num(differences).any():
        ends = binomtest(0, len(sums)).proportion_ci(LEVEL, method="wilson")
        interval = replace(interval, low=-float(ends.high), high=float(ends.high))
    return Paired(**vars(interval), p=sign_flip_p(sums, seed, flips))


def sign_flip_p(sums: Array, seed: int = 0, flips: int = FLIPS) -> float:
    """Two-sided p-value of the sign-flip test on the clusters' summed differences: (cluster,) numbers."""
    if len(sums) == 0:
        return math.nan
    differ = sums[sums != 0]
    k = len(differ)
    if k == 0:
        return 1.0
    # Equal up to rounding counts as extreme.
    observed = abs(sums.sum()) - 1e-6 * np.abs(sums).sum()
    if k <= EXACT:
        patterns = 1.0 - 2.0 * ((np.arange(2**k)[:, None] >> np.arange(k)) & 1)
        return float((np.abs(patterns @ differ) >= observed).mean())
    extreme = int((np.abs(_signs(len(sums), flips, seed) @ sums) >= observed).sum())
    return (1 + extreme) / (1 + flips)


def holm(p: npt.ArrayLike) -> Array:
    """Holm's correction of several p-values, so that the chance of any false finding among them stays below the level.

    ``p_(i)`` in rising order becomes ``max over j <= i of min(1, (m - j + 1) p_(j))``.

    Args:
        p: (test,) p-values; NaN where there was no test, which stays and does not count.
    """
    given = np.asarray(p, dtype=np.float64)
    adjusted = np.full(given.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(given))
    order = tested[np.argsort(given[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(factors * given[order]))
    return adjusted


def _per_cluster(values: npt.ArrayLike, clusters: npt.ArrayLike | None) -> tuple[Array, Array]:
    """Sum and number of the values of each cluster, in order of first appearance."""
    numbers = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(numbers)
    if clusters is None:
        return numbers[there], np.ones(int(there.sum()))
    keys: Any = np.asarray(clusters, dtype=object)
    if keys.shape != numbers.shape:
        raise CapaProbeError(
            f"{numbers.size} values and {keys.size} clusters were given; give one cluster per value."
        )
    codes, _ = pd.factorize(keys[there])
    n = int(codes.max()) + 1 if len(codes) else 0
    return (
        np.bincount(codes, numbers[there], minlength=n).astype(np.float64),
        np.bincount(codes, minlength=n).astype(np.float64),
    )


@lru_cache(maxsize=8)
def _draws(k: int, resamples: int, seed: int) -> npt.NDArray[np.float32]:
    """How often each of ``k`` clusters is drawn: (resample, cluster)."""
    rng = np.random.default_rng([seed, k])
    return rng.multinomial(k, np.full(k, 1 / k), size=resamples).astype(np.float32)


@lru_cache(maxsize=8)
def _signs(k: int, flips: int, seed: int) -> npt.NDArray[np.float32]:
    """Random signs: (flip, cluster)."""
    rng = np.random.default_rng([seed, k, 1])
    return (1 - 2 * rng.integers(0, 2, size=(flips, k), dtype=np.int8)).astype(np.float32)
