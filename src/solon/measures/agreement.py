"""Cohen's kappa: how far two raters agree beyond chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from statsmodels.stats.inter_rater import cohens_kappa

from solon.measures.resampling import bca
from solon.measures.statistics import RESAMPLES, Estimate, Floats


def kappa(table: Sequence[Sequence[int]]) -> Estimate:
    """Cohen's kappa with its interval. table: (k, k) counts, a row per answer of one rater, a column per answer of the other.

    Value None where both always give one and the same answer, as chance alone would agree too. No interval where
    they never disagree or where n is below 2.
    """
    counts = np.asarray(table, dtype=np.float64)
    n = int(counts.sum())
    used = max(np.count_nonzero(counts.sum(axis=0)), np.count_nonzero(counts.sum(axis=1)))
    if n == 0 or (used < 2 and np.trace(counts) == n):
        return Estimate(None, None, None, n)
    with np.errstate(invalid="ignore"):  # its p-value is not used
        result = cohens_kappa(counts)  # at 95 %
    value, low, high = float(result.kappa), float(result.kappa_low), float(result.kappa_upp)
    if n < 2 or not high - low > 1e-12:
        return Estimate(value, None, None, n)
    return Estimate(value, max(-1.0, low), min(1.0, high), n)


def clustered_kappa(tables: NDArray[Any]) -> Estimate:
    """Cohen's kappa of two raters with two answers, with its BCa interval over clusters. tables: (clusters, 2, 2)."""
    a, b, c, d = cells = [tables[:, i, j].astype(np.float64) for i in (0, 1) for j in (0, 1)]
    n, clusters = int(tables.sum()), len(tables)
    value = float(_kappas(a, b, c, d)) if n else math.nan
    options = {"paired": True, "vectorized": True, "batch": max(1, 1_000_000 // max(1, clusters))}
    return bca(Estimate(value, None, None, n, clusters), cells, _kappas, clusters, n_resamples=RESAMPLES, **options)


def _kappas(a: Floats, b: Floats, c: Floats, d: Floats, axis: int = -1) -> Floats:
    """Kappa of 2 x 2 tables [[a, b], [c, d]], each given by clusters along the axis; nan where chance agrees too."""
    a, b, c, d = (x.sum(axis=axis) for x in (a, b, c, d))
    with np.errstate(divide="ignore", invalid="ignore"):
        n = a + b + c + d
        by_chance = ((a + b) * (a + c) + (c + d) * (b + d)) / n**2
        return ((a + d) / n - by_chance) / np.where(by_chance < 1, 1 - by_chance, np.nan)
