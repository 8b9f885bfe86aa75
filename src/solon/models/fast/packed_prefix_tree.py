"""Shared beginnings computed once: many rows of tokens as one tree, in one forward pass.

The questions put to a judge share almost all of their text: K principles in two orders are 2K rows that differ in
their last few tokens. Here rows are sorted, common beginnings found (nobody has to declare them), and the tree's
branches laid one after another into a single sequence without padding. Attention then lets each branch see its
own ancestors and itself: every distinct token is computed once, and the logits are those of the separate rows.

Any transformers model with plain causal attention works so, for the tree lives in the attention function alone
(`decoding.grouped_attention`) and in the position ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from solon.models.batching import common

# Tokens that meet their keys together. Fewer: less is wasted on keys that most of them do not see. More: larger products.
STRETCH = {"cpu": 256, "other": 512}


@dataclass
class Branch:
    """Tokens `depth` to `end` of the rows that pass through it, at `start` of the packed sequence."""

    start: int
    depth: int
    end: int
    parent: Branch | None

    @property
    def stop(self) -> int:
        return self.start + self.end - self.depth

    def path(self) -> list[tuple[int, int]]:
        """The packed spans from the tree's root down to this branch."""
        above = self.parent.path() if self.parent else []
        return [*above, (self.start, self.stop)] if self.stop > self.start else above


@dataclass
class Piece:
    """A stretch of a branch, or several short branches side by side. Packed indices."""

    first: int  # of the tokens in the family that it may see: where its branch, or the first of its branches, starts
    start: int
    stop: int
    mask: Tensor  # (stop - start, tokens of the past + stop - first): 0 where it sees, -inf where it does not


@dataclass
class Family:
    """Branches with the same parent, one after another in the packed sequence."""

    past: list[tuple[int, int]]  # packed spans of their ancestors
    start: int
    lengths: list[int]
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class PackedPrefixTree:
    """Rows with the first `skip` tokens left out, which all of them share."""

    skip: int
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    families: list[Family] = field(default_factory=list)
    ends: list[Branch] = field(default_factory=list)  # the branch each row ends in, in the order of the rows

    def at(self, row: int, index: int) -> int:
        """Where token `index` of a row stands in the packed sequence."""
        branch: Branch | None = self.ends[row]
        while branch is not None and branch.depth > index:
            branch = branch.parent
        assert branch is not None
        return branch.start + index - branch.depth

    def indices(self, row: int) -> np.ndarray:
        """Where the tokens of a row stand, from `skip` on."""
        branch: Branch | None = self.ends[row]
        found = []
        while branch is not None:
            found.append(np.arange(branch.start, branch.stop))
            branch = branch.parent
        return np.concatenate(found[::-1])


def build_tree(rows: Sequence[list[int]], shared: Sequence[int], skip: int) -> PackedPrefixTree:
    """The tree of sorted rows. shared[i]: length of the common beginning of rows i - 1 and i, at least `skip`."""
    tree = PackedPrefixTree(skip, ends=[None] * len(rows))  # type: ignore[list-item]
    waiting: list[tuple[Branch | None, int, int, int]] = [(None, 0, len(rows), skip)]
    for parent, low, high, depth in waiting:  # grows while it is walked: breadth first, so families stay together
        family = Family(parent.path() if parent else [], len(tree.ids), [])
        cuts = [low, *(i for i in range(low + 1, high) if shared[i] == depth), high]
        for a, b in pairwise(cuts):
            if len(rows[a]) == depth:  # this row ends where its parent does
                assert parent is not None
                tree.ends[a] = parent
                if b - a == 1:
                    continue
                raise AssertionError("rows must be sorted and distinct")
            end = min(shared[a + 1 : b], default=len(rows[a]))
            branch = Branch(len(tree.ids), depth, end, parent)
            tree.ids += rows[a][depth:end]
            tree.positions += range(depth, end)
            family.lengths.append(end - depth)
            if b - a == 1:
                tree.ends[a] = branch
            else:
                waiting.append((branch, a, b, end))
        if family.lengths:
            tree.families.append(family)
    return tree


def pack_rows(rows: Sequence[list[int]], skip: int = 0) -> tuple[PackedPrefixTree, list[int]]:
    """The rows, in any order and some of them equal, as a tree; and of each row, which of the tree's it is.

    skip: the first so many tokens, which all rows share and the tree leaves out.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    arrays = [np.asarray(rows[i]) for i in order]
    distinct: list[list[int]] = []
    shared: list[int] = []
    number = [0] * len(rows)
    for i, r in enumerate(order):
        alike = common(arrays[i - 1], arrays[i]) if i else skip
        if not i or not len(arrays[i]) == len(arrays[i - 1]) == alike:
            distinct.append(rows[r])
            shared.append(alike)
        number[r] = len(distinct) - 1
    return build_tree(distinct, shared, skip), number


# --- attention -----------------------------------------------------------------------------------------------


@dataclass
class _Active:
    """The tree of the forward pass that is under way."""

    tree: PackedPrefixTree
    past: int  # tokens before it, already in the cache
    cuts: list[int]  # lengths that keys and values are cut into, so that what each piece sees is whole cuts
    plain: bool

    def cut(self, x: Tensor) -> dict[int, tuple[Tensor, int]]:
        """By where it starts: a cut of x, (1, heads, length, d), and where the next one starts."""
        found, at = {}, 0
        for part in x.split(self.cuts, 2):
            found[at] = part, at + part.shape[2]
            at += part.shape[2]
        return found


_ACTIVE: ContextVar[_Active | None] = ContextVar("tree", default=None)


def active() -> bool:
    return _ACTIVE.get() is not None


def longest() -> int:
    """Tokens of the longest row of the tree that is laid out."""
    found = _ACTIVE.get()
    return max(found.tree.positions, default=-1) + 1 if found else 0


@contextmanager
def active_tree(tree: PackedPrefixTree, past: int, like: Tensor, learns: bool = False) -> Iterator[None]:
    """Inside, a forward pass over the tree's ids computes its rows.

    like: of the dtype and on the device of what will be attended to. learns: the pass is one that training repeats, and
    each time by the same arithmetic, gradients or not: PPO's first ratio is 1 because of that.
    """
    edges = {past, past + len(tree.ids)}
    for family in tree.families:
        family.pieces = [*_pieces(family, past + sum(b - a for a, b in family.past), like)]
        edges |= {past + x for span in family.past for x in span}
        edges |= {past + x for p in family.pieces for x in (p.first, p.stop)}
    cuts = [b - a for a, b in pairwise(sorted({0, *edges}))]
    token = _ACTIVE.set(_Active(tree, past, cuts, learns and like.device.type == "cpu"))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _pieces(family: Family, seen: int, like: Tensor) -> Iterator[Piece]:
    """seen: tokens before the family."""
    longest = STRETCH["cpu" if like.device.type == "cpu" else "other"]
    at, lengths = family.start, list(family.lengths)
    while lengths:
        side = [lengths.pop(0)]
        while lengths and sum(side) + lengths[0] <= longest:
            side.append(lengths.pop(0))
        total = sum(side)
        branch = torch.arange(len(side)).repeat_interleave(torch.tensor(side))
        for a in range(0, total, longest):
            b = min(a + longest, total)
            unseen = branch[a:b, None] != branch[None, :b]
            unseen |= torch.ones_like(unseen).triu(a + 1)
            mask = like.new_zeros(b - a, seen + b)
            mask[:, seen:].masked_fill_(unseen.to(like.device), float("-inf"))
            yield Piece(at, at + a, at + b, mask)
        at += total


def tree_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Each branch attends to the shared beginning, its ancestors and itself.

    query: (1, heads, n, d); key, value: (1, kv_heads, past + n, d). Returns (1, n, heads, d).
    """
    found = _ACTIVE.get()
    assert found is not None
    past, attend = found.past, _plainly if found.plain else _fused
    both = found.cut(key), found.cut(value)

    def between(spans: Sequence[tuple[int, int]]) -> list[list[Tensor]]:
        """Keys and values of the spans."""
        parts: list[list[Tensor]] = [[], []]
        for start, stop in spans:
            at = start
            while at < stop:
                for side, cuts in zip(parts, both, strict=True):
                    side.append(cuts[at][0])
                at = both[0][at][1]
        return parts

    out = []
    for family in found.tree.families:
        before = between([(0, past), *((a + past, b + past) for a, b in family.past)])
        if len(before[0]) > 1:
            before = [[torch.cat(side, 2)] for side in before]
        for p in family.pieces:
            own = between([(p.first + past, p.stop + past)])
            keys, values = (torch.cat([*a, *b], 2) for a, b in zip(before, own, strict=True))
            out.append(attend(query[:, :, p.start : p.stop], keys, values, p.mask, scaling).transpose(1, 2))
    return torch.cat(out, 1)


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=gqa)


def _plainly(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """The textbook's three steps, whose backward pass is faster on a CPU than the fused one's. (1, heads, n, d)."""
    _, heads, n, d = query.shape
    grouped = query.reshape(1, key.shape[1], -1, d)
    scores = torch.matmul(grouped, key.transpose(2, 3)).view(1, heads, n, -1) * scaling + mask
    weights = scores.softmax(-1).view(1, key.shape[1], -1, key.shape[2])
    return torch.matmul(weights, value).view(1, heads, n, d)
