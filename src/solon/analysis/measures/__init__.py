"""Measures of answers: one number per answer, with its interval per model and its change from model to model.

A measure is a `Measure` at the top level of a file in this folder, or behind an entry point `solon.measures` of another
package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from solon.errors import InputError
from solon.measures.statistics import Estimate, difference, mean, paired_difference_of_shares, share
from solon.plugins import as_number, discover
from solon.records import Chat, Record, Source


class Answer(Record):
    id: str
    prompt: Chat
    answer: str
    ended: bool
    source: Source | None = None
    reward: float | None = None  # in standard deviations of the reward's reference; None where the judge rated nothing


@dataclass(frozen=True)
class Measure:
    """One number per answer, and how a reader takes it."""

    name: str
    unit: str
    better: Literal["higher", "lower", ""]
    trained_on: bool  # training pushed on it
    value: Callable[[Answer], float | None]  # None: not measured on this answer
    source: Source | None = None  # the source of the prompts that count; None: all prompts
    is_share: bool = False  # the value is 0 or 1, shown in percent

    def by_prompt(self, answers: Sequence[Answer]) -> dict[str, float]:
        relevant = (a for a in answers if self.source in (None, a.source))
        source = f'the measure "{self.name}"'
        values = {a.id: as_number(v, source) for a in relevant if (v := self.value(a)) is not None}
        if self.is_share and (others := {*values.values()} - {0, 1}):
            raise InputError(f"{source} gave {min(others)!r}; a share must give 0, 1 or None")
        return values

    def of(self, answers: Sequence[Answer]) -> Estimate:
        values = list(self.by_prompt(answers).values())
        return share(values).times(100) if self.is_share else mean(values)

    def change(self, old: Sequence[Answer], new: Sequence[Answer]) -> Estimate:
        """New less old, prompt by prompt."""
        before, after = self.by_prompt(old), self.by_prompt(new)
        common = [i for i in after if i in before]
        if not self.is_share:
            return difference([after[i] for i in common], [before[i] for i in common])
        only_new = sum(after[i] > before[i] for i in common)
        only_old = sum(after[i] < before[i] for i in common)
        return paired_difference_of_shares(only_new, only_old, len(common)).times(100)


@cache
def all_measures() -> tuple[Measure, ...]:
    """Every measure, Solon's own first."""
    return tuple(discover("solon.analysis.measures", "solon.measures", lambda x: isinstance(x, Measure), "measure"))
