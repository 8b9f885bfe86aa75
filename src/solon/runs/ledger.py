"""What each stage cost and what it left out, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from solon.tables import MISSING, clean, counted, money, number

FAILED = "failed for a reason that is not known"


def cost(stage: Mapping[str, Any]) -> str:
    """`$0.00, runs here`; `$0.0123, gpt-x`; or the models whose price is not known."""
    if unpriced := stage.get("unpriced"):
        return f"price of {clean(', '.join(unpriced))} not known"
    usd, asked = stage.get("cost_usd"), stage.get("endpoints") or []
    if usd is None:
        return MISSING
    return f"{money(usd)}, {clean(', '.join(asked)) if asked else 'runs here'}"


def total_cost(stages: Sequence[Mapping[str, Any]]) -> float | None:
    """US dollars of all stages; None where the price of a model that was asked is not known."""
    spent = [stage.get("cost_usd") for stage in stages]
    return None if any(usd is None for usd in spent) else sum(usd for usd in spent if usd is not None)


def left_out(stage: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """By reason, how many of a stage's items came to nothing; and how many items there were."""
    result = stage.get("result") or {}
    found: Counter[str] = Counter()
    for given in (stage.get("left_out"), result.get("left_out"), stage.get("abstained")):
        found.update({str(k): int(n) for k, n in (given or {}).items() if n})
    missing, reasons = int(stage.get("missing") or 0), stage.get("reasons") or {}
    found.update({str(k): int(n) for k, n in reasons.items() if n})
    if missing > sum(reasons.values()):
        found[FAILED] += missing - sum(reasons.values())
    if isinstance(result.get("abstained"), int) and result["abstained"]:
        found["without a label"] += result["abstained"]
    if result.get("not_finite"):
        found["log-probability is no number"] += result["not_finite"]
    for source, measured in (result.get("heldout") or {}).items():
        if n := int(measured.get("left_out") or 0):
            found[f"held-out {source} comparison too long"] += n
    if "left_out_of" in result:  # PPO's records are updates, and what it leaves out are prompts
        return dict(found), int(result["left_out_of"])
    # What abstained or is no number is still among the records.
    among = sum((stage.get("abstained") or {}).values()) + int(result.get("not_finite") or 0)
    among += int(result.get("abstained") or 0) if stage.get("name") == "judge-reward" else 0
    return dict(found), int(stage.get("records") or 0) + sum(found.values()) - among


def left_out_line(stage: Mapping[str, Any]) -> str:
    """`revisions: left out 3 of 96 (2 empty revision, 1 too long)`; empty where nothing was."""
    reasons, of = left_out(stage)
    if not reasons:
        return ""
    name = clean(str(stage.get("name")))
    return f"{name}: left out {number(sum(reasons.values()))} of {number(of)} ({counted(reasons)})"
