"""Every interval and every test that Solon reports, in one place.

An `Estimate` is a number with its 95 % interval and its sample size. Which function makes it:

| what is measured | function | interval |
|---|---|---|
| a share, one answer a unit | `wilson` | Wilson 1927, from statsmodels |
| a share, several answers a cluster (a prompt, a question) | `share` | Wilson at the effective sample size |
| a mean, with or without clusters | `mean` | studentised bootstrap over clusters |
| the mean of paired differences | `difference` | the same, of the differences |
| two independent shares | `difference_of_shares` | Newcombe 1998, from statsmodels |
| two shares of the same units | `paired_difference_of_shares` | Bonett and Price 2012 |
| agreement of two raters | `kappa` | Fleiss, Cohen and Everitt 1969, from statsmodels |
| the same, several answers a cluster | `kappa_over` | BCa (Efron 1987) over clusters, from scipy |
| any other number of the sample | `bootstrap` | BCa (Efron 1987) over clusters, from scipy |
| a number that resampling itself moves | `by_spread` | the spread of the resamples around their own mean |

An interval is None where the data cannot give one: no value, one value, values that are all the same. It is never a
point. `outcome` holds an interval against a target, `beyond_chance` several of them together. `p_above_zero`
tests a paired difference.

The studentised bootstrap is written here because scipy has none. On skewed data of 20 values its intervals hold the
mean in 92 to 95 % of samples, those of BCa in 88 to 92 % and of Student's t in 88 to 92 % (tests/test_statistics.py).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

Floats = NDArray[np.float64]
Side = Literal["above", "below"]
Outcome = Literal["holds", "does not hold", "cannot be told"]
HOLDS: Outcome = "holds"
FAILS: Outcome = "does not hold"
UNKNOWN: Outcome = "cannot be told"

CONFIDENCE = 0.95
NEAREST = 1e-6  # a probability without log-odds, of others or an old record, is held this far from 0 and 1
TIE = 1e-9  # a probability this near to 0.5 prefers no side: two orders that cancel come this close by rounding
RESAMPLES = 2000
MANY = 1000  # clusters from which a mean's interval is Student's t: the bootstrap's would be the same
Z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))


@dataclass(frozen=True)
class Estimate:
    """A number with its interval. None: not measured; for low and high: the data cannot tell."""

    value: float | None
    low: float | None
    high: float | None
    n: int  # what it was measured on: texts, values or pairs
    clusters: int | None = None  # independent groups (prompts, questions) that the n are in; None: each by itself

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            number = getattr(self, name)
            finite = number is not None and math.isfinite(number)
            object.__setattr__(self, name, float(number) if finite else None)

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"value": self.value, "low": self.low, "high": self.high, "n": self.n}
        return found if self.clusters is None else {**found, "clusters": self.clusters}

    def times(self, factor: float) -> Estimate:
        """In another unit, such as percent."""
        value, low, high = (None if x is None else factor * x for x in (self.value, self.low, self.high))
        if factor < 0:
            low, high = high, low
        return Estimate(value, low, high, self.n, self.clusters)


# --- decisions -----------------------------------------------------------------------------------------------


def outcome(value: float | None, low: float | None, high: float | None, target: float, direction: Side) -> Outcome:
    """Whether a measured number is above (or below) the target. The interval decides, not the value.

    "holds": the whole interval is on the right side of the target. "does not hold": the whole interval is on the
    wrong side, or the value is infinite on the wrong side. Otherwise, and without an interval: "cannot be told".
    An end that is exactly the target counts as not beyond it.
    """
    sign = 1.0 if direction == "above" else -1.0
    if value is not None and math.isinf(value) and sign * value < 0:
        return FAILS
    if value is None or low is None or high is None or not all(map(math.isfinite, (value, low, high))):
        return UNKNOWN
    worst, best = sorted((sign * (low - target), sign * (high - target)))
    return HOLDS if worst > 0 else FAILS if best < 0 else UNKNOWN


def beyond_chance(p_values: Sequence[float | None]) -> list[bool]:
    """Of each one-sided p-value whether it is beyond chance, all of them taken together. None (not known): no.

    Holm's steps with Šidák's levels: the chance of even one wrong "yes" stays at 2.5 %, which is what a 95 % interval
    allows on one side, for tests that are independent or lean the same way.
    """
    known = [p for p in p_values if p is not None]
    if not known:
        return [False] * len(p_values)
    with np.errstate(divide="ignore"):  # of a p-value of 1
        rejected = iter(multipletests(known, alpha=(1 - CONFIDENCE) / 2, method="holm-sidak")[0])
    return [p is not None and bool(next(rejected)) for p in p_values]


def p_beyond(found: Estimate, bound: float, side: Side) -> float | None:
    """One-sided p-value against "not beyond the bound", read off the interval: 0.025 where its end is the bound."""
    if found.value is None or found.low is None or found.high is None:
        return None
    end, sign = (found.low, 1.0) if side == "above" else (found.high, -1.0)
    width = sign * (found.value - end)
    if width <= 0:  # the value is its own end, as 0 of n is: the other side's width speaks
        width = found.high - found.low
    return float(stats.norm.sf(Z * sign * (found.value - bound) / width)) if width > 0 else None


def p_above_zero(differences: Sequence[float], seed: int = 0) -> float:
    """One-sided p-value that the mean of paired differences is above 0, by flipping their signs (Fisher 1935).

    It holds its level for any number of pairs whose two sides could have changed places, without any normal curve.
    1.0 where nothing differs or nothing is given.
    """
    x = np.asarray(differences, dtype=np.float64)
    if len(x) == 0 or not np.any(x):
        return 1.0
    found = stats.permutation_test(
        (x,), lambda v, axis: v.mean(axis=axis), permutation_type="samples", alternative="greater",
        n_resamples=9999, vectorized=True, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.pvalue)


# --- shares --------------------------------------------------------------------------------------------------


def wilson(successes: float, n: int, effective: float | None = None, clusters: int | None = None) -> Estimate:
    """A share with its Wilson interval: 0 of n is not [0, 0].

    successes: 0..n; a tie may count half. effective: the size of an independent sample that would say as much,
    where the n are not independent (Rao and Scott 1992); n where None.
    """
    if n == 0:
        return Estimate(None, None, None, 0, clusters)
    p, m = successes / n, effective or n
    low, high = proportion_confint(p * m, m, alpha=1 - CONFIDENCE, method="wilson")
    # At 0 and 1 the bound is the value itself; rounding may put it on the wrong side, and plots refuse that.
    return Estimate(p, max(0.0, min(p, low)), min(1.0, max(p, high)), n, clusters)


def preference(p: float) -> float:
    """1 where a probability prefers the first of two, 0 where the second, 0.5 where neither."""
    return 0.5 if abs(p - 0.5) <= TIE else float(p > 0.5)


def share(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of values of 0, 0.5 and 1 (no, equal, yes) as a share with its Wilson interval.

    clusters: which group each value is in, where values of one group are not independent.
    """
    if clusters is None:
        return wilson(float(sum(values)), len(values))
    found = Ratio()
    for total, n in _sums(values, clusters):
        found.add(total, n)
    return found.share()


def difference_of_shares(a: tuple[float, int], b: tuple[float, int]) -> Estimate:
    """Share a less share b of two independent samples, each (successes, n); n: of the smaller (Newcombe 1998)."""
    (yes_a, n_a), (yes_b, n_b) = a, b
    n = min(n_a, n_b)
    if n == 0:
        return Estimate(None, None, None, n)
    low, high = confint_proportions_2indep(yes_a, n_a, yes_b, n_b, method="newcomb", alpha=1 - CONFIDENCE)
    return Estimate(yes_a / n_a - yes_b / n_b, low, high, n)


def paired_difference_of_shares(only_a: int, only_b: int, n: int) -> Estimate:
    """Share of a less share of b among the same n: only_a of them have a alone, only_b have b alone.

    The interval is that of Bonett and Price 2012, which is not [0, 0] where all n agree.
    """
    if n == 0:
        return Estimate(None, None, None, 0)
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = Z * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    return Estimate((only_a - only_b) / n, max(-1.0, a - b - half), min(1.0, a - b + half), n)


# --- means ---------------------------------------------------------------------------------------------------


def mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None, seed: int = 0) -> Estimate:
    """The mean of values with its interval. clusters: which group each value is in; groups are drawn as a whole."""
    n = len(values)
    sums = np.array(_sums(values, range(n) if clusters is None else clusters), dtype=np.float64).reshape(-1, 2)
    groups = len(sums)
    named = None if clusters is None else groups
    if n == 0:
        return Estimate(None, None, None, 0, named)
    value, error = (float(x[0]) for x in _mean_and_error(sums[None]))
    if groups < 2 or not error > 1e-12 * max(1.0, abs(value)):  # constants, up to rounding
        return Estimate(value, None, None, n, named)
    if groups >= MANY:
        upper = float(stats.t.ppf(0.5 + CONFIDENCE / 2, groups - 1))
        return Estimate(value, value - upper * error, value + upper * error, n, named)
    low, high = _studentised(sums, seed)
    if not (math.isfinite(low) and math.isfinite(high)):  # all but a few values are the same: too little to go by
        return Estimate(value, None, None, n, named)
    return Estimate(value, value - high * error, value - low * error, n, named)


def difference(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable] | None = None, seed: int = 0
) -> Estimate:
    """Mean of a less mean of b with its interval, where a[i] and b[i] belong together; n is the number of pairs."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values cannot be paired with {len(b)}")
    return mean([x - y for x, y in zip(a, b, strict=True)], clusters, seed)


@dataclass
class Ratio:
    """A mean over answers where each cluster brings several, which are not independent of each other.

    It takes in cluster by cluster and keeps sums alone. The variance is that between clusters (Cochran 1977, ratio
    estimator), with Student's t at as many degrees of freedom as there are clusters, less one.
    """

    _closed: tuple[int, float, float, float, float, float] = (0, 0.0, 0.0, 0.0, 0.0, 0.0)
    _open: tuple[Hashable, float, int] | None = None  # the last cluster's name, total and n

    def add(self, total: float, n: int, cluster: Hashable = None) -> None:
        """A sum over n answers. Calls that follow each other with the same cluster belong to it; None: to none."""
        if not n:
            return
        if cluster is not None and self._open is not None and self._open[0] == cluster:
            total, n = total + self._open[1], n + self._open[2]
        else:
            self._closed = self._sums
        self._open = (cluster, total, n)

    @property
    def _sums(self) -> tuple[int, float, float, float, float, float]:
        """Over clusters: how many, n, total, and the sums of total², total · n and n²."""
        if self._open is None:
            return self._closed
        clusters, n, total, tt, tn, nn = self._closed
        _, more, m = self._open
        return clusters + 1, n + m, total + more, tt + more * more, tn + more * m, nn + m * m

    @property
    def clusters(self) -> int:
        return self._sums[0]

    @property
    def n(self) -> int:
        return round(self._sums[1])

    @property
    def total(self) -> float:
        return self._sums[2]

    def mean(self) -> Estimate:
        """Of any number. Clusters that are all alike give no interval."""
        clusters, n, total, *squares = self._sums
        if clusters < 2:
            return Estimate(total / n if n else None, None, None, self.n, clusters)
        value, error = total / n, math.sqrt(_variance(clusters, n, total, squares))
        if not error > 1e-9 * max(1.0, abs(value)):  # of sums of squares: rounding is larger than in `mean`
            return Estimate(value, None, None, self.n, clusters)
        half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, clusters - 1)) * error
        return Estimate(value, value - half, value + half, self.n, clusters)

    def share(self) -> Estimate:
        """Of a proportion (each total is a count up to its n): Wilson at the effective sample size."""
        clusters, n, total, tt, tn, nn = self._sums
        if clusters == n:
            return wilson(total, self.n, clusters=clusters)
        # How much less n answers say than n independent ones (Kish 1965). Two clusters of the mean size are added for
        # it, one all yes and one all no: near 0 and 1 the few clusters that differ would show too little variance.
        size = n / clusters
        more, yes = n + 2 * size, total + size
        variance = _variance(clusters + 2, more, yes, (tt + size**2, tn + size**2, nn + 2 * size**2))
        p = yes / more
        effective = n / max(1.0, variance / (p * (1 - p) / more))
        if clusters > 1:  # few clusters know little of their variance (Korn and Graubard 1998)
            effective *= (Z / float(stats.t.ppf(0.5 + CONFIDENCE / 2, clusters - 1))) ** 2
        return wilson(total, self.n, effective, clusters)


def _variance(groups: int, n: float, total: float, squares: Sequence[float]) -> float:
    """Of a mean of n answers in so many clusters, at least two. squares: sums of total², total · n and n²."""
    mean, (tt, tn, nn) = total / n, squares
    return max(0.0, tt - 2 * mean * tn + mean**2 * nn) / n**2 * groups / (groups - 1)


def _sums(values: Sequence[float], clusters: Sequence[Hashable]) -> list[tuple[float, int]]:
    """(sum, count) of each cluster, in the order of their first values."""
    if len(values) != len(clusters):
        raise ValueError(f"{len(values)} values with {len(clusters)} clusters")
    found: dict[Hashable, tuple[float, int]] = {}
    for value, name in zip(values, clusters, strict=True):
        total, n = found.get(name, (0.0, 0))
        found[name] = (total + float(value), n + 1)
    return list(found.values())


def _mean_and_error(sums: Floats) -> tuple[Floats, Floats]:
    """Mean and its standard error of samples of clusters. sums: (samples, clusters, 2), totals and counts; (samples,)."""
    totals, counts = sums[..., 0], sums[..., 1]
    groups, n = sums.shape[1], counts.sum(axis=1)
    value = totals.sum(axis=1) / n
    if groups < 2:
        return value, np.zeros_like(value)
    spread = ((totals - value[:, None] * counts) ** 2).sum(axis=1)
    return value, np.sqrt(spread * groups / (groups - 1)) / n


def _studentised(sums: Floats, seed: int) -> tuple[float, float]:
    """The percentiles of (resample's mean - mean) / resample's error. A resample without spread is infinitely far."""
    groups, rng = len(sums), np.random.default_rng(seed)
    value = float(_mean_and_error(sums[None])[0][0])
    means, errors = _mean_and_error(sums[rng.integers(0, groups, (RESAMPLES, groups))])
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = (means - value) / errors
    scaled = np.sort(np.where(np.isnan(scaled), 0.0, scaled))
    cut = int(RESAMPLES * (1 - CONFIDENCE) / 2)
    return float(scaled[cut]), float(scaled[-1 - cut])


# --- everything else -----------------------------------------------------------------------------------------


def bootstrap(
    n: int,
    statistic: Callable[[NDArray[np.int64]], float],
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES // 2,
    seed: int = 0,
) -> Estimate:
    """A statistic of n values with its BCa interval. statistic: of the values at these indices; nan where there is none.

    clusters: which group each value is in; groups are drawn as a whole.
    """
    rows: dict[Hashable, list[int]] = {}
    for i, name in enumerate(range(n) if clusters is None else clusters):
        rows.setdefault(name, []).append(i)
    groups = [np.array(r) for r in rows.values()]
    named = None if clusters is None else len(groups)
    value = float(statistic(np.arange(n))) if n else math.nan
    if len(groups) < 2 or math.isnan(value):
        return Estimate(value, None, None, n, named)

    def of(drawn: NDArray[np.int64]) -> float:
        return float(statistic(drawn if clusters is None else np.concatenate([groups[i] for i in drawn])))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where every resample is alike the ends are nan, which is told as None
        found = stats.bootstrap(
            (np.arange(len(groups)),), of, n_resamples=resamples, confidence_level=CONFIDENCE,
            method="BCa" if len(groups) < MANY else "percentile", vectorized=False, rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    if not (math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high):
        return Estimate(value, None, None, n, named)
    return Estimate(value, min(value, found.low), max(value, found.high), n, named)


def by_spread(value: float, resampled: Sequence[float], n: int, low: float, high: float) -> Estimate:
    """A number whose resamples scatter around another level than its own: only their spread is used.

    low, high: what the number cannot go beyond. No interval where the resamples are all alike or one has no number.
    """
    drawn = np.asarray(resampled, dtype=np.float64)
    if len(drawn) < 2 or np.isnan(drawn).any() or np.ptp(drawn) < 1e-12:
        return Estimate(value, None, None, n)
    tail = 50 * (1 - CONFIDENCE)
    below, above = np.percentile(drawn, (tail, 100 - tail)) - drawn.mean()
    return Estimate(value, max(low, value + float(below)), min(high, value + float(above)), n)


def _kappas(a: Floats, b: Floats, c: Floats, d: Floats, axis: int = -1) -> Floats:
    """Kappa of 2 x 2 tables [[a, b], [c, d]], each given by clusters along the axis; nan where chance agrees too."""
    a, b, c, d = (x.sum(axis=axis) for x in (a, b, c, d))
    with np.errstate(divide="ignore", invalid="ignore"):
        n = a + b + c + d
        by_chance = ((a + b) * (a + c) + (c + d) * (b + d)) / n**2
        return ((a + d) / n - by_chance) / np.where(by_chance < 1, 1 - by_chance, np.nan)


def kappa_over(tables: NDArray[Any]) -> Estimate:
    """Cohen's kappa of two raters with two answers, with its BCa interval over clusters. tables: (clusters, 2, 2)."""
    cells = [tables[:, i, j].astype(np.float64) for i in (0, 1) for j in (0, 1)]
    n, clusters = int(tables.sum()), len(tables)
    a, b, c, d = cells
    value = float(_kappas(a, b, c, d)) if n else math.nan
    if math.isnan(value) or clusters < 2:
        return Estimate(value, None, None, n, clusters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where every resample is alike the ends are nan, which is told as None
        found = stats.bootstrap(
            cells, _kappas, paired=True, vectorized=True, n_resamples=RESAMPLES, confidence_level=CONFIDENCE,
            batch=max(1, 1_000_000 // clusters), method="BCa" if clusters < MANY else "percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
    if not (math.isfinite(found.low) and math.isfinite(found.high) and found.low < found.high):
        return Estimate(value, None, None, n, clusters)
    return Estimate(value, min(value, found.low), max(value, found.high), n, clusters)


def kappa(table: Sequence[Sequence[int]]) -> Estimate:
    """Cohen's kappa with its interval. table: (k, k) counts, a row an answer of one rater, a column of the other.

    Value None where both always give one and the same answer, as chance alone would agree too. No interval where
    they never disagree or where n is below 2.
    """
    counts = np.asarray(table, dtype=np.float64)
    n = int(counts.sum())
    used = max(np.count_nonzero(counts.sum(axis=0)), np.count_nonzero(counts.sum(axis=1)))
    if n == 0 or (used < 2 and np.trace(counts) == n):
        return Estimate(None, None, None, n)
    with np.errstate(invalid="ignore"):  # of a p-value that is not used
        found = cohens_kappa(counts)  # at 95 %
    value, low, high = float(found.kappa), float(found.kappa_low), float(found.kappa_upp)
    if n < 2 or not high - low > 1e-12:
        return Estimate(value, None, None, n)
    return Estimate(value, max(-1.0, low), min(1.0, high), n)
