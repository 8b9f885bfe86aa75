"""The cost of each stage and the items that it left out, in words."""

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
    usd, endpoints = stage.get("cost_usd"), stage.get("endpoints") or []
    if usd is None:
        return MISSING
    return f"{money(usd)}, {clean(', '.join(endpoints)) if endpoints else 'runs here'}"


def total_cost(stages: Sequence[Mapping[str, Any]]) -> float | None:
    """The US dollars of all stages together; None where the price of one model is not known."""
    costs = [stage.get("cost_usd") for stage in stages]
    return None if None in costs else sum(usd for usd in costs if usd is not None)


def left_out(stage: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """The number of items that a stage left out, by reason; and the number of all items."""
    result = stage.get("result") or {}
    counts: Counter[str] = Counter()
    missing, reasons = int(stage.get("missing") or 0), stage.get("reasons") or {}
    for group in (stage.get("left_out"), result.get("left_out"), stage.get("abstained"), reasons):
        counts.update({str(reason): int(n) for reason, n in (group or {}).items() if n})
    if missing > sum(reasons.values()):
        counts[FAILED] += missing - sum(reasons.values())
    if isinstance(result.get("abstained"), int) and result["abstained"]:
        counts["without a label"] += result["abstained"]
    if result.get("not_finite"):
        counts["log-probability is no number"] += result["not_finite"]
    for source, measured in (result.get("heldout") or {}).items():
        if n := int(measured.get("left_out") or 0):
            counts[f"held-out {source} comparison too long"] += n
    if "left_out_of" in result:  # the records of PPO are updates, but it leaves out prompts
        return dict(counts), int(result["left_out_of"])
    # An abstention, or a score that is no number, is still one of the records.
    kept = sum((stage.get("abstained") or {}).values()) + int(result.get("not_finite") or 0)
    kept += int(result.get("abstained") or 0) if stage.get("name") == "judge-reward" else 0
    return dict(counts), int(stage.get("records") or 0) + sum(counts.values()) - kept


def left_out_line(stage: Mapping[str, Any]) -> str:
    """`revisions: left out 3 of 96 (2 empty revision, 1 too long)`; empty where nothing was left out."""
    reasons, total = left_out(stage)
    if not reasons:
        return ""
    name = clean(str(stage.get("name")))
    return f"{name}: left out {number(sum(reasons.values()))} of {number(total)} ({counted(reasons)})"
