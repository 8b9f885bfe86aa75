"""The one place that chooses a pass through a model: a fast pass where the model has proved it, the plain pass elsewhere.

All code that generates, scores or learns asks here. The folder `models/fast` may be missing; then every pass is plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from solon import distributed
from solon.models.paths import paths_of
from solon.models.plain import Layout, Reader

TOKENS_AT_ONCE = 1280  # distinct tokens of a pass that learns; activations are 1 to 2 MB a token in a model of 135M
STORED_BYTES = 2**30  # of the states that a training stores at most
HiddenStates = Callable[[Layout, Sequence[list[int]]], Tensor]


@cache
def fast() -> Any:
    """The package of fast passes; None where it is not installed."""
    return import_module("solon.models.fast") if find_spec("solon.models.fast") else None


def lay_out(model: Any, rows: Sequence[list[int]], pad: int) -> Layout:
    """The layout of the rows in one forward pass that computes their hidden states."""
    if fast() and paths_of(model).fits(max(map(len, rows))):
        layout: Layout = fast().TreeLayout(model, rows)
        return layout
    return Layout(model, rows, pad)


def prompt_reader(model: Any, prompts: list[list[int]], room: int, pad: int) -> Reader:
    """A reader of the prompts, for sampling. room: tokens that will be sampled after each prompt at most."""
    if fast() and paths_of(model).fits(max(map(len, prompts)) + room):
        reader: Reader = fast().TreeReader(model, prompts, room)
        return reader
    return Reader(model, prompts, pad)


def prefix_scorer(model: Any, tokens: int) -> Any:
    """A scorer that computes common beginnings of rows once, `tokens` tokens a pass; None where the model has no such pass."""
    return fast().TreeScorer(model, tokens=tokens) if fast() and paths_of(model).prefix_tree else None


def fuse_adapters(model: Any) -> Any:
    """The PEFT model. Its adapters and blocks take fewer passes over memory where that proves right."""
    return fast().fuse_adapters(model) if fast() else model


def lower_blocks(policy: Any, pad: int) -> Any:
    """The blocks below the lowest adapter, computed once for each row; None where every pass computes all blocks."""
    return fast().LowerBlocks(policy, pad) if fast() else None


def stored_lower_blocks(model: Any, tokens: int, pad: int) -> Any:
    """Lower blocks that keep the states of the rows that they meet, for a training that goes over rows several times.

    tokens: of all rows. None where every pass computes all blocks: no block lies below the adapters, the states would take
    more than STORED_BYTES, or several processes train.
    """
    width = model.config.get_text_config().hidden_size * next(model.parameters()).element_size()
    if distributed.world_size() > 1 or width * tokens > STORED_BYTES:
        return None
    lower = lower_blocks(model, pad)
    return lower if lower and lower.block else None


def last_hidden_states(model: Any, rows: Sequence[list[int]], pad: int, compute: HiddenStates | None = None) -> Tensor:
    """The last hidden state of each row's last token, (rows, width).

    compute: computes the states of a layout; None: the model does.
    """
    return hidden_states_from(model, rows, [len(row) - 1 for row in rows], pad, compute)


def hidden_states_from(
    model: Any, rows: Sequence[list[int]], first: Sequence[int], pad: int, compute: HiddenStates | None = None
) -> Tensor:
    """The last hidden states of each row's tokens from index `first` on, row after row, (tokens, width)."""
    layout = lay_out(model, rows, pad)
    states = compute(layout, rows) if compute else layout.hidden_states(model)
    return layout.gather(states, [range(start, len(row)) for row, start in zip(rows, first, strict=True)])
