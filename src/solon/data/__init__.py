"""Prompt sets and human data shipped with Solon, and readers of the field's formats."""

from solon.data.lines import shipped_path
from solon.data.readers import read_comparisons, read_demonstrations, read_pairs, read_prompts, read_revision_chains

__all__ = [
    "read_comparisons",
    "read_demonstrations",
    "read_pairs",
    "read_prompts",
    "read_revision_chains",
    "shipped_path",
]
