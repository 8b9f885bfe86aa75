"""Measures of models at the end of a run: what their answers are like, and how sure one can be of it.

`metrics` reads texts only and needs no model; `run` lets every model of a run answer the held-out prompts.
"""

from solon.evaluation.metrics import (
    boilerplate_kinds,
    distinct_interval,
    distinct_n,
    has_boilerplate,
    is_evasive,
    is_refusal,
    repetition,
    words,
)

__all__ = [
    "boilerplate_kinds",
    "distinct_interval",
    "distinct_n",
    "has_boilerplate",
    "is_evasive",
    "is_refusal",
    "repetition",
    "words",
]
