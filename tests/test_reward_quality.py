"""What a reward model is worth: clusters by prompt, equal scores count half, and no interval where none can be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from solon.records import Chat, Comparison, assistant, user
from solon.reinforcement.reward_quality import measure, rank_correlation


class Fixed:
    """A reward model with these probabilities for the chosen response."""

    def __init__(self, p: Sequence[float]) -> None:
        self.p = list(p)

    def unfit(self, chat: Chat) -> str:
        return ""

    def probabilities(self, comparisons: Sequence[Comparison]) -> list[float]:
        assert len(comparisons) == len(self.p)
        return self.p


def compared(i: int, prompt: str) -> Comparison:
    longer = ("one two three", "one") if i % 3 else ("one", "one two three")
    return Comparison(
        id=str(i), prompt=(user(prompt),), chosen=(assistant(longer[0]),), rejected=(assistant(longer[1]),), label=1.0,
        labeler="human",
    )  # fmt: skip


def measured(p: Sequence[float], prompts: Sequence[str]) -> dict[str, Any]:
    return measure(Fixed(p), [compared(i, prompt) for i, prompt in enumerate(prompts)])["human"]  # type: ignore[arg-type]


def test_equal_scores_count_half() -> None:
    found = measured([0.9, 0.5, 0.5, 0.1], "abcd")
    assert found["right"]["value"] == found["accuracy"] == found["calibration"]["accuracy"]["value"] == 0.5
    assert measured([0.5] * 8, "abcdefgh")["right"]["value"] == 0.5


def test_pairs_of_one_prompt_are_worth_one() -> None:
    rng = random.Random(0)
    p = [0.9 if rng.random() < 0.7 else 0.2 for _ in range(40)]
    one = measured(p, [str(i) for i in range(40)])
    many = measured([x for x in p for _ in range(5)], [str(i) for i in range(40) for _ in range(5)])
    for path in (("right",), ("calibration", "accuracy"), ("calibration", "brier")):
        a, b = one, many
        for key in path:
            a, b = a[key], b[key]
        assert b["high"] - b["low"] > 0.9 * (a["high"] - a["low"]), path
    assert many["n"] == 200 and many["prompts"] == many["right"]["clusters"] == 40


def test_the_interval_of_a_rank_correlation_is_as_wide_as_the_formula_has_it() -> None:
    rng, n = np.random.default_rng(1), 150
    x = rng.normal(size=n)
    found = rank_correlation(x.tolist(), (0.5 * x + rng.normal(size=n)).tolist())
    assert found.value is not None and found.low is not None and found.high is not None
    half = 1.96 * np.sqrt((1 + found.value**2 / 2) / (n - 3))  # Bonett and Wright 2000, on Fisher's scale
    assert np.arctanh(found.high) - np.arctanh(found.low) == pytest.approx(2 * half, rel=0.2)
    assert found.low < 6 / np.pi * np.arcsin(0.5 / np.sqrt(1.25) / 2) < found.high


def test_what_never_varies_has_no_correlation() -> None:
    assert rank_correlation([1, 1, 1, 1, 1], [1, 2, 3, 4, 5]).value is None
    assert rank_correlation([1, 2, 3], [1, 2, 3]).value is None
    assert rank_correlation([], []).value is None
    perfect = rank_correlation(range(10), range(10))
    assert perfect.value == pytest.approx(1) and perfect.low is None
