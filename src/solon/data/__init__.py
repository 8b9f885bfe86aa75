"""Prompt sets and human data shipped with Solon, and readers of the field's formats."""

from solon.data.readers import read_comparisons, read_demonstrations, read_pairs, read_prompts, read_revision_chains
from solon.data.shipped import shipped_path

__all__ = [
    "read_comparisons",
    "read_demonstrations",
    "read_pairs",
    "read_prompts",
    "read_revision_chains",
    "shipped_path",
]
