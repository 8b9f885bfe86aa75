"""Whether training helped, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from solon.measures.statistics import Estimate, beyond_chance, p_beyond
from solon.tables import clean, estimate

NAMED = 3  # so many measures of which it cannot be told are named; more are counted
GROUPS = ((False, "by measures that training did not push on"), (True, "by measures that training pushed on"))


def headline(data: dict[str, Any]) -> str:
    """From the first model to the last: what rose, what fell, and of what it cannot be told.

    Each group of measures is held against chance as a whole: of ten intervals one may miss by chance alone.
    """
    names = [str(n) for n in data.get("models") or []]
    if len(names) < 2 or not data.get("changes"):
        return ""
    whole = f"{names[0]} → {names[-1]}"
    better: list[bool] = []  # of each measure that became better, whether training pushed on it
    worse: list[bool] = []
    parts = []
    for trained_on, words in GROUPS:
        said, good, bad = _group(data["changes"], whole, trained_on)
        parts.append(f"{words}, {said}")
        better += [trained_on] * good
        worse += [trained_on] * bad
    return clean(f"{_verdict(better, worse)}, from {names[0]} to {names[-1]}: {'; '.join(parts)}.")


def _verdict(better: Sequence[bool], worse: Sequence[bool]) -> str:
    """What training pushed on is expected to rise: alone it does not show that training helped."""
    if worse and better:
        return f"Training made {len(better)} of the measures better and {len(worse)} worse"
    if worse:
        return f"Training did harm: it made {len(worse)} of the measures worse and none better"
    if not better:
        return "Whether training helped cannot be told"
    if all(better):
        return "Whether training helped cannot be told, since only what it pushed on became better"
    return f"Training helped: it made {len(better)} of the measures better and none worse"


def _group(changes: Sequence[dict[str, Any]], step: str, trained_on: bool) -> tuple[str, int, int]:
    """What a group of measures says, and how many of them became better and worse."""
    rows = [c for c in changes if c["trained_on"] is trained_on and (c["steps"].get(step) or {}).get("n")]
    if not rows:
        return "nothing was measured", 0, 0
    found = [Estimate(*(c["steps"][step][k] for k in ("value", "low", "high", "n"))) for c in rows]
    sure = beyond_chance([p_beyond(e, 0.0, "above" if (e.value or 0.0) > 0 else "below") for e in found])
    raised: list[str] = []
    lowered: list[str] = []
    unknown: list[str] = []
    good = bad = 0
    for row, e, yes in zip(rows, found, sure, strict=True):
        if not yes:
            unknown.append(_quoted(row["name"]))
            continue
        (raised if (e.value or 0.0) > 0 else lowered).append(_moved(row, e))
        good += row["better"] == _direction(e)
        bad += row["better"] not in ("", _direction(e))
    said = [f"training {word} {listed(items)}" for word, items in (("raised", raised), ("lowered", lowered)) if items]
    if len(unknown) > NAMED:
        of = f"the {len(unknown)} other" if said else f"the {len(unknown)}"
        said.append(f"it cannot be told whether training changed any of {of} measures")
    elif unknown:
        said.append(f"it cannot be told whether training changed {listed(unknown)}")
    return ", and ".join(said), good, bad


def _direction(e: Estimate) -> str:
    return "higher" if (e.value or 0.0) > 0 else "lower"


def _moved(row: dict[str, Any], e: Estimate) -> str:
    judged = f", which is {'better' if row['better'] == _direction(e) else 'worse'}" if row["better"] else ""
    return f"{_quoted(row['name'])} ({estimate(e.to_json(), row['unit'], sign=True)}{judged})"


def _quoted(name: str) -> str:
    return f'"{name}"' if "," in name else name


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
