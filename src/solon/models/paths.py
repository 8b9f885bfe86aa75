"""Which of Solon's passes through a model are used: those that this model has proved.

`proof.py` finds them when a model is loaded, and all other code asks here. A pass that is not proved is not used;
transformers' own forward pass takes its place.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from solon import distributed
from solon.models.forward import base_of, use_attention
from solon.models.loading import file_stats
from solon.models.sharding import is_sharded

FAST = "SOLON_FAST"  # an environment variable; where it is 0, no fast pass is tried


@dataclass(frozen=True)
class Paths:
    """What one model has proved in one dtype."""

    attention: str  # the attention function: `solon_grouped`, or one of transformers' own
    prefix_tree: bool = False  # whether rows that begin alike may go through the model as one tree (models/fast)
    llama_forward: bool = False  # whether the blocks' forward pass is written out (models/fast/llama_forward.py)
    padded: bool = True  # whether prompts of different lengths may be sampled from in one batch
    window: int | None = None  # tokens that a token can look back on; None: all. It limits the rows of a tree
    error: float = 0.0  # the largest difference from the reference, nats
    bound: float = 0.0  # the largest difference that is allowed, nats
    dtype: str = ""
    notes: tuple[str, ...] = ()  # for each pass that is not used, the reason

    def fits(self, longest: int) -> bool:
        """Whether rows of up to this many tokens may go through the model as a tree."""
        return self.prefix_tree and (self.window is None or longest <= self.window)

    @property
    def name(self) -> str:
        """The path in some words."""
        if self.llama_forward:
            return "Solon's own forward pass"
        if self.prefix_tree:
            return "Solon's attention with shared beginnings computed once"
        return f"{self.attention} attention" + ("" if self.padded else ", without padding")

    def sentence(self) -> str:
        """The proved path in one line, for a person."""
        fast = "Solon's fast path" + (" with its own forward pass" if self.llama_forward else "")
        path = fast if self.prefix_tree else f"transformers' own forward pass ({self.attention} attention)"
        rows = f", rows up to {self.window} tokens" if self.prefix_tree and self.window else ""
        prompts = "" if self.padded else ", prompts of one length at a time"
        reasons = f"; {'; '.join(self.notes)}" if self.notes else ""
        return (
            f"{path}{rows}{prompts}, {self.dtype}; differs from transformers' own numbers by {self.error:.1e} nats at most "
            f"(allowed: {self.bound:.1e}){reasons}"
        )


def paths_of(model: Any) -> Paths:
    """The proved paths of this model. The proof runs now where the model was not yet proved in its dtype.

    Raises InputError where no path gives the model's own numbers.
    """
    from solon.models.proof import prove

    base = base_of(model)
    known: tuple[torch.dtype, Paths] | None = vars(base).get("_solon_paths")
    if known is None or known[0] != base.dtype:
        vars(base)["_solon_paths"] = known = base.dtype, prove(model)
    return known[1]


_PROVED: dict[Any, Paths] = {}  # of the models that this process loaded, by the files that they came from
_RECORDED: dict[str, str] = {}  # for each model loaded since the last call of `take_recorded_paths`, its path in words
_PRINTED: set[str] = set()


def record_path(spec: str, model: Any, where: str) -> None:
    """Record the path of a model, and print it on stderr once where it is not the fast path.

    spec: the user's name for the model. where: the directory that its weights came from. Models of one class and dtype from the
    same files are equal, so only the first of them proves itself. Raises InputError as `paths_of` does.
    """
    paths = paths_of(model) if is_sharded(model) else _proved_once(model, where)
    _RECORDED[spec] = paths.sentence()
    line = f"solon: {spec}: {paths.sentence()}"
    if (paths.notes or not paths.prefix_tree) and line not in _PRINTED and distributed.is_main():
        _PRINTED.add(line)
        print(line, file=sys.stderr)


def _proved_once(model: Any, where: str) -> Paths:
    base = base_of(model)
    key = where, file_stats(Path(where)), type(base), base.dtype, base.device, os.environ.get(FAST)
    if known := _PROVED.get(key):
        vars(base)["_solon_paths"] = base.dtype, known
        use_attention(base, known.attention)
        return known
    paths = paths_of(model)
    if not paths.notes:  # a pass may have failed for want of memory, and may prove right at the next load
        _PROVED[key] = paths
    return paths


def take_recorded_paths() -> dict[str, str]:
    """The paths of the models that were loaded since the last call, in words, by the user's name for the model."""
    taken = dict(_RECORDED)
    _RECORDED.clear()
    return taken
