"""What a reward model is worth on comparisons that it was not trained on, by who made them.

Accuracy says how often it is right, calibration whether its probabilities mean what they say, and the correlation with
length whether it has learned anything else: a reward that follows length makes PPO write longer (Singhal et al. 2023,
arXiv 2310.03716).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from solon.measures.calibration import Calibration, flipped
from solon.measures.resampling import bootstrap
from solon.measures.statistics import Estimate, share
from solon.measures.texts import words
from solon.records import Comparison, fingerprint, text_of
from solon.reinforcement.reward_model import RewardModel


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
    prompts = [fingerprint("prompt", [m.model_dump() for m in c.prompt]) for c in comparisons]
    clusters = prompts if len(set(prompts)) < len(prompts) else None  # pairs of one prompt are not independent
    correct, longer, score, length = [], [], [], []
    for c, p, prompt in zip(comparisons, probabilities, prompts, strict=True):
        label = float(c.label or 0)
        calibration.add(c.id, p, label, prompt=prompt)
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
        "prompts": len(set(prompts)),
        "correct": correct,
        "right": share(correct, clusters).to_json(),  # an equal score counts half
        "longer_is_better": share(longer, clusters).to_json(),  # right, had it only counted words
        "length_correlation": rank_correlation(score, length, clusters).to_json(),
        "calibration": calibration.summary(),
    }


def _agrees(difference: float, right: bool) -> float:
    return 0.5 if difference == 0 else float((difference > 0) == right)


def rank_correlation(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Spearman's rho, -1..1, with its 95 % interval over clusters. None where one of the two never varies."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)

    def rho(i: NDArray[np.int64]) -> float:
        if len(i) < 4 or np.ptp(x[i]) == 0 or np.ptp(y[i]) == 0:
            return math.nan
        return float(np.corrcoef(rankdata(x[i]), rankdata(y[i]))[0, 1])  # Spearman's

    return bootstrap(len(x), rho, clusters)
