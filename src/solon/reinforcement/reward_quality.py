"""What a reward model is worth on comparisons that it was not trained on, by who made them.

Accuracy says how often it is right, calibration whether its probabilities mean what they say, and the correlation with
length whether it has learned anything else: a reward that follows length makes PPO write longer (Singhal et al. 2023,
arXiv 2310.03716).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from solon.evaluation.metrics import words
from solon.feedback.calibration import Calibration, flipped
from solon.records import Comparison, text_of
from solon.reinforcement.reward_model import RewardModel
from solon.statistics import Estimate, wilson


def measure(rewards: RewardModel, comparisons: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    """Of each source (ai, human) with labelled comparisons: every measure with n and its 95 % interval.

    Ties are left out, and comparisons that are too long for the reward model; `left_out` says how many of those.
    """
    found = {}
    for source in ("human", "ai"):
        asked = [c for c in comparisons if c.labeler == source and c.label not in (None, 0.5)]
        read = [c for c in asked if not any(rewards.unfit((*c.prompt, *side)) for side in (c.chosen, c.rejected))]
        if read:
            found[source] = {**_of_source(read, rewards.probabilities(read)), "left_out": len(asked) - len(read)}
    return found


def _of_source(comparisons: Sequence[Comparison], probabilities: Sequence[float]) -> dict[str, Any]:
    """probabilities: P(chosen is better), as the reward model sees it."""
    calibration = Calibration()
    correct, longer, score, length = [], [], [], []
    for c, p in zip(comparisons, probabilities, strict=True):
        label = float(c.label or 0)
        calibration.add(c.id, p, label)
        right = label > 0.5
        correct.append(_agrees(p - 0.5, right))
        difference = words(text_of(c.chosen)) - words(text_of(c.rejected))
        longer.append(_agrees(difference, right))
        # Read either way round by the pair's id: `chosen` alone would hold what people think of length as well.
        side = -1 if flipped(c.id) else 1
        score.append(side * (p - 0.5))
        length.append(side * difference)
    return {
        "accuracy": sum(correct) / len(correct),
        "n": len(correct),
        "correct": correct,
        "longer_is_better": wilson(sum(longer), len(longer)).to_json(),  # right, had it only counted words
        "length_correlation": rank_correlation(score, length).to_json(),
        "calibration": calibration.summary(),
    }


def _agrees(difference: float, right: bool) -> float:
    return 0.5 if difference == 0 else float((difference > 0) == right)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Spearman's rho, -1..1, with its 95 % interval (Bonett and Wright 2000). None where one of the two never varies."""
    n = len(a)
    if n < 4 or len(set(a)) == 1 or len(set(b)) == 1:
        return Estimate(None, None, None, n)
    rho = float(spearmanr(a, b).statistic)
    half = 1.96 * np.sqrt((1 + rho**2 / 2) / (n - 3))
    at = np.arctanh(np.clip(rho, -0.999999, 0.999999))
    return Estimate(rho, float(np.tanh(at - half)), float(np.tanh(at + half)), n)
