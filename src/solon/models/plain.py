"""transformers' own forward pass, with rows padded to one length. Every model has this pass, and it is always right.

`Reader` reads prompts and then one token more of each, for sampling. `Layout` computes the last hidden states of rows of
tokens, with gradients where a model learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solon.models.forward import forward, trunk_of


class Reader:
    """Prompts in a cache, padded on the left. logits: the scores after each prompt, (rows, vocabulary)."""

    cache: Any

    def __init__(self, model: Any, prompts: list[list[int]], pad: int) -> None:
        self.model = model
        distinct = [list(ids) for ids in dict.fromkeys(map(tuple, prompts))]
        self.logits = self._read_prompts(distinct, pad)
        if len(distinct) == len(prompts):
            return
        if self.shrinks:  # equal prompts are read once
            number = {tuple(ids): n for n, ids in enumerate(distinct)}
            copies = torch.tensor([number[tuple(ids)] for ids in prompts], device=model.device)
            self.logits = self.logits[copies]
            self.keep(copies)
        else:
            self.logits = self._read_prompts(prompts, pad)

    def _read_prompts(self, prompts: list[list[int]], pad: int) -> Tensor:
        self.cache = None
        ids, self.mask = left_pad(prompts, pad, self.model.device)
        self.positions = self.mask.sum(-1, keepdim=True) - 1
        return self._read(ids, (self.mask.cumsum(-1) - 1).clamp(min=0))

    def _read(self, ids: Tensor, positions: Tensor) -> Tensor:
        # An index, not a count: of a slice's states torch would multiply a frozen head per row, on copies of the head.
        last = torch.tensor([ids.shape[1] - 1], device=self.model.device)
        out = forward(
            self.model, input_ids=ids, attention_mask=self.mask, position_ids=positions,
            past_key_values=self.cache, use_cache=True, logits_to_keep=last,
        )  # fmt: skip
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits

    @property
    def shrinks(self) -> bool:
        """Whether rows can be taken out. The caches of linear attention and convolutions have no method for that."""
        return all(hasattr(layer, "batch_select_indices") for layer in self.cache.layers)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may be taken more than once."""
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.cache.batch_select_indices(rows)

    def read(self, token: Tensor) -> Tensor:
        """Read one token more of each row, (rows,). Returns the scores after it, (rows, vocabulary)."""
        self.positions = self.positions + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=-1)
        return self._next(token)

    def _next(self, token: Tensor) -> Tensor:
        return self._read(token.unsqueeze(-1), self.positions)


def left_pad(rows: list[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """The ids and the mask of rows padded on the left, both (rows, longest)."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids.to(device), mask.to(device)


class Layout:
    """Some rows of tokens in one forward pass, padded on the right. A token's state depends on its own row only.

    indices: for each row, the indices of its tokens in the flattened ids.
    """

    mask: Tensor | None

    def __init__(self, model: Any, rows: Sequence[list[int]], pad: int) -> None:
        self.device = next(model.parameters()).device
        longest = max(map(len, rows))
        self.ids = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in rows], device=self.device)
        self.positions = torch.tensor([list(range(longest))] * len(rows), device=self.device)
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        self.mask = torch.tensor(mask, device=self.device)
        self.indices = [i * longest + np.arange(len(row)) for i, row in enumerate(rows)]

    def hidden_states(self, model: Any, embeddings: Sequence[Tensor] | None = None) -> Tensor:
        """The last hidden states of all tokens, padding included, (tokens, width).

        embeddings: for each row, the states of its tokens, (row's tokens, width), where the model begins above its embeddings.

        Under a bfloat16 trunk, adapters with float32 weights multiply in bfloat16 (mixed precision), because products in float32
        are slow. Weights, gradients and the optimiser stay float32.
        """
        trunk = trunk_of(model)[1]
        inputs = {"input_ids": self.ids} if embeddings is None else {"inputs_embeds": self._place(embeddings)}
        mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=trunk.dtype == torch.bfloat16)
        with mixed, self._around():
            out = forward(trunk, attention_mask=self.mask, position_ids=self.positions, use_cache=False, **inputs)
        hidden: Tensor = out.last_hidden_state.flatten(0, 1)
        return hidden

    def _around(self) -> AbstractContextManager[Any]:
        """The context in which the forward pass runs."""
        return nullcontext()

    def gather(self, hidden: Tensor, ranges: Sequence[range]) -> Tensor:
        """The hidden states of some tokens of each row, one row after another, (tokens, width). ranges: a range for each row."""
        parts = [indices[r.start : r.stop] for indices, r in zip(self.indices, ranges, strict=True)]
        return hidden[torch.from_numpy(np.concatenate(parts)).to(hidden.device)]

    def _place(self, embeddings: Sequence[Tensor]) -> Tensor:
        """The rows' embeddings in the layout, (rows, length, width)."""
        source = np.zeros(self.ids.numel(), dtype=np.int64)  # padding takes any state: no other token sees it
        start = 0
        for indices in self.indices:
            source[indices] = np.arange(start, start + len(indices))
            start += len(indices)
        return torch.cat(list(embeddings))[torch.from_numpy(source).to(self.device)].view(*self.ids.shape, -1)
