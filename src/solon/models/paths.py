"""Which of Solon's ways through a model are taken: those that this very model has proved.

`proof.py` finds them when a model is loaded; everything else asks here. A way that has not proved itself is not taken, and
transformers' own forward pass is used instead.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from solon import distributed
from solon.models.forward import base_of


@dataclass(frozen=True)
class Paths:
    """What was proved of one model, in one dtype."""

    attention: str  # the attention function, `solon_grouped` or one of transformers' own
    prefix_tree: bool  # rows that begin alike may go through as one tree (models/fast)
    llama_forward: bool  # the blocks' forward pass is written out (models/fast/llama_forward.py)
    padded: bool  # prompts of different lengths may be sampled from in one batch
    window: int | None  # tokens that a token can look back on; None: all. The tree serves rows up to that length
    error: float  # the largest difference from the reference that was found on this path, nats
    bound: float  # what was allowed, nats
    dtype: str
    notes: tuple[str, ...] = field(default=())  # which paths were not taken, and why

    def fits(self, longest: int) -> bool:
        """Whether rows of up to this many tokens may go through as a tree."""
        return self.prefix_tree and (self.window is None or longest <= self.window)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        """One line for a person."""
        fast = "Solon's fast path" + (" with its own forward pass" if self.llama_forward else "")
        way = fast if self.prefix_tree else f"transformers' own forward pass ({self.attention} attention)"
        only = f", rows up to {self.window} tokens" if self.prefix_tree and self.window else ""
        alone = "" if self.padded else ", prompts of one length at a time"
        why = f"; {'; '.join(self.notes)}" if self.notes else ""
        return (
            f"{way}{only}{alone}, {self.dtype}; differs from transformers' own numbers by {self.error:.1e} nats at most "
            f"(allowed: {self.bound:.1e}){why}"
        )


def paths_of(model: Any) -> Paths:
    """The proved paths of this model. Proves them now where that was not done for the model's dtype and attention.

    Raises InputError where no path gives the model's own numbers.
    """
    from solon.models.proof import prove

    base = base_of(model)
    known: tuple[torch.dtype, Paths] | None = vars(base).get("_solon_paths")
    if known is None or known[0] != base.dtype:
        vars(base)["_solon_paths"] = known = base.dtype, prove(model)
    return known[1]


_WAYS: dict[str, str] = {}  # of each model loaded since they were last taken: which way Solon goes through it
_SAID: set[str] = set()


def record_path(spec: str, model: Any) -> None:
    """Remember which way Solon goes through this model, and say it on stderr, once, where it is not the fast one.

    Raises as `paths_of`. spec: what the user calls the model.
    """
    found = paths_of(model)
    _WAYS[spec] = found.sentence()
    line = f"solon: {spec}: {found.sentence()}"
    if (found.notes or not found.prefix_tree) and line not in _SAID and distributed.is_main():
        _SAID.add(line)
        print(line, file=sys.stderr)


def take_recorded_paths() -> dict[str, str]:
    """The ways of the models that were loaded since this was last asked, by what the user calls them."""
    taken = dict(_WAYS)
    _WAYS.clear()
    return taken
