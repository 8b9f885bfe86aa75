"""How good a reward model is on comparisons that it was not trained on, for each source of labels.

Three measures: accuracy (how often it is right), calibration (whether its probabilities are true), and the correlation of its
scores with length. A reward that follows length makes PPO write longer responses (Singhal et al. 2023, arXiv 2310.03716).
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
    """For each source (ai, human) with labelled comparisons: the measures, each with n and its 95 % interval.

    Ties are left out. Comparisons that are too long for the reward model are left out too, and counted in `left_out`.
    """
    results = {}
    for source in ("human", "ai"):
        decided = [c for c in comparisons if c.labeler == source and c.label not in (None, 0.5)]
        readable = [c for c in decided if not any(rewards.unfit((*c.prompt, *side)) for side in (c.chosen, c.rejected))]
        if readable:
            measures = _measure_source(readable, rewards.probabilities(readable))
            results[source] = {**measures, "left_out": len(decided) - len(readable)}
    return results


def _measure_source(comparisons: Sequence[Comparison], probabilities: Sequence[float]) -> dict[str, Any]:
    """The measures on comparisons of one source. probabilities: P(chosen is better) by the reward model."""
    calibration = Calibration()
    prompts = [fingerprint("prompt", [m.model_dump() for m in c.prompt]) for c in comparisons]
    clusters = prompts if len(set(prompts)) < len(prompts) else None  # pairs of one prompt are not independent
    correct, longer, score, length = [], [], [], []
    for c, p, prompt in zip(comparisons, probabilities, prompts, strict=True):
        label = float(c.label or 0)
        calibration.add(c.id, p, label, prompt=prompt)
        difference = words(text_of(c.chosen)) - words(text_of(c.rejected))
        correct.append(_agreement(p - 0.5, label))
        longer.append(_agreement(difference, label))
        # The pair's id decides which side is first. With `chosen` first, the correlation would also measure how people
        # judge length.
        sign = -1 if flipped(c.id) else 1
        score.append(sign * (p - 0.5))
        length.append(sign * difference)
    return {
        "accuracy": sum(correct) / len(correct),
        "n": len(correct),
        "prompts": len(set(prompts)),
        "correct": correct,
        "right": share(correct, clusters).to_json(),
        "longer_is_better": share(longer, clusters).to_json(),  # accuracy of a rule that prefers the longer response
        "length_correlation": rank_correlation(score, length, clusters).to_json(),
        "calibration": calibration.summary(),
    }


def _agreement(difference: float, label: float) -> float:
    """1 where the difference prefers the same side as the label, 0 where it does not, 0.5 where it is 0."""
    return 0.5 if difference == 0 else float((difference > 0) == (label > 0.5))


def rank_correlation(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Spearman's rho, -1..1, with its 95 % interval over clusters. None where a or b has one value only."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)

    def rho(indices: NDArray[np.int64]) -> float:
        if len(indices) < 4 or np.ptp(x[indices]) == 0 or np.ptp(y[indices]) == 0:
            return math.nan
        return float(np.corrcoef(rankdata(x[indices]), rankdata(y[indices]))[0, 1])

    return bootstrap(len(x), rho, clusters)
