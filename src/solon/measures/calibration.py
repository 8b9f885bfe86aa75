"""Whether a judge's probabilities mean what they say, measured against people's choices.

A soft label of 0.8 should be right in eight of ten pairs: the reward model learns from the number, not only from
the side. Here stand accuracy and Cohen's kappa, the Brier score, log loss and calibration error of the labels, and
what one temperature would repair, fitted on one half of the prompts and measured on the other.

Left out: people's own uncertainty. A human label above 0.5 counts as a choice, one of exactly 0.5 is left out.
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

from solon.measures.statistics import NEAREST, TIE, Estimate, by_spread, difference, kappa, kappa_over, mean, share
from solon.records import fingerprint

Floats = NDArray[np.float64]

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
    """Takes in (judge's probability, people's label) pair by pair; 18 bytes a pair are kept."""

    def __init__(self) -> None:
        self._odds = array("d")  # log-odds of the judge that the first is better
        self._human = array("b")  # 1: people prefer the first
        self._prompt = array("q")  # which prompt, as a number: pairs of one prompt are not independent
        self._fit = array("b")  # 1: in the half that the temperature is fitted on
        self._people_tied = 0

    def add(self, pair_id: str, chosen: float, human: float, *, prompt: Any = None, odds: float | None = None) -> None:
        """chosen: P(chosen is better) of the judge, human: of people; both 0..1. odds: log-odds of the first, if known.

        prompt: what the pairs of one prompt share (None: the pair is alone). All of them are in the same half.
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
        prompts = _alone(self._prompt)
        right = _right(odds, human)
        confidence = expit(np.abs(odds))
        return {
            "n": len(odds),
            "people_tied": self._people_tied,
            "judge_tied": int((right == 0.5).sum()),
            "accuracy": share(right.tolist(), prompts).to_json(),  # a tie of the judge counts half
            "kappa": _kappa(odds, human, prompts).to_json(),  # ties of the judge left out
            **{name: found.to_json() for name, found in scores(odds, human, prompts).items()},
            "error_by_chance": error_by_chance(confidence),
            "overconfidence": mean((confidence - right).tolist(), prompts).to_json(),
            "bins": bins(confidence, right, prompts),
            "temperature": recalibration(odds, human, fit, prompts),
        }


def _alone(prompts: Sequence[int]) -> list[int] | None:
    """The prompts as clusters; None where none has two pairs."""
    return None if len(set(prompts)) == len(prompts) else list(prompts)


def _of(prompts: Sequence[int] | None, rows: NDArray[np.bool_]) -> list[int] | None:
    return None if prompts is None else [p for p, row in zip(prompts, rows, strict=True) if row]


def _kappa(odds: Floats, human: NDArray[np.bool_], prompts: Sequence[int] | None) -> Estimate:
    decided = _right(odds, human) != 0.5
    cells = np.where(odds[decided] > 0, 0, 2) + ~human[decided]  # of a table with a row an answer of the judge
    if prompts is None:
        return kappa(np.bincount(cells, minlength=4).reshape(2, 2).tolist())
    names, cluster = np.unique(np.array(_of(prompts, decided), dtype=np.int64), return_inverse=True)
    return kappa_over(np.bincount(4 * cluster + cells, minlength=4 * len(names)).reshape(-1, 2, 2))


def scores(odds: Floats, human: NDArray[np.bool_], prompts: Sequence[int] | None = None) -> dict[str, Estimate]:
    """Brier score, expected calibration error (both 0..1) and log loss (nats). odds (of the first), human: (n,)."""
    confidence = expit(np.abs(odds))
    return {
        "brier": mean(((expit(odds) - human) ** 2).tolist(), prompts),
        "calibration_error": calibration_error(confidence, _right(odds, human), prompts),
        "log_loss": mean(log_losses(odds, human).tolist(), prompts),
    }


def log_losses(odds: Floats, human: NDArray[np.bool_]) -> Floats:
    """Surprise at people's choice, in nats, (n,)."""
    return -log_expit(np.where(human, odds, -odds))


def _right(odds: Floats, human: NDArray[np.bool_]) -> Floats:
    """1 where the favoured side is people's, 0 where it is not, 0.5 where no side is favoured, (n,)."""
    return np.where(np.abs(odds) <= 4 * TIE, 0.5, (odds > 0) == human)  # around 0, log-odds are 4 (p - 0.5)


# --- calibration error ---------------------------------------------------------------------------------------


def _bin(confidence: Floats) -> NDArray[np.int64]:
    """Which bin each confidence of 0.5..1 is in, 0..BINS-1."""
    return np.minimum((confidence - 0.5) * 2 * BINS + TIE, BINS - 1).astype(np.int64)


def bins(confidence: Floats, right: Floats, prompts: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """The reliability diagram: mean confidence and share right (Wilson interval) of every bin that holds a pair."""
    index = _bin(confidence)
    return [
        {
            "low": 0.5 + b / (2 * BINS),
            "high": 0.5 + (b + 1) / (2 * BINS),
            "confidence": float(confidence[index == b].mean()),
            "right": share(right[index == b].tolist(), _of(prompts, index == b)).to_json(),
        }
        for b in np.unique(index).tolist()
    ]


def _error(gap: Floats, index: NDArray[np.int64], n: int) -> float:
    """Mean over n pairs of |mean confidence - share right| of their bin (Naeini et al. 2015). gap, index: a pair each."""
    return float(np.abs(np.bincount(index, gap)).sum() / n)


def calibration_error(
    confidence: Floats, right: Floats, prompts: Sequence[int] | None = None, n_resamples: int = 1000, seed: int = 0
) -> Estimate:
    """Expected calibration error over equal bins of the confidence, 0..0.5, with its 95 % interval over prompts.

    A resample scatters more than the sample and so has the larger error; of the resamples only the spread is used,
    not their level.
    """
    n = len(confidence)
    if n == 0:
        return Estimate(None, None, None, 0)
    gap, index, rng = confidence - right, _bin(confidence), np.random.default_rng(seed)
    cluster = np.arange(n) if prompts is None else np.unique(prompts, return_inverse=True)[1]
    clusters = int(cluster.max()) + 1
    drawn = []
    for _ in range(n_resamples if clusters > 1 else 0):
        times = np.bincount(rng.integers(0, clusters, clusters), minlength=clusters)[cluster]  # of each pair
        drawn.append(_error(gap * times, index, times.sum()))
    return by_spread(_error(gap, index, n), drawn, n, 0.0, 1.0)


def error_by_chance(confidence: Floats, n_draws: int = 1000, seed: int = 0) -> float | None:
    """The error that a perfectly calibrated judge of these confidences stays under in 95 of 100 samples this size.

    Calibration error is never below 0 and so never 0 on a finite sample (Bröcker and Smith 2007).
    """
    n, index, rng = len(confidence), _bin(confidence), np.random.default_rng(seed)
    if n == 0:
        return None
    drawn = [_error(confidence - (rng.random(n) < confidence), index, n) for _ in range(n_draws)]
    return float(np.percentile(drawn, 95))


# --- one temperature -----------------------------------------------------------------------------------------


def fit_temperature(odds: Floats, human: NDArray[np.bool_]) -> float:
    """What the log-odds are divided by for the least log loss; above 1: the judge was too sure (Guo et al. 2017)."""

    def loss(log_temperature: float) -> float:
        return float(log_losses(odds / math.exp(log_temperature), human).mean())

    low, high = TEMPERATURES
    return math.exp(minimize_scalar(loss, bounds=(math.log(low), math.log(high)), method="bounded").x)


def recalibration(
    odds: Floats, human: NDArray[np.bool_], fit: NDArray[np.bool_], prompts: Sequence[int] | None = None
) -> dict[str, Any] | None:
    """One temperature, fitted where `fit`, and what it does to the other pairs. None: too few of either."""
    if min(fit.sum(), (~fit).sum()) < LEAST:
        return None
    temperature = fit_temperature(odds[fit], human[fit])
    before, chose, others = odds[~fit], human[~fit], _of(prompts, ~fit)
    after = before / temperature
    saved = difference(log_losses(before, chose).tolist(), log_losses(after, chose).tolist(), others)
    return {
        "value": temperature,
        "at_bound": min(abs(math.log(temperature / bound)) for bound in TEMPERATURES) < 0.01,
        "n_fit": int(fit.sum()),
        "n": len(before),
        "before": {name: found.to_json() for name, found in scores(before, chose, others).items()},
        "after": {name: found.to_json() for name, found in scores(after, chose, others).items()},
        "log_loss_saved": saved.to_json(),
    }
