"""Rows of tokens as one packed prefix tree: tokens that several rows begin with are computed once, and nothing is padded.

The questions put to a judge share almost all of their text: K principles in two orders are 2K rows that differ in their
last tokens. Here rows are sorted, common beginnings are found, and the branches of the tree are laid one after another into
one sequence. Attention lets each branch see its ancestors and itself, so the logits are those of the separate rows.

This works with any transformers model that has plain causal attention, because the tree lives only in the attention
function (`attention.grouped_attention`) and in the position ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from solon.models.batching import common_length
from solon.models.fast.llama_forward import find_llama_forward
from solon.models.forward import base_of
from solon.models.plain import Layout

Span = tuple[int, int]  # half-open
# Tokens that attend together. Fewer tokens waste less on keys that most of them do not see; more make larger products.
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

    def path(self) -> list[Span]:
        """The packed spans from the tree's root down to this branch."""
        above = self.parent.path() if self.parent else []
        return [*above, (self.start, self.stop)] if self.stop > self.start else above


@dataclass
class Piece:
    """A stretch of a branch, or several short branches side by side. The numbers are indices into the packed sequence."""

    first: int  # start of the first branch of which the piece holds tokens
    start: int
    stop: int
    mask: Tensor  # (stop - start, tokens of the past + stop - first): 0 where the token sees the key, -inf elsewhere


@dataclass
class Family:
    """Branches with the same parent, one after another in the packed sequence."""

    past: list[Span]  # packed spans of their ancestors
    start: int
    lengths: list[int] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class PackedPrefixTree:
    """Rows without their first `skip` tokens, which all of them share."""

    skip: int
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    families: list[Family] = field(default_factory=list)
    ends: list[Branch] = field(default_factory=list)  # for each row, the branch in which it ends

    def indices(self, row: int) -> np.ndarray:
        """Indices into the packed sequence of a row's tokens from `skip` on."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.ends[row].path()])


def build_tree(rows: Sequence[list[int]], shared: Sequence[int], skip: int) -> PackedPrefixTree:
    """The tree of sorted and distinct rows. shared[i]: common beginning of rows i - 1 and i, at least `skip` tokens."""
    tree = PackedPrefixTree(skip, ends=[None] * len(rows))  # type: ignore[list-item]
    waiting: list[tuple[Branch | None, int, int, int]] = [(None, 0, len(rows), skip)]
    for parent, low, high, depth in waiting:  # the list grows meanwhile: breadth first, so that families stay together
        family = Family(parent.path() if parent else [], len(tree.ids))
        cuts = [low, *(i for i in range(low + 1, high) if shared[i] == depth), high]
        for first, stop in pairwise(cuts):
            if len(rows[first]) == depth:  # this row ends where its parent does
                assert parent is not None and stop - first == 1, "rows must be sorted and distinct"
                tree.ends[first] = parent
                continue
            end = min(shared[first + 1 : stop], default=len(rows[first]))
            branch = Branch(len(tree.ids), depth, end, parent)
            tree.ids += rows[first][depth:end]
            tree.positions += range(depth, end)
            family.lengths.append(end - depth)
            if stop - first == 1:
                tree.ends[first] = branch
            else:
                waiting.append((branch, first, stop, end))
        if family.lengths:
            tree.families.append(family)
    return tree


def pack_rows(rows: Sequence[list[int]], skip: int = 0) -> tuple[PackedPrefixTree, list[int]]:
    """The tree of the distinct rows, and for each given row its number in the tree.

    rows: in any order; some may be equal. skip: number of first tokens that all rows share and the tree leaves out.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    arrays = [np.asarray(rows[i]) for i in order]
    distinct: list[list[int]] = []
    shared: list[int] = []
    numbers = [0] * len(rows)
    for i, row in enumerate(order):
        common = common_length(arrays[i - 1], arrays[i]) if i else skip
        if not i or not len(arrays[i]) == len(arrays[i - 1]) == common:
            distinct.append(rows[row])
            shared.append(common)
        numbers[row] = len(distinct) - 1
    return build_tree(distinct, shared, skip), numbers


class TreeLayout(Layout):
    """The rows of a batch as one tree."""

    def __init__(self, model: Any, rows: Sequence[list[int]]) -> None:
        self.device = next(model.parameters()).device
        self.like = torch.empty(0, dtype=base_of(model).dtype, device=self.device)
        self.tree, numbers = pack_rows(rows)
        self.indices = [self.tree.indices(number) for number in numbers]
        self.ids = torch.tensor([self.tree.ids], device=self.device)
        self.positions = torch.tensor([self.tree.positions], device=self.device)
        self.mask = None

    def _around(self) -> AbstractContextManager[Any]:
        return active_tree(self.tree, 0, self.like, learns=True)

    def states_entering(self, model: Any, block: int) -> Tensor | None:
        """The states that enter this block, (tokens, width); None where the written-out pass does not compute the model.

        No block below this one may have adapters.
        """
        with model.disable_adapter():
            llama = find_llama_forward(base_of(model))
        if llama is None:
            return None
        with active_tree(self.tree, 0, self.like):
            return llama.hidden_states(
                self.ids[0], self.positions[0], lambda q, k, v, scaling, _: tree_attention(q, k, v, scaling), stop=block
            )


# --- attention -----------------------------------------------------------------------------------------------


@dataclass
class _ActiveTree:
    """The tree of the forward pass that is running."""

    tree: PackedPrefixTree
    past: int  # tokens before the tree, already in the cache
    cuts: list[int]  # lengths into which keys and values are cut, so that each piece sees whole cuts
    plain: bool

    def cut(self, keys: Tensor) -> dict[int, tuple[Tensor, int]]:
        """The cuts of keys or values, (1, heads, length, d), by their start; and with each the start of the next one."""
        cuts, start = {}, 0
        for part in keys.split(self.cuts, 2):
            cuts[start] = part, start + part.shape[2]
            start += part.shape[2]
        return cuts


_ACTIVE: ContextVar[_ActiveTree | None] = ContextVar("tree", default=None)


def is_active() -> bool:
    """Whether a forward pass over a tree is running."""
    return _ACTIVE.get() is not None


def longest_row() -> int:
    """Tokens of the longest row of the active tree; 0 where no tree is active."""
    active = _ACTIVE.get()
    return max(active.tree.positions, default=-1) + 1 if active else 0


@contextmanager
def active_tree(tree: PackedPrefixTree, past: int, like: Tensor, learns: bool = False) -> Iterator[None]:
    """Inside, a forward pass over the tree's ids computes its rows.

    past: tokens before the tree, already in the cache. like: an empty tensor of the model's dtype, on its device. learns:
    training repeats the pass, with gradients or without, and each time by the same arithmetic: PPO's first ratio must be 1.
    """
    edges = {0, past, past + len(tree.ids)}
    for family in tree.families:
        family.pieces = [*_pieces(family, past + sum(stop - start for start, stop in family.past), like)]
        edges |= {past + edge for span in family.past for edge in span}
        edges |= {past + edge for piece in family.pieces for edge in (piece.first, piece.stop)}
    cuts = [stop - start for start, stop in pairwise(sorted(edges))]
    token = _ACTIVE.set(_ActiveTree(tree, past, cuts, learns and like.device.type == "cpu"))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _pieces(family: Family, seen: int, like: Tensor) -> Iterator[Piece]:
    """The pieces of a family. seen: tokens before the family that all of its branches see."""
    longest = STRETCH["cpu" if like.device.type == "cpu" else "other"]
    first, lengths = family.start, list(family.lengths)
    while lengths:
        side = [lengths.pop(0)]
        while lengths and sum(side) + lengths[0] <= longest:
            side.append(lengths.pop(0))
        total = sum(side)
        branch = torch.arange(len(side)).repeat_interleave(torch.tensor(side))
        for start in range(0, total, longest):
            stop = min(start + longest, total)
            unseen = branch[start:stop, None] != branch[None, :stop]
            unseen |= torch.ones_like(unseen).triu(start + 1)
            mask = like.new_zeros(stop - start, seen + stop)
            mask[:, seen:].masked_fill_(unseen.to(like.device), float("-inf"))
            yield Piece(first, first + start, first + stop, mask)
        first += total


def tree_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention in which each branch sees the past, its ancestors and itself.

    query: (1, heads, n, d); key, value: (1, kv_heads, past + n, d). Returns (1, n, heads, d).
    """
    active = _ACTIVE.get()
    assert active is not None
    past, attend = active.past, plain_attention if active.plain else _fused_attention
    both = active.cut(key), active.cut(value)

    def select(spans: Sequence[Span]) -> list[list[Tensor]]:
        """The cuts of keys, and of values, within these spans."""
        sides: list[list[Tensor]] = [[], []]
        for side, cuts in zip(sides, both, strict=True):
            for start, stop in spans:
                while start < stop:
                    part, start = cuts[start]
                    side.append(part)
        return sides

    out = []
    for family in active.tree.families:
        before = select([(0, past), *((start + past, stop + past) for start, stop in family.past)])
        if len(before[0]) > 1:
            before = [[torch.cat(side, 2)] for side in before]
        for piece in family.pieces:
            sides = zip(before, select([(piece.first + past, piece.stop + past)]), strict=True)
            keys, values = (torch.cat([*past_cuts, *piece_cuts], 2) for past_cuts, piece_cuts in sides)
            part = attend(query[:, :, piece.start : piece.stop], keys, values, piece.mask, scaling)
            out.append(part.transpose(1, 2))
    return torch.cat(out, 1)


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=gqa)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """The textbook's three steps. On a CPU, forward and backward together are faster than those of the fused function.

    query: (batch, heads, n, d); key, value: (batch, kv_heads, k, d); mask, added to the scores, broadcasts to
    (batch, heads, n, k). Returns (batch, heads, n, d).
    """
    batch, heads, n, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    scores = torch.matmul(grouped, key.transpose(2, 3)).view(batch, heads, n, -1) * scaling + mask
    weights = scores.softmax(-1).view(batch, key.shape[1], -1, key.shape[2])
    return torch.matmul(weights, value).view(batch, heads, n, width)
