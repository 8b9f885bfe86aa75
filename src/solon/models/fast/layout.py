"""Rows that begin alike as one tree: what they share is computed once, and nothing is padded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from solon.models.fast.llama_forward import find_llama_forward
from solon.models.fast.packed_prefix_tree import active_tree, pack_rows, tree_attention
from solon.models.forward import base_of
from solon.models.plain import Layout


class TreeLayout(Layout):
    def __init__(self, model: Any, rows: Sequence[list[int]]) -> None:
        self.device = next(model.parameters()).device
        self.like = torch.empty(0, dtype=base_of(model).dtype, device=self.device)
        self.tree, number = pack_rows(rows)
        self.indices = [self.tree.indices(n) for n in number]
        self.ids = torch.tensor([self.tree.ids], device=self.device)
        self.positions = torch.tensor([self.tree.positions], device=self.device)
        self.mask = None

    def _around(self, model: Any) -> AbstractContextManager[Any]:
        return active_tree(self.tree, 0, self.like, learns=True)

    def entering(self, model: Any, block: int) -> Tensor | None:
        """The states that enter a block below which nothing is adapted; None: by transformers' own forward pass."""
        with model.disable_adapter():
            quick = find_llama_forward(base_of(model))
        if quick is None:
            return None
        with active_tree(self.tree, 0, self.like):
            return quick.hidden_states(
                self.ids[0], self.positions[0], lambda q, k, v, s, _: tree_attention(q, k, v, s), stop=block
            )
