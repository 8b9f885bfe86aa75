"""Rows of tokens, divided into parts that go through a model together. Tokens that rows begin with in common count once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Row:
    """Token ids. The model is asked what follows each token from index `first` on; 0 <= first < len(ids)."""

    ids: list[int]
    first: int


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two arrays."""
    n = min(len(a), len(b))
    differs = np.nonzero(a[:n] != b[:n])[0]
    return int(differs[0]) if len(differs) else n


def distinct_tokens(rows: Sequence[list[int]]) -> int:
    """The number of tokens in the rows. Tokens that several rows begin with count once."""
    arrays = [np.asarray(row) for row in sorted(rows)]
    return sum(map(len, arrays)) - sum(common_length(a, b) for a, b in pairwise(arrays))


def split_by_size(sizes: Sequence[int], limit: int) -> list[range]:
    """Consecutive indices in parts whose sizes add up to the limit at most. A single larger size is a part of its own."""
    cuts, total = [0], 0
    for i, size in enumerate(sizes):
        if total and total + size > limit:
            cuts.append(i)
            total = 0
        total += size
    return [range(start, stop) for start, stop in pairwise([*cuts, len(sizes)])] if sizes else []


def split_rows(rows: Sequence[list[int]], limit: int) -> list[list[int]]:
    """Indices of the rows, sorted by their ids, in parts of `limit` distinct tokens at most."""
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    arrays = [np.asarray(rows[i]) for i in order]
    sizes = [len(array) - (common_length(arrays[i - 1], array) if i else 0) for i, array in enumerate(arrays)]
    return [[order[i] for i in part] for part in split_by_size(sizes, limit)]
