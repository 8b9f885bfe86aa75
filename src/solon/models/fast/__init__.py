"""The same numbers in fewer passes over memory. Each way is taken only where a model has proved it (models/proof.py).

This folder can be deleted: `models/passes.py` is the only place that asks for it, and takes the plain ways without it.
"""

from __future__ import annotations

from typing import Any

from solon.models.fast.attention import GROUPED
from solon.models.fast.fused_lora_block import fuse_adapters
from solon.models.fast.layout import TreeLayout
from solon.models.fast.llama_forward import is_plain_llama
from solon.models.fast.lower_blocks import LowerBlocks
from solon.models.fast.reader import TreeReader
from solon.models.fast.scorer import TreeScorer

__all__ = ["GROUPED", "LowerBlocks", "TreeLayout", "TreeReader", "TreeScorer", "candidates", "fuse_adapters"]


def candidates(base: Any, causal: bool) -> list[dict[str, Any]]:
    """The fast ways to try with a model, the fastest first. causal: it is a causal language model."""
    tree = {"attention": GROUPED, "prefix_tree": True}
    return [*([{**tree, "llama_forward": True}] if causal and is_plain_llama(base) else []), tree]
