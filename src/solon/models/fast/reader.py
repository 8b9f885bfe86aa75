"""Prompts that begin alike (a system message, shown examples, one prompt many times) are read as one packed prefix tree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from solon import distributed
from solon.models.batching import split_rows
from solon.models.fast.attention import NotUnderstood, last_token
from solon.models.fast.llama_forward import find_llama_forward
from solon.models.fast.packed_prefix_tree import PackedPrefixTree, active_tree, pack_rows, tree_attention
from solon.models.forward import forward
from solon.models.plain import Reader
from solon.models.sharding import is_sharded

PROMPT_TOKENS = 4096  # distinct tokens of prompts that go through the model together
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # their cache holds keys and values


class _ReservedLayer(DynamicLayer):
    """A cache layer that writes into memory reserved beforehand instead of concatenating at each step."""

    def __init__(self, capacity: int) -> None:
        """capacity: tokens for which memory is reserved."""
        super().__init__()
        self.capacity, self.used = capacity, 0
        self.reserved: list[Tensor] = []  # keys and values, (rows, kv_heads, capacity, d)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.reserve(len(key_states), key_states, value_states)
        return self.write(slice(None), self.used, key_states, value_states)

    def reserve(self, n_rows: int, keys: Tensor, values: Tensor) -> None:
        """Reserve memory for `n_rows` rows of keys and values like these, where that is not done."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.reserved = [x.new_zeros(n_rows, x.shape[1], self.capacity, x.shape[3]) for x in (keys, values)]

    def write(self, rows: Tensor | slice, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values of these rows, (rows, kv_heads, length, d), from token `start` on. Returns those of all rows."""
        self.used = start + keys.shape[2]
        for reserved, new in zip(self.reserved, (keys, values), strict=True):
            reserved[rows, :, start : self.used] = new
        return self._show_used()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order."""
        self.reserved = [part[rows] for part in self.reserved]
        self._show_used()

    def _show_used(self) -> tuple[Tensor, Tensor]:
        keys, values = (part[:, :, : self.used] for part in self.reserved)
        self.keys, self.values = keys, values
        return keys, values


class TreeReader(Reader):
    """As the plain reader, with a cache whose memory is reserved beforehand. Shorter prompts stand on the right."""

    shrinks = True

    def __init__(self, model: Any, prompts: list[list[int]], room: int) -> None:
        """room: tokens that will be sampled after each prompt at most."""
        self.model, self.llama = model, find_llama_forward(model)
        longest = max(map(len, prompts))
        self.cache = _reserved_cache(model, longest + room)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        logits = None
        parts = split_rows(prompts, PROMPT_TOKENS)
        # A process with fewer parts reads its first part again. This changes nothing.
        for part, _ in distributed.synchronised_steps(parts, parts[0], is_sharded(model)):
            tree, numbers = pack_rows([prompts[i] for i in part])
            indices = torch.zeros(len(part), longest, dtype=torch.long)  # padding takes any token: the mask hides it
            for row, i in enumerate(part):
                indices[row, longest - len(prompts[i]) :] = torch.from_numpy(tree.indices(numbers[row]))
                mask[i, longest - len(prompts[i]) :] = 1
            tree_cache, tree_logits = self._read_tree(tree, indices[:, -1])
            if logits is None:
                logits = tree_logits.new_empty(len(prompts), tree_logits.shape[-1])
            rows, indices = torch.tensor(part, device=model.device), indices.to(model.device)
            logits[rows] = tree_logits
            for layer, read in zip(self.cache.layers, tree_cache.layers, strict=True):
                keys, values = (x[0][:, indices].transpose(0, 1) for x in (read.keys, read.values))
                layer.reserve(len(prompts), keys, values)
                layer.write(rows, 0, keys, values)
        assert logits is not None
        self.logits, self.mask = logits, mask.to(model.device)
        self.positions = self.mask.sum(-1, keepdim=True) - 1

    def _read_tree(self, tree: PackedPrefixTree, reads: Tensor) -> tuple[Any, Tensor]:
        """A cache of the tree's tokens, and the logits of its tokens `reads`, (reads, vocabulary)."""
        model = self.model
        with active_tree(tree, 0, torch.empty(0, dtype=model.dtype, device=model.device)):
            cache = DynamicCache()  # not the model's own kind: a cache with windows would forget tokens
            if self.llama is None:
                ids, positions = (torch.tensor([x], device=model.device) for x in (tree.ids, tree.positions))
                out = forward(
                    model, input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True,
                    logits_to_keep=reads.to(model.device),
                )  # fmt: skip
                return cache, out.logits[0]

            def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, block: int) -> Tensor:
                return tree_attention(q, *cache.update(k, v, block), scaling)

            return cache, self.llama(tree.ids, tree.positions, attend, reads.tolist())

    def keep(self, rows: Tensor) -> None:
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        for layer in self.cache.layers:
            layer.keep(rows)

    def _next(self, token: Tensor) -> Tensor:
        if self.llama is None:
            return super()._next(token)
        hidden = (self.mask == 0)[:, None, None]

        def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, block: int) -> Tensor:
            # One sequence of many rows' tokens becomes many sequences of one token.
            keys, values = self.cache.update(k.transpose(0, 2), v.transpose(0, 2), block)
            return last_token(q.transpose(0, 2), keys, values, hidden, scaling).transpose(0, 1)

        return self.llama(token, self.positions.squeeze(-1), attend, range(len(token)))


def _reserved_cache(model: Any, capacity: int) -> Any:
    """A cache with memory for `capacity` tokens. A layer with a window keeps all of them: its mask hides the far ones."""
    config = model.config.get_text_config()
    if not set(getattr(config, "layer_types", None) or ["full_attention"]) <= ATTENTION_LAYERS:
        raise NotUnderstood("not all of its layers are attention")
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers.extend(_ReservedLayer(capacity) for _ in range(config.num_hidden_layers))
    return cache
