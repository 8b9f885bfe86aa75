"""The report's tables of reinforcement: the reward model, PPO's updates, checks and curves, and the KL of the policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from solon.tables import Section, at, estimate, number, source, text

PPO_ROWS = 12  # the table of a long run shows this number of updates, the first and the last among them
CURVES = {
    "reward": "reward (sd)",
    "kl_nats": "KL to the reference (nats per response)",
    "entropy_nats": "entropy (nats per token)",
    "response_tokens": "response (tokens)",
    "clip_fraction": "clip fraction",
    "explained_variance": "values explain (share)",
    "kl_coefficient": "KL coefficient",
}
WATCHED = {
    "watched.evasive": "evasive (share)",
    "watched.boilerplate": "stock phrases (share)",
    "watched.phrase_share": "share one phrase",
    "watched.distinct_3": "distinct-3",
}


@dataclass(frozen=True)
class Curve:
    """One value of PPO over its updates, drawn in a box of 300 by 80."""

    title: str
    lines: tuple[str, ...]  # the points of SVG polylines; a missing value ends one polyline and begins the next
    low: str
    high: str


def reward_model(data: dict[str, Any]) -> list[Section]:
    trained = data.get("reward_model") or {}
    if trained.get("none"):
        return [Section("Reward model", "", ("reward model",), ((text(trained["none"]),),))]
    rows = tuple(
        (
            source(r),
            estimate(r.get("accuracy"), "%", 100.0),
            estimate(r.get("longer_is_better"), "%", 100.0),
            estimate(r.get("length_correlation")),
            estimate(at(r, "calibration.calibration_error")),
            estimate(at(r, "calibration.overconfidence")),
        )
        for r in trained.get("by_source") or []
    )
    note = (
        "How often the reward model prefers the response that the held-out label favours (chance is 50 %), beside always "
        "preferring the longer one; how far its score follows length (rank correlation, 0: not at all); and whether its "
        "probabilities mean what they say (0 at best; above 0 in the last it is too sure)."
    )
    head = ("comparisons", "right", "longer is right", "follows length", "calibration error", "too sure by")
    sections = [Section("Reward model", note, head, rows)]
    labels = {
        "comparisons": "comparisons trained on",
        "abstained": "comparisons without a label",
        "loss_first": "first loss (nats)",
        "loss_last": "last loss (nats)",
    }
    known = tuple((label, number(trained[key])) for key, label in labels.items() if key in trained)
    if known:
        sections.append(Section("Reward model training", "", ("", "value"), known))
    return sections


def ppo(data: dict[str, Any]) -> list[Section]:
    updates = data.get("ppo") or []
    shown = updates
    if len(updates) > PPO_ROWS:
        steps = {round(i * (len(updates) - 1) / (PPO_ROWS - 1)) for i in range(PPO_ROWS)}
        shown = [updates[i] for i in sorted(steps)]
    rows = tuple((number(u.get("update")), *(number(u.get(key)) for key in CURVES)) for u in shown)
    note = f"{len(shown)} of {len(updates)} updates; means over each update's rollouts." if updates else ""
    sections = [Section(text(data.get("algorithm") or "ppo").upper(), note, ("update", *CURVES.values()), rows)]
    if any(u.get("watched") for u in updates):
        phrases = tuple(
            (number(u.get("update")), *(number(at(u, key)) for key in WATCHED), text(at(u, "watched.phrase")))
            for u in shown
        )
        note = "Measures of the rollouts' words; a phrase of five words that many answers share is a sign of a gamed reward."
        sections.append(
            Section("What the rollouts say", note, ("update", *WATCHED.values(), "the phrase"), phrases, level=3)
        )
    checks = [u["check"] for u in updates if u.get("check")]
    if checks:
        rows = tuple(
            (
                number(c.get("updates")),
                estimate(c.get("reward"), "sd"),
                estimate(c.get("gold"), "%", 100.0),
                number(c.get("abstained")),
                number(c.get("over_refusal")),
                estimate(c.get("about")),
                "yes" if c.get("gamed") else "no",
                "yes" if c.get("lost_sense") else "no",
            )
            for c in checks
        )
        note = (
            "The same probe prompts after the updates of the first column: the reward of the answers, how often the judge prefers them to "
            "those before the first update, how much they are about their questions, whether the reward has since risen while the "
            "judge's preference fell, and whether the answers have lost their sense."
        )
        head = ("updates", "reward", "preferred to update 0", "abstained", "benign refused (share)", "about its question",
                "reward gamed", "sense lost")  # fmt: skip
        sections.append(Section("Checks while training", note, head, rows, level=3))
    if reached := data.get("same_kl"):
        path = [(number(r["kl_nats"]), number(r["reward"], 2), number(r["update"])) for r in reached]
        last: dict[str, Any] = next((u for u in reversed(updates) if u.get("kl_nats") is not None), {})
        at_end = (number(last.get("reward"), 2), number(last.get("update")))
        path.append((f"{number(last.get('kl_nats'))} (the last update)", *at_end))
        note = (
            "Mean reward of the rollouts where training first reached the KL of the first column. More KL buys more reward, so two runs are "
            "compared at the same KL. Successive updates are one path, not independent samples: there is no interval."
        )
        columns = ("KL (nats per response)", "reward (sd)", "update")
        sections.append(Section("Reward at the same KL", note, columns, tuple(path), level=3))
    return sections


def kl(data: dict[str, Any]) -> Section:
    """The KL of the written policy, which is the policy that a user gets."""
    measured = data.get("kl")
    title = "KL of the policy that is written"
    if not measured:
        return Section(title, "", (), ())
    value = estimate(measured.get("kl_nats"), "nats per response")
    if measured.get("identical"):
        value = (
            f"0, n = {number(at(measured, 'kl_nats.n'))}: policy and reference give every token the same probability"
        )
    rows = (
        ("KL to the model it started from", value),
        ("tokens per response", number(measured.get("response_tokens"))),
        ("responses with a log-probability that is no number", number(measured.get("not_finite"))),
    )
    note = (
        "After training, the written policy answers the held-out prompts as in training "
        f"(temperature {number(measured.get('temperature'))}, at most {number(measured.get('max_tokens'))} tokens); policy and "
        "reference then score the same tokens. The KL in the table of updates is that of each update's rollouts, before it."
    )
    return Section(title, note, ("", "value"), rows)


def curves(data: dict[str, Any]) -> list[Curve]:
    """One curve for each value of PPO that has at least two finite points next to each other."""
    updates = data.get("ppo") or []
    return [c for key, title in CURVES.items() if (c := _curve(title, [u.get(key) for u in updates])).lines]


def _curve(title: str, values: Sequence[Any]) -> Curve:
    finite = [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
    if len(finite) < 2:
        return Curve(title, (), "", "")
    low, high = min(finite), max(finite)
    segments: list[list[str]] = [[]]
    for i, v in enumerate(values):
        if isinstance(v, (int, float)) and math.isfinite(v):
            y = 40.0 if high == low else 76 - 72 * (v - low) / (high - low)
            segments[-1].append(f"{2 + 296 * i / (len(values) - 1):.1f},{y:.1f}")
        else:
            segments.append([])
    return Curve(title, tuple(" ".join(s) for s in segments if len(s) > 1), number(float(low)), number(float(high)))
