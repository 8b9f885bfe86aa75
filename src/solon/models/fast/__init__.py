"""Forward passes that give a model's own numbers and go over memory fewer times.

A pass is used only with a model that has proved it (models/proof.py). This folder can be deleted: `models/passes.py` alone
imports it, and uses the plain passes where the folder is missing.
"""

from __future__ import annotations

from typing import Any

from solon.models.fast.attention import GROUPED
from solon.models.fast.fused_lora_block import fuse_adapters
from solon.models.fast.llama_forward import is_plain_llama
from solon.models.fast.lower_blocks import LowerBlocks
from solon.models.fast.packed_prefix_tree import TreeLayout
from solon.models.fast.reader import TreeReader
from solon.models.fast.scorer import TreeScorer

__all__ = ["GROUPED", "LowerBlocks", "TreeLayout", "TreeReader", "TreeScorer", "candidates", "fuse_adapters"]


def candidates(base: Any, causal: bool) -> list[dict[str, Any]]:
    """The fast passes to try with a model, the fastest first. causal: the model is a causal language model."""
    tree = {"attention": GROUPED, "prefix_tree": True}
    return [*([{**tree, "llama_forward": True}] if causal and is_plain_llama(base) else []), tree]
