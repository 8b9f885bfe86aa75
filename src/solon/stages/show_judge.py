"""The report's tables of the judge: how far to trust it, against people and by principle."""

from __future__ import annotations

from typing import Any

from solon.stages.plots import reliability
from solon.tables import Section, at, estimate, number, text

TRUST_PARTS = {"labels": "labels of this run", "heldout": "held-out human comparisons"}
# label, path in the summary of `feedback.trust`, unit, factor
TRUST_ROWS = (
    ("contradicts itself when the order is swapped", "position.contradictions", "%", 100.0),
    ("prefers what is shown first", "position.first_shown", "%", 100.0),
    ("being shown first adds (log-odds)", "position.bias", "", 1.0),
    ("prefers the longer response, in words", "length.words.judge", "%", 100.0),
    ("… people, on the pairs they decided", "length.words.people", "%", 100.0),
    ("… judge minus people, on these", "length.words.difference", "points", 100.0),
    ("prefers the longer response, in characters", "length.characters.judge", "%", 100.0),
    ("prefers its own response", "self_preference.judge", "%", 100.0),
    ("… people, on the pairs they decided", "self_preference.people", "%", 100.0),
    ("… judge minus people, on these", "self_preference.difference", "points", 100.0),
    ("sees its own better response more often than another's, by", "self_preference.opportunity_gap", "points", 100.0),
    ("principles agree with each other", "agreement.mean", "%", 100.0),
    ("ties, of pairs", "ties.pairs", "%", 100.0),
    ("ties, of judgements", "ties.judgements", "%", 100.0),
    ("abstentions, of pairs", "abstentions.pairs", "%", 100.0),
    ("abstentions, of judgements", "abstentions.judgements", "%", 100.0),
    ("agrees with people", "calibration.accuracy", "%", 100.0),
)
CALIBRATION_ROWS = (
    ("agrees with people", "accuracy", "%", 100.0),
    ("Cohen's kappa", "kappa", "", 1.0),
    ("confidence less share right", "overconfidence", "", 1.0),
    ("Brier score", "brier", "", 1.0),
    ("log loss (nats)", "log_loss", "", 1.0),
    ("expected calibration error", "calibration_error", "", 1.0),
)


def judge(data: dict[str, Any]) -> list[Section]:
    """The judge in a report.json of an older Solon, which did not measure trust."""
    judge = data.get("judge")
    if not judge:
        return []
    labels = {
        "accuracy": "agrees with the person",
        "choose_longer": "choosing the longer response would",
        "flips": "changes its mind when the order is swapped",
    }
    rows = [(label, estimate(judge.get(key), "%", 100.0)) for key, label in labels.items()]
    rows.append(("abstentions", number(judge.get("abstained"))))
    note = "On held-out human comparisons, each under its own principle, in both orders; chance is 50 %."
    return [Section("Judge", note, ("", "value"), tuple(rows))]


def trust(data: dict[str, Any]) -> list[Section]:
    """Whether the judge can be trusted; no section where no judge was measured."""
    parts = {name: part for key, name in TRUST_PARTS.items() if (part := (data.get("trust") or {}).get(key))}
    if not parts:
        return []
    findings = tuple(
        f"{name[0].upper()}{name[1:]}: {sentence}"
        for name, part in parts.items()
        for sentence in part.get("findings") or ["None of the faults that are looked for was found."]
    )
    rows = [
        (label, *(estimate(at(part, path), unit, scale) for part in parts.values()))
        for label, path, unit, scale in TRUST_ROWS
        if any(at(part, path) for part in parts.values())
    ]
    reasons = [
        "; ".join(f"{text(k)}: {number(n)}" for k, n in (at(part, "abstentions.reasons") or {}).items())
        for part in parts.values()
    ]
    if any(reasons):
        rows.append(("reasons of abstentions (judgements)", *(text or "–" for text in reasons)))
    note = (
        "Value [95 % interval], n. A judge that throws a coin contradicts itself in 50 % and prefers what is shown "
        "first in 50 %; a longer response may be better, so people's share stands beside the judge's."
    )
    sections = [Section("Can the judge be trusted?", note, ("judge", *parts), tuple(rows), findings)]
    for key, name in TRUST_PARTS.items():
        if name in parts:
            sections += _against_people(key, name, parts[name]) + _by_principle(name, parts[name])
    return sections


def _against_people(key: str, name: str, trust: dict[str, Any]) -> list[Section]:
    """How well the judge's probabilities fit people's choices."""
    measured = trust.get("calibration") or {}
    if not measured.get("n"):
        return []
    shown = {"all pairs": measured}
    note = (
        "P(first is better) against people's choice. Confidence is that of the favoured side; Brier score, log loss "
        "and calibration error are 0 at best. With this number of pairs a perfectly calibrated judge has a calibration error "
        f"under {number(measured.get('error_by_chance'), 3)} in 95 of 100 samples."
    )
    if fitted := measured.get("temperature"):
        shown |= {"other half": fitted.get("before"), "other half, recalibrated": fitted.get("after")}
        bound = " (the bound of the search)" if fitted.get("at_bound") else ""
        note += (
            f" One temperature, fitted on about half of the pairs ({number(fitted.get('n_fit'))}), is "
            f"{number(fitted.get('value'))}{bound}; above 1 the judge was too sure. Log loss that it saves on the other "
            f"half: {estimate(fitted.get('log_loss_saved'))}."
        )
    rows = tuple(
        (label, *(estimate(at(part, path), unit, scale) if at(part, path) else "–" for part in shown.values()))
        for label, path, unit, scale in CALIBRATION_ROWS
    )
    bins = measured.get("bins") or []
    curve = tuple(
        (
            f"{number(b.get('low'), 2)} to {number(b.get('high'), 2)}",
            number(b.get("confidence"), 3),
            estimate(b.get("right"), "%", 100.0),
        )
        for b in bins
    )
    plot = reliability(bins, f"reliability-{key}") if bins else ""
    return [
        Section(f"Judge against people: {name}", note, ("", *shown), rows, level=3),
        Section(f"Reliability: {name}", "", ("confidence", "mean", "right"), curve, plot=plot, level=3),
    ]


def _by_principle(name: str, trust: dict[str, Any]) -> list[Section]:
    """One row per principle, the agreement of every two principles, and the wins by author."""
    rows = tuple(
        (
            text(p.get("principle")),
            "verified, no model asked" if p.get("kind") == "check" else "model",
            number(p.get("n")),
            number(p.get("abstained")),
            number(p.get("ties")),
            estimate(p["confidence"]) if p.get("confidence") else "–",
            estimate(p.get("agrees_with_people"), "%", 100.0),
        )
        for p in trust.get("principles") or []
    )
    head = ("principle", "judged by", "judgements", "abstained", "ties", "mean |log-odds|", "agrees with people")
    sections = [Section(f"Judge by principle: {name}", "", head, rows, level=3)] if rows else []
    if cells := at(trust, "agreement.cells"):
        names = sorted({c["a"] for c in cells} | {c["b"] for c in cells})
        by_pair = {(c["a"], c["b"]): c for c in cells}
        matrix = tuple(
            (f"{i}. {text(a)}", *(_agreement(by_pair.get((a, b))) if a < b else "" for b in names[1:]))
            for i, a in enumerate(names[:-1], 1)
        )
        note = (
            f"Share of pairs on which two principles decide alike; Cohen's kappa; pairs. Mean kappa: "
            f"{number(at(trust, 'agreement.mean_kappa'), 2)}."
        )
        columns = ("principle", *(f"{i}. {text(b)}" for i, b in enumerate(names[1:], 2)))
        sections.append(Section(f"Agreement between principles: {name}", note, columns, matrix, level=3))
    if authors := trust.get("authors"):
        wins = tuple((text(a.get("author")), estimate(a.get("wins"), "%", 100.0)) for a in authors)
        sections.append(Section(f"Wins by author: {name}", "", ("author", "preferred by the judge"), wins, level=3))
    return sections


def _agreement(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    return f"{100 * cell['agree']['value']:.0f} %; {number(cell['kappa']['value'], 2)}; {number(cell['agree']['n'])}"
