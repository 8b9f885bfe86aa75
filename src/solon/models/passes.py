"""The one place that chooses a way through a model: a fast one where the model has proved it, or else the plain one.

Everything that generates, scores or learns asks here. `models/fast` may be missing: then every way is the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from solon.models.paths import paths_of
from solon.models.plain import Layout, Reader

TOKENS_AT_ONCE = 1280  # distinct tokens of a pass that learns; activations are 1 to 2 MB a token in a model of 135M
States = Callable[[Layout, Sequence[list[int]]], Tensor]


@cache
def fast() -> Any:
    """The package of fast ways; None where it is not installed."""
    return import_module("solon.models.fast") if find_spec("solon.models.fast") else None


def lay_out(model: Any, rows: Sequence[list[int]], pad: int) -> Layout:
    """The rows in one forward pass, for their hidden states."""
    if fast() and paths_of(model).fits(max(map(len, rows))):
        layout: Layout = fast().TreeLayout(model, rows)
        return layout
    return Layout(model, rows, pad)


def prompt_reader(model: Any, prompts: list[list[int]], room: int, pad: int) -> Reader:
    """The prompts in a cache with room for this many tokens more, for sampling."""
    if fast() and paths_of(model).fits(max(map(len, prompts)) + room):
        reader: Reader = fast().TreeReader(model, prompts, room)
        return reader
    return Reader(model, prompts, pad)


def prefix_scorer(model: Any, tokens: int) -> Any:
    """Scores rows that begin alike with shared work; None: each row is computed by itself. tokens: of a pass."""
    return fast().TreeScorer(model, tokens=tokens) if fast() and paths_of(model).prefix_tree else None


def fuse_adapters(model: Any) -> Any:
    """The PEFT model, its adapters and blocks computed in fewer passes over memory where that proves right."""
    return fast().fuse_adapters(model) if fast() else model


def lower_blocks(policy: Any, pad: int) -> Any:
    """The blocks below the lowest adapter, which are computed once per row; None: every pass goes through all blocks."""
    return fast().LowerBlocks(policy, pad) if fast() else None


def last_hidden_states(model: Any, rows: Sequence[list[int]], pad: int, states_of: States | None = None) -> Tensor:
    """The last hidden state of each row's last token, (rows, width). states_of: of a layout; None: by the model."""
    layout = lay_out(model, rows, pad)
    states = states_of(layout, rows) if states_of else layout.hidden_states(model)
    return layout.gather(states, [range(len(row) - 1, len(row)) for row in rows])
