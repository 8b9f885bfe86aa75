"""What lies below the lowest adapter never changes: it is computed once per rollout instead of at every pass.

With adapters on the top 12 of 30 blocks, the reference, the old policy and every epoch of PPO share the states
that enter block 18. They are kept from the first full pass, and the later passes start there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from solon.states import base_of


def lowest_trained_block(model: Any) -> int:
    """Index of the first block that has anything to train; 0 where that is not told by the parameters' names."""
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    blocks = [re.search(r"\.layers\.(\d+)\.", n) for n in trained]
    return min((int(b[1]) for b in blocks if b), default=0) if all(blocks) else 0


def _trunk(model: Any) -> Any:
    return base_of(model).base_model


@contextmanager
def states_entering(model: Any, block: int) -> Iterator[list[Tensor]]:
    """Collects the states that enter the block, (rows, length, width), once per forward pass inside."""
    found: list[Tensor] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args[0] if args else kwargs["hidden_states"]).detach())

    handle = _trunk(model).layers[block].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def starting_at(model: Any, block: int) -> Iterator[None]:
    """Inside, the model consists of its blocks from `block` on, and is given the states as `inputs_embeds`."""
    trunk = _trunk(model)
    whole = trunk.layers
    trunk.layers = torch.nn.ModuleList(list(whole)[block:])
    try:
        yield
    finally:
        trunk.layers = whole
