"""Whether a judge's probabilities mean what they say, measured against people's choices.

A soft label of 0.8 should be right in eight of ten pairs: the reward model learns from the number, not only from
the side. Here stand accuracy and Cohen's kappa, the Brier score, log loss and calibration error of the labels, and
what one temperature would repair, fitted on one half of the pairs and measured on the other.

Left out: people's own uncertainty. A human label above 0.5 counts as a choice, one of exactly 0.5 is left out.
"""

from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, logit

from solon.records import fingerprint
from solon.statistics import Estimate, by_spread, difference, kappa, mean, wilson

Floats = NDArray[np.float64]

TIE = 1e-9  # a probability this near to 0.5 prefers no side
NEAREST = 1e-6  # probabilities are held this far from 0 and 1, as the judge's own are; log loss stays finite
BINS = 10  # of the favoured side's confidence, 0.5..1: as fine as the usual 15 to 20 (Guo et al. 2017) over 0..1
TEMPERATURES = (0.05, 20.0)  # where one is looked for
LEAST = 20  # pairs in each half, or no temperature is fitted


def flipped(pair_id: str) -> bool:
    """Whether a pair is read with the rejected response as its first, decided by its id.

    `chosen` is what the judge favours. Read that way round it would always favour the first, and so would people
    in most pairs: kappa would count that as agreement by chance.
    """
    return int(fingerprint("side", pair_id), 16) % 2 == 1


class Calibration:
    """Takes in (judge's probability, people's label) pair by pair; 10 bytes a pair are kept."""

    def __init__(self) -> None:
        self._p = array("d")  # P(first is better) of the judge
        self._human = array("b")  # 1: people prefer the first
        self._fit = array("b")  # 1: in the half that the temperature is fitted on
        self._people_tied = 0

    def add(self, pair_id: str, chosen: float, human: float) -> None:
        """chosen: P(chosen is better) of the judge, human: of people; both 0..1."""
        if abs(human - 0.5) <= TIE:
            self._people_tied += 1
            return
        flip = flipped(pair_id)
        self._p.append(1 - chosen if flip else chosen)
        self._human.append((human > 0.5) != flip)
        self._fit.append(int(fingerprint("fit", pair_id), 16) % 2)

    def summary(self) -> dict[str, Any]:
        """Every measure with n and its 95 % interval, as plain JSON. Log loss and Brier score: smaller is better."""
        p, human, fit = np.array(self._p), np.array(self._human, dtype=bool), np.array(self._fit, dtype=bool)
        right = _right(p, human)
        confidence = np.maximum(p, 1 - p)
        decided = right != 0.5
        judged, chose = p[decided] > 0.5, human[decided]
        table = [[int(((judged == a) & (chose == b)).sum()) for b in (True, False)] for a in (True, False)]
        return {
            "n": len(p),
            "people_tied": self._people_tied,
            "judge_tied": int((~decided).sum()),
            "accuracy": wilson(float(right.sum()), len(p)).to_json(),  # a tie of the judge counts half
            "kappa": kappa(table).to_json(),  # ties of the judge left out
            **{name: found.to_json() for name, found in scores(p, human).items()},
            "error_by_chance": error_by_chance(confidence),
            "overconfidence": mean((confidence - right).tolist()).to_json(),
            "bins": bins(confidence, right),
            "temperature": recalibration(p, human, fit),
        }


def scores(p: Floats, human: NDArray[np.bool_]) -> dict[str, Estimate]:
    """Brier score, expected calibration error (both 0..1) and log loss (nats). p, human: (n,)."""
    return {
        "brier": mean(((p - human) ** 2).tolist()),
        "calibration_error": calibration_error(np.maximum(p, 1 - p), _right(p, human)),
        "log_loss": mean(log_losses(p, human).tolist()),
    }


def log_losses(p: Floats, human: NDArray[np.bool_]) -> Floats:
    """Surprise at people's choice, in nats, (n,)."""
    z = _log_odds(p)
    return -log_expit(np.where(human, z, -z))


def _log_odds(p: Floats) -> Floats:
    return logit(np.clip(p, NEAREST, 1 - NEAREST))


def _right(p: Floats, human: NDArray[np.bool_]) -> Floats:
    """1 where the favoured side is people's, 0 where it is not, 0.5 where no side is favoured, (n,)."""
    return np.where(np.abs(p - 0.5) <= TIE, 0.5, (p > 0.5) == human)


# --- calibration error ---------------------------------------------------------------------------------------


def _bin(confidence: Floats) -> NDArray[np.int64]:
    """Which bin each confidence of 0.5..1 is in, 0..BINS-1."""
    return np.minimum((confidence - 0.5) * 2 * BINS + TIE, BINS - 1).astype(np.int64)


def bins(confidence: Floats, right: Floats) -> list[dict[str, Any]]:
    """The reliability diagram: mean confidence and share right (Wilson interval) of every bin that holds a pair."""
    index = _bin(confidence)
    return [
        {
            "low": 0.5 + b / (2 * BINS),
            "high": 0.5 + (b + 1) / (2 * BINS),
            "confidence": float(confidence[index == b].mean()),
            "right": wilson(float(right[index == b].sum()), int((index == b).sum())).to_json(),
        }
        for b in np.unique(index).tolist()
    ]


def _error(gap: Floats, index: NDArray[np.int64]) -> float:
    """Mean over pairs of |mean confidence - share right| of their bin (Naeini et al. 2015). gap, index: (n,)."""
    return float(np.abs(np.bincount(index, gap)).sum() / len(gap))


def calibration_error(confidence: Floats, right: Floats, n_resamples: int = 1000, seed: int = 0) -> Estimate:
    """Expected calibration error over equal bins of the confidence, 0..0.5, with its 95 % interval.

    A resample scatters more than the sample and so has the larger error; of the resamples only the spread is used,
    not their level.
    """
    n = len(confidence)
    if n == 0:
        return Estimate(None, None, None, 0)
    gap, index = confidence - right, _bin(confidence)
    value, rng = _error(gap, index), np.random.default_rng(seed)
    if n == 1:
        return Estimate(value, None, None, 1)
    drawn = [_error(gap[i], index[i]) for i in (rng.integers(0, n, n) for _ in range(n_resamples))]
    return by_spread(value, drawn, n, 0.0, 1.0)


def error_by_chance(confidence: Floats, n_draws: int = 1000, seed: int = 0) -> float | None:
    """The error that a perfectly calibrated judge of these confidences stays under in 95 of 100 samples this size.

    Calibration error is never below 0 and so never 0 on a finite sample (Bröcker and Smith 2007).
    """
    n, index, rng = len(confidence), _bin(confidence), np.random.default_rng(seed)
    if n == 0:
        return None
    drawn = [_error(confidence - (rng.random(n) < confidence), index) for _ in range(n_draws)]
    return float(np.percentile(drawn, 95))


# --- one temperature -----------------------------------------------------------------------------------------


def fit_temperature(p: Floats, human: NDArray[np.bool_]) -> float:
    """What the log-odds are divided by for the least log loss; above 1: the judge was too sure (Guo et al. 2017)."""

    def loss(log_temperature: float) -> float:
        return float(log_losses(at_temperature(p, math.exp(log_temperature)), human).mean())

    low, high = TEMPERATURES
    return math.exp(minimize_scalar(loss, bounds=(math.log(low), math.log(high)), method="bounded").x)


def at_temperature(p: Floats, temperature: float) -> Floats:
    return expit(_log_odds(p) / temperature)


def recalibration(p: Floats, human: NDArray[np.bool_], fit: NDArray[np.bool_]) -> dict[str, Any] | None:
    """One temperature, fitted where `fit`, and what it does to the other pairs. None: too few of either."""
    if min(fit.sum(), (~fit).sum()) < LEAST:
        return None
    temperature = fit_temperature(p[fit], human[fit])
    before, chose = p[~fit], human[~fit]
    after = at_temperature(before, temperature)
    saved = difference(log_losses(before, chose).tolist(), log_losses(after, chose).tolist())
    return {
        "value": temperature,
        "at_bound": min(abs(math.log(temperature / bound)) for bound in TEMPERATURES) < 0.01,
        "n_fit": int(fit.sum()),
        "n": len(before),
        "before": {name: found.to_json() for name, found in scores(before, chose).items()},
        "after": {name: found.to_json() for name, found in scores(after, chose).items()},
        "log_loss_saved": saved.to_json(),
    }
