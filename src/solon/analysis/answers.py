"""The evaluation at the end of a run: every model answers the held-out prompts; the answers are measured side by side.

Two kinds of measure, kept apart: those that training pushed on (the reward model's score, the judge's preference),
and those that nothing was trained on (refusals, evasiveness, over-refusal, boilerplate, diversity, length,
repetition). Only the second kind can catch the first being gamed.

"start" is one model everywhere: the recipe's, before any training. Every measure is also given as a change between two
models, prompt by prompt, because the same prompts are answered by all of them.
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
    """One row a measure: values by model, each with its interval and sample size."""
    rows = [_row(m, {name: m.of(given).to_json() for name, given in answers.items()}) for m in all_measures()]
    judged = [
        {
            "name": judged_name(words_),
            "unit": "%",
            "better": "higher",
            "trained_on": True,
            "values": {
                name: share(wins[name][source]).times(100).to_json() if name in wins else None for name in answers
            },
        }
        for source, words_ in SOURCES
    ]
    different = {"name": DISTINCT, "unit": "", "better": "higher", "trained_on": False, "values": distinct(answers)}
    return [*rows[:3], *judged, *rows[3:7], different, *rows[7:]]


def changes(answers: dict[str, list[Answer]], wins: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """One row a measure: its change at each step, new less old; the judge's preference less one half.

    Steps: from each model to the next, and from the first to the last.
    """
    names = list(answers)
    steps = [*pairwise(names), *([(names[0], names[-1])] if len(names) > 2 else [])]
    rows = [
        _row(m, {f"{a} → {b}": m.change(answers[a], answers[b]).to_json() for a, b in steps}, "steps")
        for m in all_measures()
    ]
    texts = {name: {a.id: a.answer for a in given} for name, given in answers.items()}
    of_distinct = {}
    for a, b in steps:
        both = [i for i in texts[b] if i in texts[a]]
        of_distinct[f"{a} → {b}"] = distinct_change([texts[a][i] for i in both], [texts[b][i] for i in both])
    rows.append(
        {"name": DISTINCT, "unit": "", "better": "higher", "trained_on": False,
         "steps": {step: found["change"].to_json() for step, found in of_distinct.items()},
         "falls_percent": {step: found["fall"].times(100).to_json() for step, found in of_distinct.items()}}
    )  # fmt: skip
    for source, words_ in SOURCES:
        given = {
            f"{names[0]} → {name}": _above_half(share(found[source])).to_json()
            for name, found in wins.items()
            if found[source]
        }
        if given:
            rows.append(
                {"name": judged_name(words_), "unit": "points above 50 %", "better": "higher", "trained_on": True,
                 "steps": given}
            )  # fmt: skip
    return rows


def _above_half(found: Estimate) -> Estimate:
    """A share as points above 50 %."""
    points = [None if x is None else 100 * x - 50 for x in (found.value, found.low, found.high)]
    return Estimate(points[0], points[1], points[2], found.n)


def judged_name(kind: str) -> str:
    return f"judge prefers it to start, {kind} prompts"


def _row(m: Measure, values: dict[str, Any], key: str = "values") -> dict[str, Any]:
    unit = "points" if key == "steps" and m.is_share else m.unit
    return {"name": m.name, "unit": unit, "better": m.better, "trained_on": m.trained_on, key: values}


def distinct(answers: dict[str, list[Answer]], n: int = 3) -> dict[str, Any]:
    """distinct-n of each model's answers, all on as many n-grams as the model that said least has."""
    texts = {name: [a.answer for a in given] for name, given in answers.items()}
    grams = min(sum(max(0, words(t) - n + 1) for t in given) for given in texts.values())
    return {name: distinct_interval(given, n, max_ngrams=grams).to_json() for name, given in texts.items()}


def side_by_side(answers: dict[str, list[Answer]], n: int = 6) -> list[dict[str, Any]]:
    """n prompts, half of each kind, spread over the held-out set, with every model's answer."""
    rows = []
    first = next(iter(answers.values()))
    for source in ("red_team", "helpful"):
        given = [a for a in first if a.source == source]
        for k in range(min(n // 2, len(given))):
            asked = given[k * len(given) // (n // 2)]
            said = {name: next((a.answer for a in all_ if a.id == asked.id), None) for name, all_ in answers.items()}
            text = "\n".join(f"{m.role}: {m.content}" for m in asked.prompt) if len(asked.prompt) > 1 else None
            rows.append({"prompt": text or asked.prompt[-1].content, "source": source, "answers": said})
    return rows
