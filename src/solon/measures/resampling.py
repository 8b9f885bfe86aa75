"""Intervals and tests by resampling: the bootstrap of any statistic, and the permutation test of paired differences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from solon.measures.statistics import CONFIDENCE, MANY, RESAMPLES, Estimate


def bootstrap(
    n: int, statistic: Callable[[NDArray[np.int64]], float], clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """A statistic of n values with its BCa interval. statistic: of the values at these indices; nan where there is none.

    clusters: the group of each value; groups are drawn as a whole.
    """
    rows: dict[Hashable, list[int]] = {}
    for i, name in enumerate(range(n) if clusters is None else clusters):
        rows.setdefault(name, []).append(i)
    groups = [np.array(r) for r in rows.values()]
    value = float(statistic(np.arange(n))) if n else math.nan

    def of_groups(drawn: NDArray[np.int64]) -> float:
        return float(statistic(drawn if clusters is None else np.concatenate([groups[i] for i in drawn])))

    estimate = Estimate(value, None, None, n, None if clusters is None else len(groups))
    options = {"n_resamples": RESAMPLES // 2, "vectorized": False}
    return bca(estimate, (np.arange(len(groups)),), of_groups, len(groups), **options)


def bca(
    estimate: Estimate, data: Sequence[NDArray[Any]], statistic: Callable[..., Any], groups: int, **options: Any
) -> Estimate:
    """The estimate with its BCa interval over the groups, as scipy gives it; without one where scipy finds none.

    data: arrays of length `groups`. options: more arguments of scipy's bootstrap.
    """
    if groups < 2 or estimate.value is None:
        return estimate
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where all resamples are alike the ends are nan, and the interval is None
        interval = stats.bootstrap(
            data, statistic, confidence_level=CONFIDENCE, method="BCa" if groups < MANY else "percentile",
            rng=np.random.default_rng(0), **options,
        ).confidence_interval  # fmt: skip
    if not (math.isfinite(interval.low) and math.isfinite(interval.high) and interval.low < interval.high):
        return estimate
    value = estimate.value
    return Estimate(value, min(value, interval.low), max(value, interval.high), estimate.n, estimate.clusters)


def centred_interval(value: float, resampled: Sequence[float], n: int, low: float, high: float) -> Estimate:
    """A number whose resamples scatter around another level than the number: their percentiles around their own mean.

    low, high: limits of the number. No interval where the resamples are all alike or one of them is nan.
    """
    drawn = np.asarray(resampled, dtype=np.float64)
    if len(drawn) < 2 or np.isnan(drawn).any() or np.ptp(drawn) < 1e-12:
        return Estimate(value, None, None, n)
    tail = 50 * (1 - CONFIDENCE)
    below, above = np.percentile(drawn, (tail, 100 - tail)) - drawn.mean()
    return Estimate(value, max(low, value + float(below)), min(high, value + float(above)), n)


def p_above_zero(differences: Sequence[float]) -> float:
    """One-sided p-value that the mean of paired differences is above 0, by flipping their signs (Fisher 1935).

    The test holds its level for any number of pairs whose two sides could have changed places, without any normal curve.
    1.0 where nothing differs or nothing is given.
    """
    x = np.asarray(differences, dtype=np.float64)
    if len(x) == 0 or not np.any(x):
        return 1.0
    test = stats.permutation_test(
        (x,), lambda v, axis: v.mean(axis=axis), permutation_type="samples", alternative="greater",
        n_resamples=9999, vectorized=True, rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(test.pvalue)
