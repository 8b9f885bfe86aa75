"""What the report says: titled tables of plain strings, in their order. Writers only escape and lay out (`render.py`).

A part that is missing says "not measured"; nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from solon.report import judging, reinforcement
from solon.report.cells import MISSING, Section, clean, duration, estimate, money, number, source, text

BETTER = {"higher": "higher", "lower": "lower"}
OUTCOMES = {True: "holds", False: "does not hold", None: MISSING}


def facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run was: label and value."""
    rules = data.get("constitution") or {}
    named = " ".join(str(rules[k]) for k in ("name", "version") if rules.get(k) is not None)
    return [
        ("recipe", text(data.get("recipe_name"))),
        ("created", text(data.get("created"))),
        ("start model", text(data.get("model"))),
        ("constitution", text(named or None)),
        ("constitution fingerprint", text(rules.get("fingerprint"))),
        ("principles", number(rules.get("principles"))),
        ("models compared", ", ".join(map(clean, models(data))) or MISSING),
    ]


def models(data: dict[str, Any]) -> list[str]:
    """The models' names in the run's order; where none are listed, those that a measure names."""
    named = data.get("models") or [m for row in data.get("measures") or [] for m in row.get("values") or {}]
    return list(dict.fromkeys(map(str, named)))


def sections(data: dict[str, Any]) -> list[Section]:
    """Every table of the report, in its order."""
    return [
        _checks(data),
        *_measures(data),
        _differences(data),
        *reinforcement.reward_model(data),
        *judging.judge(data),
        *judging.trust(data),
        *reinforcement.ppo(data),
        _stages(data),
        _principles(data),
    ]


def _checks(data: dict[str, Any]) -> Section:
    rows = (
        (
            text(c.get("name")),
            text(c.get("target")),
            number(c.get("value")),
            number(c.get("n")),
            _outcome(c),
        )
        for c in data.get("checks") or []
    )
    note = "What a run of this recipe should show, and whether this one does."
    return Section("Checks", note, ("check", "target", "value", "n", "outcome"), tuple(rows))


def _outcome(check: dict[str, Any]) -> str:
    return OUTCOMES.get(check.get("holds"), MISSING) if check.get("value") is not None else MISSING


def _measures(data: dict[str, Any]) -> list[Section]:
    groups: dict[bool | None, tuple[str, str]] = {
        False: (
            "Measures that nothing was trained on",
            "Only these can catch training being gamed. Value [95 % interval], n = answers.",
        ),
        True: (
            "Measures that training pushed on",
            "Reward model and judge trained these models: a rise here is expected and proves little alone.",
        ),
        None: ("Other measures", "The data does not say whether training pushed on these."),
    }
    given = data.get("measures") or []
    found = []
    for trained_on, (title, note) in groups.items():
        rows = tuple(measure_row(m, models(data)) for m in given if m.get("trained_on") is trained_on)
        if rows or trained_on is not None:
            found.append(Section(title, note, ("measure", "better", *map(clean, models(data))), rows))
    return found


def measure_row(row: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    values = row.get("values") or {}
    unit = row.get("unit") or ""
    better = BETTER.get(row.get("better") or "", "–")
    return (text(row.get("name")), better, *(estimate(values.get(name), unit) for name in names))


def _differences(data: dict[str, Any]) -> Section:
    rows = tuple((clean(step), estimate(found, "sd")) for step, found in (data.get("differences") or {}).items())
    note = "Mean difference of the held-out reward, prompt by prompt."
    return Section("Held-out reward, step by step", note, ("step", "difference"), rows)


def _stages(data: dict[str, Any]) -> Section:
    given = data.get("stages") or []
    counts = ("records", "prompt_tokens", "completion_tokens", "trained_tokens")

    def line(name: str, stage: dict[str, Any]) -> tuple[str, ...]:
        records, *tokens = (number(stage.get(key)) for key in counts)
        return (name, records, duration(stage.get("seconds")), *tokens, money(stage.get("cost_usd")))

    rows = [line(text(s.get("name")), s) for s in given]
    if len(given) > 1:
        sums = {key: _sum(s.get(key) for s in given) for key in ("seconds", *counts[1:], "cost_usd")}
        name, _, *rest = line("all stages", sums)
        rows.append((name, "–", *rest))  # records of different kinds do not add up
    head = ("stage", "records", "time", "prompt tokens", "completion tokens", "trained tokens", "cost")
    return Section("Stages", "A total with a part that was not measured is not measured.", head, tuple(rows))


def _principles(data: dict[str, Any]) -> Section:
    rows = (
        (
            text(p.get("id")),
            number(p.get("revisions")),
            number(p.get("comparisons")),
            number(p.get("mean_label"), 3),
        )
        for p in data.get("principles") or []
    )
    note = "Mean label: P(first response is better), asked in both orders; over many comparisons about 0.5."
    head = ("principle", "revisions", "comparisons", "mean label")
    return Section("Principles", note, head, tuple(rows))


def answers(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Sampled prompts with every model's answer: {"prompt", "source", "answers": [(model, text)]}."""
    return [
        {
            "prompt": text(row.get("prompt")),
            "source": source(row),
            "answers": [(clean(name), _said((row.get("answers") or {}).get(name))) for name in models(data)],
        }
        for row in data.get("answers") or []
    ]


def _said(answer: str | None) -> str:
    if answer is None:
        return MISSING
    return clean(answer) if answer.strip() else "(an empty answer)"


def _sum(values: Iterable[Any]) -> Any:
    found = list(values)
    return None if any(v is None for v in found) else sum(found)
