"""A small part of the fuzz (`python -m benchmarks.fuzz` makes as many as are asked for), with seeds of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import fuzz


@pytest.mark.parametrize(
    ("one", "n"),
    [(fuzz.fuzz_data, 400), (fuzz.fuzz_recipe, 25), (fuzz.fuzz_constitution, 25)],
    ids=["data", "recipes", "constitutions"],
)
def test_whatever_is_given_is_accepted_or_one_line(
    one: Callable[[random.Random, Path], tuple[str, str]], n: int, tmp_path: Path
) -> None:
    for i in range(n):
        result, words = one(random.Random(f"suite-{i}"), tmp_path)
        assert result not in fuzz.BAD, words
