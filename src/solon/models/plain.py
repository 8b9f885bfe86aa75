"""transformers' own forward pass, with rows padded to one length: the way that every model has, and that is always right.

Two things are done with a model. `Reader` reads prompts and then one token more of each, for sampling. `Layout` computes
the last hidden states of rows of tokens, with gradients where something learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solon.models.forward import forward, trunk_of

# An index, not a count: of a slice's states torch multiplies a frozen head per row, on copies of it (2.7 GB).
FIRST = torch.zeros(1, dtype=torch.long)


class Reader:
    """Prompts in a cache, padded on the left.

    logits: the scores after each prompt, (rows, vocabulary).
    """

    def __init__(self, model: Any, prompts: list[list[int]], pad: int) -> None:
        self.model = model
        distinct = [list(p) for p in dict.fromkeys(map(tuple, prompts))]
        self.logits = self._read_prompts(distinct, pad)
        if len(distinct) < len(prompts) and self.shrinks:  # equal prompts are read once
            number = {tuple(p): n for n, p in enumerate(distinct)}
            copies = torch.tensor([number[tuple(p)] for p in prompts], device=model.device)
            self.logits = self.logits[copies]
            self.keep(copies)
        elif len(distinct) < len(prompts):
            self.logits = self._read_prompts(prompts, pad)

    def _read_prompts(self, rows: list[list[int]], pad: int) -> Tensor:
        ids, self.mask = left_pad(rows, pad, self.model.device)
        self.positions = self.mask.sum(-1, keepdim=True) - 1
        out = forward(
            self.model, input_ids=ids, attention_mask=self.mask, position_ids=(self.mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True, logits_to_keep=torch.tensor([ids.shape[1] - 1], device=self.model.device),
        )  # fmt: skip
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits

    @property
    def shrinks(self) -> bool:
        """Whether rows can be taken out: linear attention and convolutions keep a state that has no such method."""
        return all(hasattr(layer, "batch_select_indices") for layer in self.cache.layers)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order; a row may be taken more than once."""
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.cache.batch_select_indices(rows)

    def read(self, token: Tensor) -> Tensor:
        """The scores, (rows, vocabulary), after one token more of each row. token: (rows,)."""
        self.positions = self.positions + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=-1)
        return self._next(token)

    def _next(self, token: Tensor) -> Tensor:
        out = forward(
            self.model, input_ids=token.unsqueeze(-1), attention_mask=self.mask, position_ids=self.positions,
            past_key_values=self.cache, use_cache=True, logits_to_keep=FIRST.to(self.model.device),
        )  # fmt: skip
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1]
        return logits


def left_pad(rows: list[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """ids and mask, both (batch, longest)."""
    longest = max(len(r) for r in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = torch.tensor(row)
        mask[i, longest - len(row) :] = 1
    return ids.to(device), mask.to(device)


class Layout:
    """Where each token of some rows stands in one forward pass, padded on the right.

    indices: of each row, where its tokens stand in the flattened ids. A token's state depends on its own row only.
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

    @property
    def tokens(self) -> int:
        """Tokens that the pass computes, padding included."""
        return self.ids.numel()

    def hidden_states(self, model: Any, embeddings: Sequence[Tensor] | None = None) -> Tensor:
        """The last hidden states, one a place, (indices, width).

        embeddings: of each row its tokens' states, (tokens, width), where the model begins above its embeddings.

        Under a bfloat16 trunk the float32 adapters multiply in bfloat16 too, as mixed precision does; in float32 they
        took a quarter of a training step on a CPU. Weights, gradients and the optimiser stay float32.
        """
        trunk = trunk_of(model)[1]
        given = {"input_ids": self.ids} if embeddings is None else {"inputs_embeds": self._put(embeddings)}
        mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=trunk.dtype == torch.bfloat16)
        with mixed, self._around(model):
            out = forward(trunk, attention_mask=self.mask, position_ids=self.positions, use_cache=False, **given)
        states: Tensor = out.last_hidden_state.flatten(0, 1)
        return states

    def _around(self, model: Any) -> AbstractContextManager[Any]:
        """What a pass needs around it."""
        return nullcontext()

    def gather(self, states: Tensor, where: Sequence[range]) -> Tensor:
        """The states of some tokens of each row, one row after another, (all of them, width)."""
        indices = np.concatenate([p[r.start : r.stop] for p, r in zip(self.indices, where, strict=True)])
        return states[torch.from_numpy(indices).to(states.device)]

    def _put(self, rows: Sequence[Tensor]) -> Tensor:
        source = np.zeros(self.tokens, dtype=np.int64)  # padding takes any state: nothing looks at it
        at = 0
        for indices in self.indices:
            source[indices] = np.arange(at, at + len(indices))
            at += len(indices)
        return torch.cat(list(rows))[torch.from_numpy(source).to(self.device)].view(*self.ids.shape, -1)
