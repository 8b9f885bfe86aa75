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
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from solon.engines.lean import lean

# Tokens that meet their keys together. Fewer: less is wasted on keys that most of them do not see, and the weights stay
# in a CPU's cache. More: larger products.
STRETCH = {"cpu": 160, "other": 512}


@dataclass(frozen=True)
class Row:
    """Token ids, of which those from `first` on are asked for what comes after them. 0 <= first < len(ids)."""

    ids: list[int]
    first: int


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
    """A stretch of a branch, or several short branches side by side. Packed places."""

    first: int  # of the tokens in the family that it may see: where its branch, or the first of its branches, starts
    start: int
    stop: int
    hidden: Tensor  # (stop - start, 1, stop - start): 0 where a token sees that of its own, the column; -inf elsewhere


@dataclass
class Family:
    """Branches with the same parent, one after another in the packed sequence."""

    past: list[tuple[int, int]]  # packed spans of their ancestors
    start: int
    lengths: list[int]
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Tree:
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


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning."""
    n = min(len(a), len(b))
    differs = np.nonzero(a[:n] != b[:n])[0]
    return int(differs[0]) if len(differs) else n


def grow(rows: Sequence[list[int]], shared: Sequence[int], skip: int) -> Tree:
    """The tree of sorted rows. shared[i]: length of the common beginning of rows i - 1 and i, at least `skip`."""
    tree = Tree(skip, ends=[None] * len(rows))  # type: ignore[list-item]
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


def packs(
    rows: Sequence[Row], order: Sequence[int], shared: Sequence[int], skip: int, tokens: int, reads: int
) -> Iterator[slice]:
    """Stretches of sorted rows of at most so many new tokens and asked positions, cut where least is shared."""
    low = 0
    while low < len(order):
        new = asked = 0
        done = [0]  # new tokens before each row of the stretch
        high = low
        while high < len(order):
            row = rows[order[high]]
            new += len(row.ids) - (shared[high] if high > low else skip)
            asked += len(row.ids) - row.first
            if high > low and (new > tokens or asked > reads):
                break
            done.append(new)
            high += 1
        if high < len(order):
            # Cut where the next stretch repeats least for what this one gets done; the latest of equals.
            high = min(range(high, low, -1), key=lambda i: (shared[i] - skip) / done[i - low])
        yield slice(low, high)
        low = high


# --- attention -----------------------------------------------------------------------------------------------

_TREE: ContextVar[tuple[Tree, int] | None] = ContextVar("tree", default=None)


def active() -> bool:
    return _TREE.get() is not None


@contextmanager
def _laid_out(tree: Tree, past: int, device: torch.device) -> Iterator[None]:
    for family in tree.families:
        family.pieces = [*_pieces(family, device)]
    token = _TREE.set((tree, past))
    try:
        yield
    finally:
        _TREE.reset(token)


def _pieces(family: Family, device: torch.device) -> Iterator[Piece]:
    longest = STRETCH["cpu" if device.type == "cpu" else "other"]
    at, lengths = family.start, list(family.lengths)
    while lengths:
        if lengths[0] > longest:
            length = lengths.pop(0)
            for a in range(at, at + length, longest):
                b = min(a + longest, at + length)
                yield Piece(at, a, b, _hidden(torch.zeros(b - a, dtype=torch.long)).to(device))
            at += length
            continue
        side: list[int] = []
        while lengths and sum(side) + lengths[0] <= longest:
            side.append(lengths.pop(0))
        branch = torch.arange(len(side)).repeat_interleave(torch.tensor(side))
        yield Piece(at, at, at + sum(side), _hidden(branch).to(device))
        at += sum(side)


def _hidden(branch: Tensor) -> Tensor:
    """What is added to the weights of tokens side by side, of which branch names the branch, (n,) → (n, 1, n)."""
    unseen = branch[:, None] != branch[None, :]
    unseen |= torch.ones_like(unseen).triu(1)
    return torch.zeros(unseen.shape).masked_fill_(unseen, float("-inf")).unsqueeze(1)


def tree_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Each branch attends to the shared beginning, its ancestors and itself: as transformers asks for it.

    query: (1, heads, n, d); key, value: (1, kv_heads, past + n, d). Returns (1, n, heads, d).
    """
    found = _TREE.get()
    assert found is not None
    q = (query[0] * scaling).unflatten(0, (key.shape[1], -1)).transpose(1, 2)
    return _of_tree(*found, q, key[0], value[0]).flatten(1, 2).unsqueeze(0)


def _of_tree(tree: Tree, past: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: (kv_heads, n, groups, d), scaled; k, v: (kv_heads, past + n, d). Returns (n, kv_heads, groups, d)."""
    kv_heads, n, groups, _ = q.shape
    q = q.flatten(1, 2)  # query heads of the same kv head side by side, to meet its keys in one product
    out = q.new_empty(kv_heads, n * groups, v.shape[-1])
    # One kv head after another on a CPU, where a batch of three would take two threads two rounds.
    heads: list[Any] = [*range(kv_heads)] if k.device.type == "cpu" else [slice(None)]
    for family in tree.families:
        spans = [(0, past)] * (past > 0) + [(a + past, b + past) for a, b in family.past]
        seen_k, seen_v = (torch.cat([x[:, a:b] for a, b in spans], 1) if spans else x[:, :0] for x in (k, v))
        for p in family.pieces:
            rows, own = slice(p.start * groups, p.stop * groups), slice(p.first + past, p.stop + past)
            for h in heads:
                _attend(q[h, ..., rows, :], k[h, ..., own, :], v[h, ..., own, :], seen_k[h], seen_v[h], p.hidden, out[h, ..., rows, :])  # fmt: skip
    return out.view(kv_heads, n, groups, -1).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen_k: Tensor, seen_v: Tensor, hidden: Tensor, out: Tensor) -> None:
    """Attention to what all of the tokens see and to their own, of which the last are hidden from some; into out.

    q, out: (…, n * groups, d), q scaled; k, v: (…, own, d), own >= n; seen_k, seen_v: (…, past, d); hidden: (n, 1, n).
    … is nothing, or the kv heads.
    """
    product = torch.mm if q.dim() == 2 else torch.bmm
    n, past = hidden.shape[0], seen_k.shape[-2]
    weights = q.new_empty(*q.shape[:-1], past + k.shape[-2])
    if past:
        product(q, seen_k.transpose(-1, -2), out=weights[..., :past])
    product(q, k.transpose(-1, -2), out=weights[..., past:])
    weights.view(*q.shape[:-2], n, -1, weights.shape[-1])[..., -n:].add_(hidden)
    weights = weights.softmax(-1, dtype=torch.float32).to(v.dtype)
    product(weights[..., past:], v, out=out)
    if past:
        out += product(weights[..., :past], seen_v)


# --- scoring -------------------------------------------------------------------------------------------------


class _Fixed(DynamicLayer):
    """Keys and values of the shared beginning, which every forward pass sees and none changes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


def _beginning(model: Any, ids: Sequence[int]) -> DynamicCache:
    """Keys and values of the shared beginning, computed once for all packs."""
    tokens = torch.tensor([list(ids)], device=model.device)
    made = model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values
    for n, layer in enumerate(made.layers):
        fixed = _Fixed()
        fixed.keys, fixed.values, fixed.is_initialized = layer.keys, layer.values, True
        fixed.dtype, fixed.device = layer.keys.dtype, layer.keys.device
        made.layers[n] = fixed
    return made


class TreeScorer:
    """Log-probabilities after the asked positions of many rows, each distinct token computed once."""

    def __init__(self, model: Any, *, tokens: int = 2048, reads: int = 512) -> None:
        """tokens, reads: new tokens and asked positions a forward pass may hold (a single row may be longer)."""
        self.model, self.tokens, self.reads = model, tokens, reads
        self.computed = 0  # tokens that went through the model so far
        self._lean = lean(model)
        self._kept: tuple[list[int], DynamicCache] | None = None

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], Tensor]]:
        """(indices into rows, their logits at the asked positions one after another, (positions, vocabulary)).

        Rows come in an order that suits the tree. Rows with the same tokens are computed once.
        """
        order = sorted(range(len(rows)), key=lambda i: rows[i].ids)
        arrays = [np.asarray(rows[i].ids) for i in order]
        shared = [0, *(common(a, b) for a, b in pairwise(arrays))]
        skip = min([*shared[1:], *(r.first for r in rows)], default=0) if len(rows) > 1 else 0
        cache = self._shared(rows[order[0]].ids[:skip]) if skip else None
        for part in packs(rows, order, shared, skip, self.tokens, self.reads):
            picked, lcp = order[part], shared[part]
            distinct: list[int] = []  # rows of the pack that are not the one before them again
            number: list[int] = []  # of each row of the pack, the distinct one it is
            for i, r in enumerate(picked):
                if i == 0 or not len(rows[r].ids) == len(rows[picked[i - 1]].ids) == lcp[i]:
                    distinct.append(i)
                number.append(len(distinct) - 1)
            tree = grow([rows[picked[i]].ids for i in distinct], [skip, *(lcp[i] for i in distinct[1:])], skip)
            asked = [
                (n, at) for n, r in zip(number, picked, strict=True) for at in range(rows[r].first, len(rows[r].ids))
            ]
            reads = [tree.at(n, at) for n, at in asked]
            self.computed += len(tree.ids)
            with _laid_out(tree, skip, self.model.device):
                logits = self._logits(tree, skip, cache, reads)
            yield picked, logits

    def _logits(self, tree: Tree, past: int, cache: DynamicCache | None, reads: list[int]) -> Tensor:
        """(reads, vocabulary)."""
        if self._lean is None:
            device = self.model.device
            return self.model(
                input_ids=torch.tensor([tree.ids], device=device),
                position_ids=torch.tensor([tree.positions], device=device),
                past_key_values=cache,
                use_cache=False,
                logits_to_keep=torch.tensor(reads, device=device),
            ).logits[0]

        def attend(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
            k, v = k.transpose(0, 1), v.transpose(0, 1)
            if cache is not None:
                kept: Any = cache.layers[block]
                k, v = torch.cat([kept.keys[0], k], 1), torch.cat([kept.values[0], v], 1)
            return _of_tree(tree, past, q.transpose(0, 1), k, v).flatten(1)

        return self._lean(tree.ids, tree.positions, attend, reads)

    def _shared(self, ids: list[int]) -> DynamicCache:
        if self._kept is None or self._kept[0] != ids:
            self._kept = ids, _beginning(self.model, ids)
            self.computed += len(ids)
        return self._kept[1]
