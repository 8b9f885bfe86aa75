"""Log-probabilities after many rows, each distinct token computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from solon.models.batching import Row, common
from solon.models.fast.llama_forward import find_llama_forward
from solon.models.fast.packed_prefix_tree import PackedPrefixTree, active_tree, pack_rows, tree_attention
from solon.models.forward import forward, trunk_of
from solon.models.head import head_of


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


class _Fixed(DynamicLayer):
    """Keys and values of the shared beginning, which every forward pass sees and none changes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


def _beginning(model: Any, ids: Sequence[int]) -> DynamicCache:
    """Keys and values of the shared beginning, computed once for all packs."""
    tokens = torch.tensor([list(ids)], device=model.device)
    made = DynamicCache()  # not the model's own kind: one with windows would forget
    forward(model, input_ids=tokens, past_key_values=made, use_cache=True, logits_to_keep=1)
    layers: list[Any] = list(made.layers)
    for n, layer in enumerate(layers):
        fixed = _Fixed()
        fixed.keys, fixed.values, fixed.is_initialized = layer.keys, layer.values, True
        fixed.dtype, fixed.device = layer.keys.dtype, layer.keys.device
        made.layers[n] = fixed
    return made


class TreeScorer:
    """Log-probabilities after the asked positions of many rows, each distinct token computed once."""

    def __init__(self, model: Any, *, tokens: int = 3072, reads: int = 512) -> None:
        """tokens, reads: new tokens and asked positions a forward pass may hold (a single row may be longer)."""
        self.model, self.tokens, self.reads = model, tokens, reads
        self.computed = 0  # tokens that went through the model so far
        self._lean = find_llama_forward(model)
        self._like = torch.empty(0, dtype=model.dtype, device=model.device)
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
            picked = order[part]
            tree, number = pack_rows([rows[r].ids for r in picked], skip)
            asked = [
                (n, at) for n, r in zip(number, picked, strict=True) for at in range(rows[r].first, len(rows[r].ids))
            ]
            reads = [tree.at(n, at) for n, at in asked]
            self.computed += len(tree.ids)
            with active_tree(tree, skip, self._like):
                logits = self._logits(tree, skip, cache, reads)
            yield picked, logits

    def _logits(self, tree: PackedPrefixTree, past: int, cache: DynamicCache | None, reads: list[int]) -> Tensor:
        """(reads, vocabulary), float32."""
        if self._lean is None:
            device = self.model.device
            states = forward(
                trunk_of(self.model)[1],
                input_ids=torch.tensor([tree.ids], device=device),
                position_ids=torch.tensor([tree.positions], device=device),
                past_key_values=cache,
                use_cache=False,
            ).last_hidden_state[0]
            return head_of(self.model)(states[torch.tensor(reads, device=device)])

        def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, block: int) -> Tensor:
            if cache is not None:
                kept: Any = cache.layers[block]
                k, v = torch.cat([kept.keys, k], 2), torch.cat([kept.values, v], 2)
            return tree_attention(q, k, v, scaling)

        return head_of(self.model)(self._lean.last_hidden_states(tree.ids, tree.positions, attend, reads))

    def _shared(self, ids: list[int]) -> DynamicCache:
        if self._kept is None or self._kept[0] != ids:
            self._kept = ids, _beginning(self.model, ids)
            self.computed += len(ids)
        return self._kept[1]
