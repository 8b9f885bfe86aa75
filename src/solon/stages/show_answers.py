"""The report's tables of the evaluation: measures by model, and their changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from solon.tables import Section, clean, estimate, text

BETTER = {"higher": "higher", "lower": "lower"}


def models(data: dict[str, Any]) -> list[str]:
    """The models' names in the run's order; where none are listed, those that a measure names."""
    named = data.get("models") or [m for row in data.get("measures") or [] for m in row.get("values") or {}]
    return list(dict.fromkeys(map(str, named)))


def measures(data: dict[str, Any]) -> list[Section]:
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
    rows_by_model = data.get("measures") or []
    sections = []
    for trained_on, (title, note) in groups.items():
        rows = tuple(measure_row(m, models(data)) for m in rows_by_model if m.get("trained_on") is trained_on)
        if rows or trained_on is not None:
            head = ("measure", "better", *map(clean, models(data)))
            sections.append(Section(title, note, head, rows, first=True))
    return sections


def measure_row(row: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    values = row.get("values") or {}
    unit = row.get("unit") or ""
    better = BETTER.get(row.get("better") or "", "–")
    return (text(row.get("name")), better, *(estimate(values.get(name), unit) for name in names))


def changes(data: dict[str, Any]) -> Section:
    changed = data.get("changes") or []
    steps = list(dict.fromkeys(step for c in changed for step in c.get("steps") or {}))
    rows = tuple(
        (
            text(c.get("name")),
            BETTER.get(c.get("better") or "", "–"),
            "yes" if c.get("trained_on") else "no",
            *(_change(c, step) for step in steps),
        )
        for c in sorted(changed, key=lambda c: bool(c.get("trained_on")))
    )
    note = (
        "The later model minus the earlier one, prompt by prompt. The judge's preference is shown minus 50 %. An interval that holds 0 "
        "does not say that nothing changed: it cannot be told."
    )
    head = ("measure", "better", "training pushed on it", *map(clean, steps))
    return Section("Changes from model to model", note, head, rows, first=True)


def _change(row: dict[str, Any], step: str) -> str:
    change = (row.get("steps") or {}).get(step)
    return "–" if change is None else estimate(change, row.get("unit") or "", sign=True)
