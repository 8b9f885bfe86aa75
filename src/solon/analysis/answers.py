"""The evaluation at the end of a run: measures of every model's answers to the held-out prompts.

Two kinds of measure are kept apart: those that training pushed on (the reward model's score, the judge's preference), and
those that nothing was trained on (refusals, evasiveness, over-refusal, boilerplate, diversity, length, repetition). Only
the second kind can show that training gamed the first.

"start" is the recipe's model before any training. All models answer the same prompts, so every measure is also given as
a paired change from one model to another.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from solon.analysis.measures import Answer, Measure, all_measures
from solon.measures.statistics import Estimate, share
from solon.measures.texts import distinct_change, distinct_interval, words
from solon.records import Source

DISTINCT = "distinct-3"
SOURCES: tuple[tuple[Source, str], ...] = (("red_team", "red-team"), ("helpful", "helpful"))


def measures(answers: dict[str, list[Answer]], wins: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """One row per measure: values by model, each with its interval and sample size."""
    rows = [_row(m, {name: m.of(given).to_json() for name, given in answers.items()}) for m in all_measures()]
    judged = []
    for source, source_name in SOURCES:
        values = {name: share(wins[name][source]).times(100).to_json() if name in wins else None for name in answers}
        judged.append(_plain_row(_judged(source_name), "%", True, values=values))
    return [*rows[:3], *judged, *rows[3:7], _plain_row(DISTINCT, "", False, values=distinct(answers)), *rows[7:]]


def changes(answers: dict[str, list[Answer]], wins: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """One row per measure: its change at each step, new less old; for the judge's preference: the share less one half.

    Steps: from each model to the next, and from the first to the last.
    """
    names = list(answers)
    steps = [*pairwise(names), *([(names[0], names[-1])] if len(names) > 2 else [])]
    rows = [
        _row(m, {f"{a} → {b}": m.change(answers[a], answers[b]).to_json() for a, b in steps}, "steps")
        for m in all_measures()
    ]
    texts = {name: {a.id: a.answer for a in given} for name, given in answers.items()}
    falls, distinct_steps = {}, {}
    for a, b in steps:
        common = [i for i in texts[b] if i in texts[a]]
        change = distinct_change([texts[a][i] for i in common], [texts[b][i] for i in common])
        distinct_steps[f"{a} → {b}"] = change["change"].to_json()
        falls[f"{a} → {b}"] = change["fall"].times(100).to_json()
    rows.append(_plain_row(DISTINCT, "", False, steps=distinct_steps, falls_percent=falls))
    for source, source_name in SOURCES:
        judged = {
            f"{names[0]} → {name}": _points_above_half(share(by_source[source])).to_json()
            for name, by_source in wins.items()
            if by_source[source]
        }
        if judged:
            rows.append(_plain_row(_judged(source_name), "points above 50 %", True, steps=judged))
    return rows


def _points_above_half(estimate: Estimate) -> Estimate:
    """A share as points above 50 %."""
    value, low, high = (None if x is None else 100 * x - 50 for x in (estimate.value, estimate.low, estimate.high))
    return Estimate(value, low, high, estimate.n)


def _judged(source_name: str) -> str:
    return f"judge prefers it to start, {source_name} prompts"


def _row(m: Measure, values: dict[str, Any], key: str = "values") -> dict[str, Any]:
    unit = "points" if key == "steps" and m.is_share else m.unit
    return {"name": m.name, "unit": unit, "better": m.better, "trained_on": m.trained_on, key: values}


def _plain_row(name: str, unit: str, trained_on: bool, **parts: Any) -> dict[str, Any]:
    """The row of a measure of which more is better."""
    return {"name": name, "unit": unit, "better": "higher", "trained_on": trained_on, **parts}


def distinct(answers: dict[str, list[Answer]]) -> dict[str, Any]:
    """distinct-3 of each model's answers, on the number of 3-grams of the model with the fewest."""
    texts = {name: [a.answer for a in given] for name, given in answers.items()}
    grams = min(sum(max(0, words(t) - 2) for t in given) for given in texts.values())
    return {name: distinct_interval(given, max_ngrams=grams).to_json() for name, given in texts.items()}


def side_by_side(answers: dict[str, list[Answer]], n: int = 6) -> list[dict[str, Any]]:
    """n prompts with every model's answer: half of each source, at even distances in the held-out set."""
    rows = []
    first = next(iter(answers.values()))
    by_id = {name: {a.id: a.answer for a in given} for name, given in answers.items()}
    for source, _ in SOURCES:
        given = [a for a in first if a.source == source]
        for k in range(min(n // 2, len(given))):
            drawn = given[k * len(given) // (n // 2)]
            text = "\n".join(f"{m.role}: {m.content}" for m in drawn.prompt) if len(drawn.prompt) > 1 else None
            texts = {name: by_id[name].get(drawn.id) for name in answers}
            rows.append({"prompt": text or drawn.prompt[-1].content, "source": source, "answers": texts})
    return rows
