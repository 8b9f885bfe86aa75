"""Prompts that begin alike (a system message, shown examples, the same prompt many times) read as one tree."""

from __future__ import annotations

from collections.abc import Sequence
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

PROMPT_TOKENS = 4096  # distinct tokens of prompts that go through together
ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}  # whose cache holds keys and values


class _Layer(DynamicLayer):
    """A cache layer that writes into room reserved beforehand instead of concatenating at each step."""

    capacity: int = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self.capacity, key_states.shape[3])
            self.room = (
                key_states.new_zeros(shape),
                value_states.new_zeros((*shape[:3], value_states.shape[3])),
            )
            self.used = 0
        end = self.used + key_states.shape[2]
        self.room[0][:, :, self.used : end] = key_states
        self.room[1][:, :, self.used : end] = value_states
        self.used = end
        self.keys, self.values = self.room[0][:, :, :end], self.room[1][:, :, :end]
        return self.keys, self.values

    def take(self, rows: Tensor, of: int, length: int, keys: Tensor, values: Tensor) -> None:
        """Hold these keys and values, (rows, kv_heads, length, d), as those of some of `of` rows."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            shape = (of, keys.shape[1], self.capacity)
            self.room = keys.new_zeros((*shape, keys.shape[3])), values.new_zeros((*shape, values.shape[3]))
        for room, given in zip(self.room, (keys, values), strict=True):
            room[rows, :, :length] = given
        self.used = length
        self.keys, self.values = self.room[0][:, :, :length], self.room[1][:, :, :length]

    def keep(self, rows: Tensor) -> None:
        self.room = self.room[0][rows], self.room[1][rows]
        self.keys, self.values = self.room[0][:, :, : self.used], self.room[1][:, :, : self.used]


class TreeReader(Reader):
    """As the plain reader, with room for the new tokens reserved beforehand; shorter prompts stand on the right."""

    def __init__(self, model: Any, prompts: list[list[int]], room: int) -> None:
        self.model, self.llama = model, find_llama_forward(model)
        longest = max(map(len, prompts))
        self.cache = _reserved(model, longest + room)
        mask = torch.zeros(len(prompts), longest, dtype=torch.long)
        logits = None
        parts = split_rows(prompts, PROMPT_TOKENS)
        # Reading a part twice, as a process with fewer parts does, changes nothing.
        for part, _ in distributed.synchronised_steps(parts, parts[0], is_sharded(model)):
            made, number = pack_rows([prompts[i] for i in part])
            indices = torch.zeros(len(part), longest, dtype=torch.long)  # of padding: any, the mask hides it
            for row, i in enumerate(part):
                indices[row, longest - len(prompts[i]) :] = torch.from_numpy(made.indices(number[row]))
                mask[i, longest - len(prompts[i]) :] = 1
            filled, found = self._read_tree(made, indices[:, -1])
            if logits is None:
                logits = found.new_empty(len(prompts), found.shape[-1])
            rows, at = torch.tensor(part, device=model.device), indices.to(model.device)
            logits[rows] = found
            layers: Sequence[Any] = self.cache.layers
            for layer, whole in zip(layers, filled.layers, strict=True):
                taken = (x[0][:, at].transpose(0, 1) for x in (whole.keys, whole.values))
                layer.take(rows, len(prompts), longest, *taken)
        assert logits is not None
        self.logits, self.mask = logits, mask.to(model.device)
        self.positions = self.mask.sum(-1, keepdim=True) - 1

    def _read_tree(self, made: PackedPrefixTree, reads: Tensor) -> tuple[Any, Tensor]:
        """A cache of the tree's tokens, and the scores at the indices `reads`, (reads, vocabulary)."""
        model = self.model
        with active_tree(made, 0, torch.empty(0, dtype=model.dtype, device=model.device)):
            filled = DynamicCache()  # not the model's own kind: one with windows would forget
            if self.llama is None:
                ids, positions = (torch.tensor([x], device=model.device) for x in (made.ids, made.positions))
                out = forward(
                    model, input_ids=ids, position_ids=positions, past_key_values=filled, use_cache=True,
                    logits_to_keep=reads.to(model.device),
                )  # fmt: skip
                return filled, out.logits[0]

            def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, block: int) -> Tensor:
                return tree_attention(q, *filled.update(k, v, block), scaling)

            return filled, self.llama(made.ids, made.positions, attend, reads.tolist())

    @property
    def shrinks(self) -> bool:
        return True

    def keep(self, rows: Tensor) -> None:
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        layers: Sequence[Any] = self.cache.layers
        for layer in layers:
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


def _reserved(model: Any, capacity: int) -> DynamicCache:
    """A cache with room for `capacity` tokens. A layer with a window keeps all of them: its mask hides the far ones."""
    config = model.config.get_text_config()
    if not set(getattr(config, "layer_types", None) or ["full_attention"]) <= ATTENTION_LAYERS:
        raise NotUnderstood("not all of its layers are attention")
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    for _ in range(config.num_hidden_layers):
        layer = _Layer()
        layer.capacity = capacity
        cache.layers.append(layer)
    return cache
