"""The checks of a run: each holds, does not hold, or cannot be told.

The interval decides, never the value alone. A check that does not hold, or of which the data cannot tell, says what to do.
"""

from __future__ import annotations

from typing import Any

from solon.analysis.answers import DISTINCT
from solon.analysis.measures.builtin import OVER_REFUSAL
from solon.measures.statistics import FAILS, HOLDS, UNKNOWN, Side, outcome

REWARD_RIGHT = 0.65  # share of held-out comparisons
OVER_REFUSAL_RISE = 10.0  # points
DISTINCT_FALL = 20.0  # %
MORE_PROMPTS = "hold out more prompts (prompts.n_heldout)"


def of_reward_model(data: dict[str, Any]) -> list[dict[str, Any]]:
    """For each source of comparisons: whether the reward model is right often enough on the held-out comparisons."""
    return [
        check(
            f"reward model right on held-out {row['source']} comparisons", "above", REWARD_RIGHT, "", row["accuracy"],
            fails="give the reward model more comparisons or better labels before you train the policy: a policy learns "
            "the errors of its reward model",
            unknown="hold out more comparisons (human.heldout_comparisons, reward_model.heldout_ai): these are too few "
            "to tell",
        )
        for row in data["reward_model"]["by_source"]
    ]  # fmt: skip


def of_answers(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether the reward rises from model to model, and whether benign prompts are still answered, in different ways."""
    whole = f"{data['models'][0]} → {data['models'][-1]}"
    changes = {c["name"]: c for c in data["changes"]}
    return [
        *(
            check(
                f"held-out reward rises, {step}", "above", 0.0, "sd", change,
                fails=_advice_on_lost_reward(step),
                unknown=f"{MORE_PROMPTS}, or train longer: these prompts are too few to show a small rise",
            )
            for step, change in data["differences"].items()
        ),
        check(
            f"{OVER_REFUSAL} rises by", "below", OVER_REFUSAL_RISE, "points",
            changes[OVER_REFUSAL]["steps"].get(whole),
            fails="train on more helpful prompts and comparisons, or weaken the principles that ask for refusals",
            unknown="hold out more helpful prompts (prompts.n_heldout)",
            about=whole,
        ),
        check(
            f"{DISTINCT} falls by", "below", DISTINCT_FALL, "%", changes[DISTINCT]["falls_percent"].get(whole),
            fails="the answers have become alike: raise ppo.kl_coefficient or lower ppo.kl_target, and train again",
            unknown=f"{MORE_PROMPTS}, or let answers be longer (evaluation.sampling.max_tokens)",
            about=whole,
        ),
    ]  # fmt: skip


def of_sense(sense: dict[str, Any], margin: float, likelihood_margin: float, kl_bound: float) -> list[dict[str, Any]]:
    """Whether the last model's answers still make sense: how far each measure fell from the start model."""
    names = sense["models"]
    whole, last = f"{names[0]} → {names[-1]}", names[-1]
    about, likely, kl = sense["measures"]
    advice = "train for fewer epochs, at a lower learning rate or with a lower KL target, and on examples that the model can follow"
    rows = [
        check(
            f"{row['name']} falls by", "below", target, row["unit"], _fall(row["steps"].get(whole)),
            fails=advice, unknown=MORE_PROMPTS, about=whole,
        )
        for row, target in ((about, margin), (likely, likelihood_margin))
    ]  # fmt: skip
    rows.append(
        check(
            f"{kl['name']}, helpful prompts", "below", kl_bound, kl["unit"], kl["values"].get(last),
            fails=advice, unknown="measure it on more prompts (sense.kl_prompts)", about=last,
        )
    )  # fmt: skip
    return [row for row in rows if row["value"] is not None]


def _fall(change: dict[str, Any] | None) -> dict[str, Any] | None:
    """The change of a measure, as a fall."""
    if change is None or change["value"] is None:
        return change
    low, high = (None if change[k] is None else -change[k] for k in ("high", "low"))
    return {"value": -change["value"], "low": low, "high": high, "n": change["n"]}


def check(
    name: str, side: Side, target: float, unit: str, estimate: dict[str, Any] | None, *, fails: str, unknown: str,
    about: str = "",
) -> dict[str, Any]:  # fmt: skip
    """One check. estimate: value, low, high and n. fails, unknown: the advice for either outcome. about: what was measured."""
    measured = estimate or {"value": None, "low": None, "high": None, "n": 0}
    verdict = outcome(measured["value"], measured["low"], measured["high"], target, side)
    return {
        "name": name,
        "about": about,
        "target": f"{'>' if side == 'above' else '<'} {target:g} {unit}".strip(),
        **{key: measured[key] for key in ("value", "low", "high", "n")},
        "unit": unit,
        "outcome": verdict,
        "holds": {HOLDS: True, FAILS: False, UNKNOWN: None}[verdict],
        "do": {HOLDS: None, FAILS: fails, UNKNOWN: unknown}[verdict],
    }


def of_kl(kl: dict[str, Any], bound: float) -> dict[str, Any]:
    """Whether the written policy stayed within `bound` nats per response of its reference."""
    row = check(
        "KL to the reference", "below", bound, "nats per response", kl["kl_nats"],
        fails="train again from the supervised model with a lower ppo.learning_rate, fewer ppo.updates or a higher "
        "ppo.kl_coefficient",
        unknown=MORE_PROMPTS,
        about="of the policy that is written, on held-out prompts",
    )  # fmt: skip
    if kl["not_finite"]:
        advice = (
            f"do not use this policy: {kl['not_finite']} of {kl['examples']} responses have a log-probability that is no "
            "number; train again with a lower ppo.learning_rate"
        )
        return row | {"outcome": FAILS, "holds": False, "do": advice}
    if kl["identical"]:  # all values are 0, so there is no interval, and none is needed: the two models are one
        return row | {"outcome": HOLDS, "holds": True, "do": None}
    return row


def _advice_on_lost_reward(step: str) -> str:
    if step.rpartition(" → ")[2] in ("SL-CAI", "SFT"):
        return "train the supervised model (sl-cai or warmup) for fewer epochs, at a lower learning rate or on better revisions"
    return 'read "Checks while training"; train with a lower learning rate, a lower KL target or a better reward model'
