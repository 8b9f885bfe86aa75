"""Whether a judge's probabilities mean what they say, measured against people's choices.

A soft label of 0.8 should be right in eight of ten pairs: the reward model learns from the number, not only from
the side. `Calibration` measures accuracy and Cohen's kappa, the Brier score, log loss and calibration error of the
labels, and the gain of one temperature that is fitted on one half of the prompts and measured on the other.

People's own uncertainty is left out: a human label above 0.5 counts as a choice, a label of 0.5 is not counted.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, logit

from solon.measures.agreement import clustered_kappa, kappa
from solon.measures.resampling import centred_interval
from solon.measures.statistics import NEAREST, TIE, Estimate, difference, mean, share
from solon.records import fingerprint

Floats = NDArray[np.float64]

BINS = 10  # of the favoured side's confidence, 0.5..1: as fine as the usual 15 to 20 (Guo et al. 2017) over 0..1
TEMPERATURES = (0.05, 20.0)  # the range of the search
LEAST = 20  # pairs that each half needs for a temperature to be fitted
DRAWS = 1000  # resamples of a calibration error


def flipped(pair_id: str) -> bool:
    """Whether a pair is read with the rejected response as its first, decided by its id.

    The judge favours `chosen`. With `chosen` always first, judge and people would favour the first response in most
    pairs, and kappa would count that as agreement by chance.
    """
    return int(fingerprint("side", pair_id), 16) % 2 == 1


class Calibration:
    """Takes in (judge's probability, people's label) pair by pair, and keeps 18 bytes per pair."""

    def __init__(self) -> None:
        self._odds = array("d")  # log-odds of the judge that the first is better
        self._human = array("b")  # 1: people prefer the first
        self._prompt = array("q")  # the prompt as a number: pairs of one prompt are not independent
        self._fit = array("b")  # 1: in the half that the temperature is fitted on
        self._people_tied = 0

    def add(self, pair_id: str, chosen: float, human: float, *, prompt: Any = None, odds: float | None = None) -> None:
        """chosen: the judge's P(chosen is better), human: people's; both 0..1. odds: the judge's log-odds of the first.

        prompt: the same for all pairs of one prompt; they are in the same half. None: the pair has a prompt of its own.
        """
        if abs(human - 0.5) <= TIE:
            self._people_tied += 1
            return
        flip = flipped(pair_id)
        if odds is None:
            odds = float(logit(min(max(chosen, NEAREST), 1 - NEAREST)))
        key = fingerprint("fit", pair_id if prompt is None else prompt)
        self._odds.append(-odds if flip else odds)
        self._human.append((human > 0.5) != flip)
        self._prompt.append(int(key, 16) - 2**63)
        self._fit.append(int(key, 16) % 2)

    def summary(self) -> dict[str, Any]:
        """Every measure with n and its 95 % interval, as plain JSON. Log loss and Brier score: smaller is better."""
        odds, human, fit = np.array(self._odds), np.array(self._human, dtype=bool), np.array(self._fit, dtype=bool)
        prompts = None if len(set(self._prompt)) == len(self._prompt) else list(self._prompt)
        right = _right(odds, human)
        confidence = expit(np.abs(odds))
        return {
            "n": len(odds),
            "people_tied": self._people_tied,
            "judge_tied": int((right == 0.5).sum()),
            "accuracy": share(right.tolist(), prompts).to_json(),  # a tie of the judge counts half
            "kappa": _kappa(odds, human, prompts).to_json(),  # ties of the judge left out
            **{name: score.to_json() for name, score in scores(odds, human, prompts).items()},
            "error_by_chance": error_by_chance(confidence),
            "overconfidence": mean((confidence - right).tolist(), prompts).to_json(),
            "bins": bins(confidence, right, prompts),
            "temperature": recalibration(odds, human, fit, prompts),
        }


def _select(prompts: Sequence[int] | None, rows: NDArray[np.bool_]) -> list[int] | None:
    return None if prompts is None else [p for p, row in zip(prompts, rows, strict=True) if row]


def _kappa(odds: Floats, human: NDArray[np.bool_], prompts: Sequence[int] | None) -> Estimate:
    decided = _right(odds, human) != 0.5
    # in a table with a row per answer of the judge and a column per answer of people
    cells = np.where(odds[decided] > 0, 0, 2) + ~human[decided]
    if prompts is None:
        return kappa(np.bincount(cells, minlength=4).reshape(2, 2).tolist())
    names, cluster = np.unique(np.array(_select(prompts, decided), dtype=np.int64), return_inverse=True)
    return clustered_kappa(np.bincount(4 * cluster + cells, minlength=4 * len(names)).reshape(-1, 2, 2))


def scores(odds: Floats, human: NDArray[np.bool_], prompts: Sequence[int] | None = None) -> dict[str, Estimate]:
    """Brier score, expected calibration error (both 0..1) and log loss (nats). odds (of the first), human: (n,)."""
    confidence = expit(np.abs(odds))
    return {
        "brier": mean(((expit(odds) - human) ** 2).tolist(), prompts),
        "calibration_error": calibration_error(confidence, _right(odds, human), prompts),
        "log_loss": mean(log_losses(odds, human).tolist(), prompts),
    }


def log_losses(odds: Floats, human: NDArray[np.bool_]) -> Floats:
    """-log P(people's choice), in nats, (n,)."""
    return -log_expit(np.where(human, odds, -odds))


def _right(odds: Floats, human: NDArray[np.bool_]) -> Floats:
    """1 where judge and people favour the same side, 0 where they do not, 0.5 where the judge favours neither, (n,)."""
    return np.where(np.abs(odds) <= 4 * TIE, 0.5, (odds > 0) == human)  # around 0, log-odds are 4 (p - 0.5)


# --- calibration error ---------------------------------------------------------------------------------------


def _bin(confidence: Floats) -> NDArray[np.int64]:
    """The bin of each confidence of 0.5..1: 0..BINS-1."""
    return np.minimum((confidence - 0.5) * 2 * BINS + TIE, BINS - 1).astype(np.int64)


def bins(confidence: Floats, right: Floats, prompts: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """The reliability diagram: mean confidence and share right (Wilson interval) of every bin that holds a pair."""
    index = _bin(confidence)
    return [
        {
            "low": 0.5 + b / (2 * BINS),
            "high": 0.5 + (b + 1) / (2 * BINS),
            "confidence": float(confidence[index == b].mean()),
            "right": share(right[index == b].tolist(), _select(prompts, index == b)).to_json(),
        }
        for b in np.unique(index).tolist()
    ]


def _error(gap: Floats, index: NDArray[np.int64], n: int) -> float:
    """Mean over n pairs of |mean confidence - share right| of their bin (Naeini et al. 2015). gap, index: (n,)."""
    return float(np.abs(np.bincount(index, gap)).sum() / n)


def calibration_error(confidence: Floats, right: Floats, prompts: Sequence[int] | None = None) -> Estimate:
    """Expected calibration error over equal bins of the confidence, 0..0.5, with its 95 % interval over prompts.

    A resample scatters more than the sample and so has the larger error. Therefore the interval takes the percentiles
    of the resamples around their own mean.
    """
    n = len(confidence)
    if n == 0:
        return Estimate(None, None, None, 0)
    gap, index, rng = confidence - right, _bin(confidence), np.random.default_rng(0)
    cluster = np.arange(n) if prompts is None else np.unique(prompts, return_inverse=True)[1]
    clusters = int(cluster.max()) + 1
    drawn = []
    for _ in range(DRAWS if clusters > 1 else 0):
        times = np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)[cluster]  # per pair
        drawn.append(_error(gap * times, index, times.sum()))
    return centred_interval(_error(gap, index, n), drawn, n, 0.0, 1.0)


def error_by_chance(confidence: Floats) -> float | None:
    """The error that a perfectly calibrated judge with these confidences stays under in 95 of 100 samples this size.

    Calibration error is never below 0, so on a finite sample it is above 0 by chance (Bröcker and Smith 2007).
    """
    n, index, rng = len(confidence), _bin(confidence), np.random.default_rng(0)
    if n == 0:
        return None
    drawn = [_error(confidence - (rng.random(n) < confidence), index, n) for _ in range(DRAWS)]
    return float(np.percentile(drawn, 95))


# --- one temperature -----------------------------------------------------------------------------------------


def fit_temperature(odds: Floats, human: NDArray[np.bool_]) -> float:
    """The divisor of the log-odds with the least log loss; above 1: the judge was too sure (Guo et al. 2017)."""

    def loss(log_temperature: float) -> float:
        return float(log_losses(odds / math.exp(log_temperature), human).mean())

    low, high = TEMPERATURES
    return math.exp(minimize_scalar(loss, bounds=(math.log(low), math.log(high)), method="bounded").x)


def recalibration(
    odds: Floats, human: NDArray[np.bool_], fit: NDArray[np.bool_], prompts: Sequence[int] | None = None
) -> dict[str, Any] | None:
    """One temperature, fitted on the pairs in `fit`, and its effect on the other pairs. None: too few of either."""
    if min(fit.sum(), (~fit).sum()) < LEAST:
        return None
    temperature = fit_temperature(odds[fit], human[fit])
    before, chose, others = odds[~fit], human[~fit], _select(prompts, ~fit)
    after = before / temperature
    saved = difference(log_losses(before, chose).tolist(), log_losses(after, chose).tolist(), others)
    return {
        "value": temperature,
        "at_bound": min(abs(math.log(temperature / bound)) for bound in TEMPERATURES) < 0.01,
        "n_fit": int(fit.sum()),
        "n": len(before),
        "before": {name: score.to_json() for name, score in scores(before, chose, others).items()},
        "after": {name: score.to_json() for name, score in scores(after, chose, others).items()},
        "log_loss_saved": saved.to_json(),
    }
