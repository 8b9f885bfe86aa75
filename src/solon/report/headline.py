"""Whether training helped, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from solon.measures.statistics import Estimate, beyond_chance, p_beyond
from solon.tables import clean, estimate

NAMED = 3  # unclear measures that the sentence names; a larger number of them is only counted
GROUPS = ((False, "by measures that training did not push on"), (True, "by measures that training pushed on"))


def headline(data: dict[str, Any]) -> str:
    """From the first model to the last: the measures that rose, those that fell, and those that cannot be told.

    Each measure has one test, of the difference of the two models. `beyond_chance` takes a group of measures together,
    because one of ten intervals may miss by chance. A model that has lost its sense is said first.
    """
    names = [str(n) for n in data.get("models") or []]
    if len(names) < 2 or not data.get("changes"):
        return ""
    whole = f"{names[0]} → {names[-1]}"
    better: list[bool] = []  # for each measure that became better, whether training pushed on it
    worse = 0
    parts = []
    for trained_on, words in GROUPS:
        sentence, n_better, n_worse = _group(data["changes"], whole, trained_on)
        parts.append(f"{words}, {sentence}")
        better += [trained_on] * n_better
        worse += n_worse
    lost = f"{names[-1]} has lost its sense. " if (data.get("sense") or {}).get("lost") else ""
    return clean(f"{lost}{_verdict(better, worse)}, from {names[0]} to {names[-1]}: {'; '.join(parts)}.")


def _verdict(better: Sequence[bool], worse: int) -> str:
    """A rise of a measure that training pushed on is expected: alone it does not show that training helped."""
    if worse and better:
        return f"Training made {len(better)} of the measures better and {worse} worse"
    if worse:
        return f"Training did harm: it made {worse} of the measures worse and none better"
    if not better:
        return "Whether training helped cannot be told"
    if all(better):
        return "Whether training helped cannot be told, since only what it pushed on became better"
    return f"Training helped: it made {len(better)} of the measures better and none worse"


def _group(changes: Sequence[dict[str, Any]], step: str, trained_on: bool) -> tuple[str, int, int]:
    """A group of measures in words, and how many of the measures became better and worse."""
    rows = [c for c in changes if c["trained_on"] is trained_on and (c["steps"].get(step) or {}).get("n")]
    if not rows:
        return "nothing was measured", 0, 0
    estimates = [Estimate(*(c["steps"][step][k] for k in ("value", "low", "high", "n"))) for c in rows]
    rises = [(e.value or 0.0) > 0 for e in estimates]
    sure = beyond_chance(
        [p_beyond(e, 0.0, "above" if rise else "below") for e, rise in zip(estimates, rises, strict=True)]
    )
    moved: dict[bool, list[str]] = {True: [], False: []}  # by whether the measure rose
    unclear: list[str] = []
    n_better = n_worse = 0
    for row, e, rise, is_sure in zip(rows, estimates, rises, sure, strict=True):
        name = f'"{row["name"]}"' if "," in row["name"] else row["name"]
        if not is_sure:
            unclear.append(name)
            continue
        is_better = row["better"] == ("higher" if rise else "lower")
        judged = f", which is {'better' if is_better else 'worse'}" if row["better"] else ""
        moved[rise].append(f"{name} ({estimate(e.to_json(), row['unit'], sign=True)}{judged})")
        n_better += is_better
        n_worse += bool(row["better"]) and not is_better
    clauses = [
        f"training {verb} {listed(moved[rise])}" for verb, rise in (("raised", True), ("lowered", False)) if moved[rise]
    ]
    if len(unclear) > NAMED:
        of = f"the {len(unclear)} other" if clauses else f"the {len(unclear)}"
        clauses.append(f"it cannot be told whether training changed any of {of} measures")
    elif unclear:
        clauses.append(f"it cannot be told whether training changed {listed(unclear)}")
    return ", and ".join(clauses), n_better, n_worse


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
