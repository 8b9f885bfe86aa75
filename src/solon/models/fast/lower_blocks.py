"""What lies below the lowest adapter never changes: it is computed once per rollout instead of at every pass.

With adapters on the top 12 of 30 blocks, the reference, the old policy, every epoch of PPO and a reward model on the same
trunk share the states that enter block 18.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from solon import distributed
from solon.models.batching import split_rows
from solon.models.fast.fused_lora_block import rounding_of
from solon.models.fast.layout import TreeLayout
from solon.models.fast.llama_forward import some_tokens
from solon.models.forward import base_of, trunk_of
from solon.models.passes import TOKENS_AT_ONCE, lay_out
from solon.models.plain import Layout


def lowest_adapted_block(model: Any, adapter: str = "default") -> int:
    """Index of the first block with that adapter; 0 where the parameters' names do not tell."""
    names = [n for n, _ in model.named_parameters() if f".{adapter}." in n]
    blocks = [re.search(r"\.layers\.(\d+)\.", n) for n in names]
    return min((int(b[1]) for b in blocks if b), default=0) if all(blocks) else 0


class LowerBlocks:
    """The states that enter the lowest adapted block, of rows of tokens; each row is computed once."""

    def __init__(self, policy: Any, pad: int) -> None:
        self.policy, self._pad = policy, pad
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self.block = lowest_adapted_block(policy)
        if self.block and not self._starts():
            self.block = 0  # passes go through all blocks, and nothing is kept

    def serves(self, model: Any, adapters: Iterable[str]) -> bool:
        """Whether a model with these adapters is the same trunk, adapted no lower."""
        return model is self.policy and min(lowest_adapted_block(model, name) for name in adapters) >= self.block

    @torch.no_grad()
    def add(self, rows: Sequence[list[int]]) -> None:
        """Compute those of these rows, together: what they share, also with one another's endings, once."""
        if not self.block:
            return
        missing = [row for row in rows if tuple(row) not in self._kept]
        parts = [[missing[i] for i in part] for part in split_rows(missing, TOKENS_AT_ONCE)]
        for part, _ in distributed.synchronised_steps(parts, list(rows[:1]), distributed.is_sharded()):
            layout = lay_out(self.policy, part, self._pad)
            states = self._entering(layout)
            for row, indices in zip(part, layout.indices, strict=True):
                self._kept[tuple(row)] = states[torch.from_numpy(indices).to(states.device)]

    def forget(self) -> None:
        self._kept = {}

    def hidden_states(self, layout: Layout, rows: Sequence[list[int]]) -> Tensor:
        """The last hidden states of the layout of these rows, (indices, width), from the kept ones on."""
        if not self.block:
            return layout.hidden_states(self.policy)
        with with_blocks(self.policy, slice(self.block, None)):
            return layout.hidden_states(self.policy, [self._kept[tuple(row)] for row in rows])

    def _entering(self, layout: Layout) -> Tensor:
        """The states that enter the block, one a place, (indices, width)."""
        if isinstance(layout, TreeLayout) and (quick := layout.entering(self.policy, self.block)) is not None:
            return quick
        found: list[Tensor] = []

        def keep(_: Any, args: tuple[Any, ...], out: Any) -> None:
            found.append(out[0] if isinstance(out, tuple) else out)

        handle = trunk_of(self.policy)[1].layers[self.block - 1].register_forward_hook(keep)
        try:
            with with_blocks(self.policy, slice(self.block)):
                layout.hidden_states(self.policy)
        finally:
            handle.remove()
        return found[0].flatten(0, 1)

    @torch.no_grad()
    def _starts(self) -> bool:
        """Whether the model can start at the block: tried on a few tokens, as architectures differ.

        Masks and positions are told by a block's number: those above must be as those from the first on.
        """
        kinds = getattr(base_of(self.policy).config.get_text_config(), "layer_types", None) or []
        if kinds[self.block :] != kinds[: len(kinds) - self.block]:
            return False
        row = some_tokens(base_of(self.policy)).tolist()
        layout = lay_out(self.policy, [row], self._pad)
        whole = layout.hidden_states(self.policy)
        try:
            self.add([row])
            bound = rounding_of(base_of(self.policy)) * whole.norm()
            alike = bool((self.hidden_states(layout, [row]) - whole).norm() <= bound)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            alike = False
        self.forget()
        if distributed.is_sharded():  # which blocks a pass gathers must be the same everywhere
            alike = distributed.all_reduce_number(alike) == distributed.world_size()
        return alike


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
