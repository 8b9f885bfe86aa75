"""The blocks below the lowest adapter never change, so they are computed once per rollout and not in every pass.

With adapters on the top 12 of 30 blocks, the reference, the old policy, every epoch of PPO, and a reward model on the same
trunk share the states that enter block 18.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from solon import distributed
from solon.models.batching import split_rows
from solon.models.fast.fused_lora_block import rounding_bound
from solon.models.fast.llama_forward import some_tokens
from solon.models.fast.packed_prefix_tree import TreeLayout
from solon.models.forward import base_of, replaced, trunk_of
from solon.models.passes import TOKENS_AT_ONCE, lay_out
from solon.models.plain import Layout


def lowest_adapted_block(model: Any, adapter: str = "default") -> int:
    """Index of the first block with that adapter; 0 where the names of the parameters do not say it."""
    named = (name for name, _ in model.named_parameters() if f".{adapter}." in name)
    names = [name for name in named if ".modules_to_save." not in name]  # a reward model's head is above all blocks
    blocks = [re.search(r"\.layers\.(\d+)\.", name) for name in names]
    return min((int(match[1]) for match in blocks if match), default=0) if all(blocks) else 0


class LowerBlocks:
    """The states that enter the lowest adapted block. Each row of tokens is computed once."""

    def __init__(self, policy: Any, pad: int) -> None:
        self.policy, self._pad = policy, pad
        self._states: dict[tuple[int, ...], Tensor] = {}
        self.block = lowest_adapted_block(policy)
        if self.block and not self._can_start():
            self.block = 0  # then passes go through all blocks, and no states are stored

    def serves(self, model: Any, adapters: Iterable[str]) -> bool:
        """Whether the model is the policy's trunk, with none of these adapters below the policy's own."""
        return model is self.policy and min(lowest_adapted_block(model, name) for name in adapters) >= self.block

    @torch.no_grad()
    def add(self, rows: Sequence[list[int]]) -> None:
        """Compute the states of the rows that are new. Tokens that several of them begin with are computed once."""
        if not self.block:
            return
        missing = [row for row in rows if tuple(row) not in self._states]
        parts = [[missing[i] for i in part] for part in split_rows(missing, TOKENS_AT_ONCE)]
        for part, _ in distributed.synchronised_steps(parts, list(rows[:1]), distributed.is_sharded()):
            layout = lay_out(self.policy, part, self._pad)
            states = self._states_entering(layout)
            for row, indices in zip(part, layout.indices, strict=True):
                self._states[tuple(row)] = states[torch.from_numpy(indices).to(states.device)]

    def forget(self) -> None:
        """Drop all states."""
        self._states = {}

    def hidden_states(self, layout: Layout, rows: Sequence[list[int]]) -> Tensor:
        """The last hidden states of the layout of these rows, (tokens, width), computed from the stored states.

        Rows that are not stored yet are added. Processes that share the weights must add them before (`add`), all at once.
        """
        if not self.block:
            return layout.hidden_states(self.policy)
        if not distributed.is_sharded():
            self.add(rows)
        with self._only_blocks(slice(self.block, None)):
            return layout.hidden_states(self.policy, [self._states[tuple(row)] for row in rows])

    def _only_blocks(self, which: slice) -> AbstractContextManager[None]:
        """Inside, the policy has only these blocks. Without its first block it takes states as `inputs_embeds`."""
        trunk = trunk_of(self.policy)[1]
        return replaced(trunk, "layers", torch.nn.ModuleList(list(trunk.layers)[which]))

    def _states_entering(self, layout: Layout) -> Tensor:
        """The states that enter the block, (tokens, width)."""
        if isinstance(layout, TreeLayout) and (states := layout.states_entering(self.policy, self.block)) is not None:
            return states
        outputs: list[Tensor] = []

        def keep(_: Any, args: tuple[Any, ...], out: Any) -> None:
            outputs.append(out[0] if isinstance(out, tuple) else out)

        handle = trunk_of(self.policy)[1].layers[self.block - 1].register_forward_hook(keep)
        try:
            with self._only_blocks(slice(self.block)):
                layout.hidden_states(self.policy)
        finally:
            handle.remove()
        return outputs[0].flatten(0, 1)

    @torch.no_grad()
    def _can_start(self) -> bool:
        """Whether a pass can start at the block. This is tried on a few tokens, because architectures differ.

        The number of a block decides its mask and positions: the blocks above must have the kinds of the first ones.
        """
        base = base_of(self.policy)
        kinds = getattr(base.config.get_text_config(), "layer_types", None) or []
        if kinds[self.block :] != kinds[: len(kinds) - self.block]:
            return False
        row = some_tokens(base).tolist()
        layout = lay_out(self.policy, [row], self._pad)
        whole = layout.hidden_states(self.policy)
        try:
            self.add([row])
            equal = bool((self.hidden_states(layout, [row]) - whole).norm() <= rounding_bound(base) * whole.norm())
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            equal = False
        self.forget()
        if distributed.is_sharded():  # all processes must gather the same blocks in a pass
            equal = distributed.all_reduce_number(equal) == distributed.world_size()
        return equal
