"""Rows of tokens cut into parts that go through a model together. What rows share counts once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np


@dataclass(frozen=True)
class Row:
    """Token ids, of which those from `first` on are asked for what comes after them. 0 <= first < len(ids)."""

    ids: list[int]
    first: int


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    differs = np.nonzero(a[:n] != b[:n])[0]
    return int(differs[0]) if len(differs) else n


def distinct_tokens(rows: Sequence[list[int]]) -> int:
    """How many tokens the rows have, those that several begin with counted once."""
    arrays = [np.asarray(row) for row in sorted(rows)]
    return sum(map(len, arrays)) - sum(common(a, b) for a, b in pairwise(arrays))


def split_by_size(sizes: Sequence[int], limit: int) -> list[range]:
    """Stretches whose sizes add up to the limit at most; each holds one at least."""
    if not sizes:
        return []
    cuts, total = [0], 0
    for i, size in enumerate(sizes):
        if total and total + size > limit:
            cuts.append(i)
            total = 0
        total += size
    return [range(a, b) for a, b in zip(cuts, chain(cuts[1:], [len(sizes)]), strict=True)]


def split_rows(rows: Sequence[list[int]], limit: int) -> list[list[int]]:
    """Indices of the rows in parts of at most so many distinct tokens, rows that begin alike side by side."""
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    arrays = [np.asarray(rows[i]) for i in order]
    sizes = [len(a) - (common(arrays[i - 1], a) if i else 0) for i, a in enumerate(arrays)]
    return [[order[i] for i in part] for part in split_by_size(sizes, limit)]
