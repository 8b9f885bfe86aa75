"""Rows of tokens through a model: its last hidden states where they are asked for, with gradients or without.

Reward model, judge in training, policy, reference and values all need the same: the states of some tokens of some rows.
Rows that begin alike (a prompt with its two responses, many responses under one system message) are laid out as one tree:
what they share is computed once, and nothing is padded. A model whose attention is not plain causal gets the same
rows padded on the right. Either way a token's state depends on its own row only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solon.models.fast.llama_forward import lean
from solon.models.fast.prefix_tree import Tree, as_tree, laid_out, tree_attention
from solon.models.forward import base_of, forward, trunk_of
from solon.models.paths import tree_fits

TOKENS_AT_ONCE = 1280  # distinct tokens of a pass that learns; activations are 1 to 2 MB a token in a model of 135M

Passed = Callable[["Layout", Sequence[list[int]]], Tensor]


def distinct_tokens(rows: Sequence[list[int]]) -> int:
    """How many tokens go through the model for these rows together."""
    return len(as_tree(rows)[0].ids)


class Layout:
    """Where each token of the rows stands in one forward pass. Places count through the flattened ids."""

    def __init__(self, model: Any, rows: Sequence[list[int]], pad: int, *, share: bool = True) -> None:
        """share: False lays no tree out."""
        base = base_of(model)
        self.device = next(model.parameters()).device
        self._like = torch.empty(0, dtype=base.dtype, device=self.device)
        self.tree: Tree | None = None
        self.mask: Tensor | None = None
        self.places: list[np.ndarray]  # of each row, one place a token
        if share and tree_fits(model, max(map(len, rows))):
            self.tree, number = as_tree(rows)
            self.places = [self.tree.places(n) for n in number]
            ids, positions = [self.tree.ids], [self.tree.positions]
        else:
            longest = max(map(len, rows))
            ids = [[*row, *[pad] * (longest - len(row))] for row in rows]
            positions = [list(range(longest))] * len(rows)
            mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
            self.places = [i * longest + np.arange(len(row)) for i, row in enumerate(rows)]
            self.mask = torch.tensor(mask, device=self.device)
        self.ids, self.positions = (torch.tensor(x, device=self.device) for x in (ids, positions))

    @property
    def tokens(self) -> int:
        """Tokens that the pass computes, padding included."""
        return self.ids.numel()

    def states(self, model: Any, entering: Sequence[Tensor] | None = None) -> Tensor:
        """The last hidden states, one a place, (places, width).

        entering: of each row its tokens' states, (tokens, width), where the model begins above its embeddings.

        Under a bfloat16 trunk the float32 adapters multiply in bfloat16 too, as mixed precision does; in float32 they
        took a quarter of a training step on a CPU. Weights, gradients and the optimiser stay float32.
        """
        trunk = trunk_of(model)[1]
        given = {"input_ids": self.ids} if entering is None else {"inputs_embeds": self._put(entering)}
        mixed = torch.autocast(self.device.type, torch.bfloat16, enabled=trunk.dtype == torch.bfloat16)
        with mixed, laid_out(self.tree, 0, self._like, learns=True) if self.tree else nullcontext():
            out = forward(trunk, attention_mask=self.mask, position_ids=self.positions, use_cache=False, **given)
        return out.last_hidden_state.flatten(0, 1)

    @torch.no_grad()
    def entering(self, model: Any, block: int) -> Tensor:
        """The states that enter a block below which nothing is adapted, one a place, (places, width)."""
        base = base_of(model)
        with model.disable_adapter():
            quick = lean(base) if self.tree else None
        if quick is not None and self.tree is not None:
            with laid_out(self.tree, 0, self._like):
                return quick.states(
                    self.ids[0], self.positions[0], lambda q, k, v, s, _: tree_attention(q, k, v, s), stop=block
                )
        found: list[Tensor] = []

        def keep(_: Any, args: tuple[Any, ...], out: Any) -> None:
            found.append(out[0] if isinstance(out, tuple) else out)

        handle = trunk_of(base)[1].layers[block - 1].register_forward_hook(keep)
        try:
            with with_blocks(model, slice(block)):
                self.states(model)
        finally:
            handle.remove()
        return found[0].flatten(0, 1)

    def at(self, states: Tensor, where: Sequence[range]) -> Tensor:
        """The states of some tokens of each row, one row after another, (all of them, width)."""
        places = np.concatenate([p[r.start : r.stop] for p, r in zip(self.places, where, strict=True)])
        return states[torch.from_numpy(places).to(states.device)]

    def _put(self, rows: Sequence[Tensor]) -> Tensor:
        source = np.zeros(self.tokens, dtype=np.int64)  # padding takes any state: nothing looks at it
        at = 0
        for places in self.places:
            source[places] = np.arange(at, at + len(places))
            at += len(places)
        return torch.cat(list(rows))[torch.from_numpy(source).to(self.device)].view(*self.ids.shape, -1)


def last_states(model: Any, rows: Sequence[list[int]], pad: int, passed: Passed | None = None) -> Tensor:
    """The last hidden state of each row's last token, (rows, width). passed: gives a layout's states; None: the model."""
    layout = Layout(model, rows, pad)
    states = passed(layout, rows) if passed else layout.states(model)
    return layout.at(states, [range(len(row) - 1, len(row)) for row in rows])


@contextmanager
def with_blocks(model: Any, which: slice) -> Iterator[None]:
    """Inside, the model consists of these of its blocks; without the first one, it is given states as `inputs_embeds`."""
    trunk = trunk_of(model)[1]
    whole = trunk.layers
    trunk.layers = torch.nn.ModuleList(list(whole)[which])
    try:
        yield
    finally:
        trunk.layers = whole
