"""Always the longer response: a control. Where a model's labels look like these, it judges length and nothing else."""

from __future__ import annotations

from solon.feedback.judge import Judge
from solon.measures.texts import words
from solon.records import Pair


class Longer(Judge):
    name = "longer"

    def first_log_odds(self, pair: Pair) -> float | None:
        first, second = map(words, pair.responses)
        return float((first > second) - (first < second)) * 3.0  # P = 0.95 where one is longer
