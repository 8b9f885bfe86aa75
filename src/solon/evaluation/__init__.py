"""Measures of models at the end of a run: what their answers are like, and how sure one can be of it.

`metrics` reads texts only and needs no model; `run` lets every model of a run answer the held-out prompts.
"""

from solon.evaluation.metrics import (
    Estimate,
    boilerplate_kinds,
    bootstrap,
    bootstrap_difference,
    bootstrap_distinct,
    distinct_n,
    has_boilerplate,
    is_evasive,
    is_refusal,
    repetition,
    words,
)

__all__ = [
    "Estimate",
    "boilerplate_kinds",
    "bootstrap",
    "bootstrap_difference",
    "bootstrap_distinct",
    "distinct_n",
    "has_boilerplate",
    "is_evasive",
    "is_refusal",
    "repetition",
    "words",
]
