"""Scores of many rows of tokens. Each distinct token is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from solon.models.batching import Row, common_length
from solon.models.fast.llama_forward import find_llama_forward
from solon.models.fast.packed_prefix_tree import PackedPrefixTree, active_tree, pack_rows, tree_attention
from solon.models.forward import forward, trunk_of
from solon.models.head import head_of


def packs(
    rows: Sequence[Row], order: Sequence[int], shared: Sequence[int], skip: int, tokens: int, reads: int
) -> Iterator[slice]:
    """Stretches of the sorted rows, each with at most `tokens` new tokens and `reads` positions to score.

    order: indices of the rows, sorted by their ids. shared[i]: common beginning of the sorted rows i - 1 and i. skip: tokens
    that all rows share. A single row may be longer than the limits.
    """
    low = 0
    while low < len(order):
        new = positions = 0
        new_before = [0]  # for each row of the stretch, the new tokens before it
        high = low
        while high < len(order):
            row = rows[order[high]]
            new += len(row.ids) - (shared[high] if high > low else skip)
            positions += len(row.ids) - row.first
            if high > low and (new > tokens or positions > reads):
                break
            new_before.append(new)
            high += 1
        if high < len(order):
            # Cut where the next stretch repeats the fewest tokens for each new token of this one; of equals, the last.
            high = min(range(high, low, -1), key=lambda i: (shared[i] - skip) / new_before[i - low])
        yield slice(low, high)
        low = high


class _FixedLayer(DynamicLayer):
    """Keys and values of the shared beginning. Every forward pass sees them, and none changes them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


class TreeScorer:
    """Logits at the positions to score of many rows. Each distinct token is computed once."""

    def __init__(self, model: Any, *, tokens: int = 3072, reads: int = 512) -> None:
        """tokens, reads: new tokens and positions to score in one forward pass at most (a single row may have more)."""
        self.model, self.tokens, self.reads = model, tokens, reads
        self.computed = 0  # tokens that went through the model so far
        self._llama = find_llama_forward(model)
        self._like = torch.empty(0, dtype=model.dtype, device=model.device)
        self._beginning: tuple[list[int], DynamicCache] | None = None

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row]) -> Iterator[tuple[list[int], Tensor]]:
        """(indices into rows, the logits of these rows one after another, (positions, vocabulary)).

        Rows come in an order that suits the tree.
        """
        order = sorted(range(len(rows)), key=lambda i: rows[i].ids)
        arrays = [np.asarray(rows[i].ids) for i in order]
        shared = [0, *(common_length(a, b) for a, b in pairwise(arrays))]
        skip = min([*shared[1:], *(row.first for row in rows)], default=0) if len(rows) > 1 else 0
        cache = self._shared_cache(rows[order[0]].ids[:skip]) if skip else None
        for part in packs(rows, order, shared, skip, self.tokens, self.reads):
            picked = order[part]
            tree, numbers = pack_rows([rows[i].ids for i in picked], skip)
            positions = [tree.indices(n)[rows[i].first - skip :] for n, i in zip(numbers, picked, strict=True)]
            self.computed += len(tree.ids)
            with active_tree(tree, skip, self._like):
                logits = self._logits(tree, cache, np.concatenate(positions).tolist())
            yield picked, logits

    def _logits(self, tree: PackedPrefixTree, cache: DynamicCache | None, reads: list[int]) -> Tensor:
        """(reads, vocabulary), float32."""
        if self._llama is None:
            device = self.model.device
            output = forward(
                trunk_of(self.model)[1],
                input_ids=torch.tensor([tree.ids], device=device),
                position_ids=torch.tensor([tree.positions], device=device),
                past_key_values=cache,
                use_cache=False,
            )
            return head_of(self.model)(output.last_hidden_state[0][torch.tensor(reads, device=device)])

        def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, block: int) -> Tensor:
            if cache is not None:
                k, v = cache.update(k, v, block)
            return tree_attention(q, k, v, scaling)

        return head_of(self.model)(self._llama.last_hidden_states(tree.ids, tree.positions, attend, reads))

    def _shared_cache(self, ids: list[int]) -> DynamicCache:
        """Keys and values of the shared beginning. They are kept for the next call."""
        if self._beginning is None or self._beginning[0] != ids:
            cache = DynamicCache()  # not the model's own kind: a cache with windows would forget tokens
            tokens = torch.tensor([ids], device=self.model.device)
            forward(self.model, input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            layers: list[Any] = list(cache.layers)
            for number, layer in enumerate(layers):
                fixed = _FixedLayer()
                fixed.keys, fixed.values, fixed.is_initialized = layer.keys, layer.values, True
                fixed.dtype, fixed.device = layer.keys.dtype, layer.keys.device
                cache.layers[number] = fixed
            self._beginning = ids, cache
            self.computed += len(ids)
        return self._beginning[1]
