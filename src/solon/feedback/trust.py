"""Measures of how far a judge can be trusted, from the judge's comparisons.

`Trust` takes comparisons one by one and keeps counts, so a labelling run of any size is measured while it runs. Most measures
need the judge's answers only (does the verdict change with the order? does the longer response win?). Where people labelled
the same pairs, their choices are measured as well, because the longer response may be the better one. `summary` gives every
number with its n and its 95 % interval. `findings` names the faults in words.

Terms: a *pair* is one comparison; a *judgement* is the verdict of one principle on a pair, asked in both orders; an *answer*
is one order of a judgement. The sides are "chosen" (the response that the label favours) and "rejected", as in `Comparison`.
Biases towards style, flattery or authority are not measured: they need pairs that are written for the purpose.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from solon.feedback.labels import odds_of
from solon.measures.agreement import kappa
from solon.measures.calibration import Calibration, flipped
from solon.measures.statistics import (
    TIE,
    Estimate,
    Ratio,
    Side,
    beyond_chance,
    difference_of_shares,
    p_beyond,
    paired_difference_of_shares,
    wilson,
)
from solon.measures.texts import words
from solon.records import Comparison, Judgement, fingerprint, text_of

ABOVE: Side = "above"
BELOW: Side = "below"
# An interval must lie beyond these bounds before a finding is raised. Without them, a difference too small to matter would be
# a finding among thousands of pairs.
CONTRADICTIONS = 0.25  # share of judgements; a judge that knows half of its answers and guesses the rest has this share
POSITION = 0.05  # distance from 0.5; both orders are averaged, so a smaller position bias changes few labels
BESIDE_PEOPLE = 0.05  # distance from the people's share on the same pairs, and of the opportunity gap from 0
WITHOUT_PEOPLE = 0.10  # distance from 0.5 where no people labelled: the longer response is often the better one
TIES = 0.25  # share of pairs; a tie teaches a reward model nothing
ABSTENTIONS = 0.05  # share of judgements; with more, the other judgements may not represent the pairs
OVERCONFIDENCE = 0.05  # mean confidence minus the share of right labels
REASONS = 20  # number of abstention reasons that are counted separately; a server's messages may all differ


@dataclass
class KindPreference:
    """How often the judge picks one kind of response (the longer one, or its own), and how often people do."""

    judge: Ratio = field(default_factory=Ratio)
    judge_where_people: Ratio = field(default_factory=Ratio)  # on the pairs that people also decided
    people: Ratio = field(default_factory=Ratio)
    difference: Ratio = field(default_factory=Ratio)  # 1 where the judge alone picks the kind, -1 where people alone do
    both: Counter[tuple[bool, bool]] = field(default_factory=Counter)  # (judge picks the kind, people pick the kind)

    def add(self, judge: bool, people: bool | None, prompt: str) -> None:
        self.judge.add(judge, 1, prompt)
        if people is not None:
            self.judge_where_people.add(judge, 1, prompt)
            self.people.add(people, 1, prompt)
            self.difference.add(judge - people, 1, prompt)
            self.both[judge, people] += 1

    def summary(self) -> dict[str, Any]:
        """judge: the share on all pairs. The other measures are on the pairs that people also decided.

        opportunity_gap: P(judge picks the kind | people pick the kind) - P(judge picks the other | people pick the
        other). The gap is 0 for a judge that errs equally often in both directions (Wataoka et al. 2024, arXiv
        2410.21819). The interval of the gap treats all pairs as independent, also several pairs of one prompt.
        """
        yes, missed = self.both[True, True], self.both[False, True]
        wrong, no = self.both[True, False], self.both[False, False]
        n = yes + missed + wrong + no
        independent = self.difference.clusters == n  # each prompt has one pair
        estimates = {
            "judge": self.judge.share(),
            "judge_beside_people": self.judge_where_people.share(),
            "people": self.people.share(),
            "difference": paired_difference_of_shares(wrong, missed, n) if independent else self.difference.mean(),
            "opportunity_gap": difference_of_shares((yes, yes + missed), (no, no + wrong)),
        }
        return {name: estimate.to_json() for name, estimate in estimates.items()}


@dataclass
class PrincipleCounts:
    """Counts of one principle's judgements."""

    kind: Literal["model", "check", "each"]
    abstained: int = 0
    ties: int = 0
    confidence: Ratio = field(default_factory=Ratio)  # |log-odds|
    right: Ratio = field(default_factory=Ratio)  # on the pairs that people decided; a tie counts half

    def summary(self, name: str) -> dict[str, Any]:
        return {
            "principle": name,
            "kind": self.kind,
            "n": self.confidence.n,
            "abstained": self.abstained,
            "ties": self.ties,
            # a check says yes or no only, so its confidence measures nothing
            "confidence": None if self.kind == "check" else self.confidence.mean().to_json(),
            "agrees_with_people": self.right.share().to_json(),
        }


class Trust:
    """Counts over the comparisons of one judge. The memory does not grow with the number of pairs.

    judge: the judge's name in `Comparison.authors`; None: do not measure self-preference. Successive comparisons of one
    prompt are one cluster, because they are not independent.
    """

    def __init__(self, judge: str | None = None) -> None:
        self.judge = judge
        self.pairs = 0
        self.contradictory_ties = 0
        self.tied_pairs, self.abstained_pairs = Ratio(), Ratio()
        # shares of judgements or of answers; the first three leave checks out
        self.contradictions, self.first_shown, self.first_position = Ratio(), Ratio(), Ratio()
        self.tied, self.abstained, self.agreed = Ratio(), Ratio(), Ratio()
        self.tied_by_contradiction = 0
        self.reasons: Counter[str] = Counter()
        self.longer = {"words": KindPreference(), "characters": KindPreference()}
        self.self_preference = KindPreference()
        self.wins: dict[str, Ratio] = {}  # author → share of pairs won against other authors
        self.principles: dict[str, PrincipleCounts] = {}
        # (principle, principle) → [[both first, first and second], [second and first, both second]]
        self.verdicts: dict[tuple[str, str], list[list[int]]] = {}
        self.calibration = Calibration()

    def add(self, comparison: Comparison) -> None:
        c, people = comparison, side(comparison.human)
        prompt = fingerprint("prompt", [m.model_dump() for m in c.prompt])
        self.pairs += 1
        self._judgements(c.judgements, people, prompt)
        self._agreement(c, prompt)
        self.abstained_pairs.add(c.label is None, 1, prompt)
        if c.label is None:
            return
        if c.human is not None:
            self.calibration.add(c.id, c.label, c.human, prompt=prompt, odds=c.log_odds)
        verdict = side(c.label)
        self.tied_pairs.add(verdict is None, 1, prompt)
        if verdict is None:
            self.contradictory_ties += any(contradicts(j) for j in c.judgements)
            return
        chosen, rejected = text_of(c.chosen), text_of(c.rejected)
        for unit, size in (("words", words), ("characters", len)):
            if size(chosen) != size(rejected):
                chosen_is_longer = size(chosen) > size(rejected)
                self.longer[unit].add(*_picks(verdict, people, chosen_is_longer), prompt)
        if c.authors and c.authors[0] != c.authors[1]:
            for author, won in zip(c.authors, (verdict, not verdict), strict=True):
                self.wins.setdefault(author, Ratio()).add(won, 1, prompt)
            if self.judge in c.authors:
                self.self_preference.add(*_picks(verdict, people, c.authors[0] == self.judge), prompt)

    def _judgements(self, judgements: Sequence[Judgement], people: bool | None, prompt: str) -> None:
        """Count position, ties and abstentions, and the judgements of each principle."""
        contradictory = judged = firsts = answers = tied = answered = 0
        position_odds = 0.0
        for j in judgements:
            row = self.principles.setdefault(j.principle, PrincipleCounts(j.kind))
            odds = odds_of(j)
            if odds is None:
                row.abstained += 1
                self._reason(j.abstained)
                continue
            answered += 1
            verdict = verdict_of(j)
            row.confidence.add(abs(sum(odds)) / 2, 1, prompt)
            if verdict is None:
                tied += 1
                row.ties += 1
                self.tied_by_contradiction += contradicts(j)
            if people is not None:
                row.right.add(0.5 if verdict is None else verdict == people, 1, prompt)
            if j.kind == "model":
                judged += 1
                contradictory += contradicts(j)
                shown_first = [prefers(odds[0]), prefers(-odds[1])]  # True: the answer names the response shown first
                firsts += shown_first.count(True)
                answers += 2 - shown_first.count(None)
                position_odds += (odds[0] - odds[1]) / 2
        self.contradictions.add(contradictory, judged, prompt)
        self.first_shown.add(firsts, answers, prompt)
        self.first_position.add(position_odds, judged, prompt)
        self.tied.add(tied, answered, prompt)
        self.abstained.add(len(judgements) - answered, len(judgements), prompt)

    def _reason(self, text: str | None) -> None:
        """Count a reason without its details, which stand after a colon or in brackets."""
        reason = re.split(r":| \(", text or "", maxsplit=1)[0].strip()[:60] or "no reason given"
        known = reason in self.reasons or len(self.reasons) < REASONS
        self.reasons[reason if known else "other reasons"] += 1

    def _agreement(self, c: Comparison, prompt: str) -> None:
        """Count the agreement of every two principles that decided this pair. The pair's id decides which response is first."""
        first = {j.principle: v != flipped(c.id) for j in c.judgements if (v := verdict_of(j)) is not None}
        agreed = n = 0
        for a, b in combinations(sorted(first), 2):
            table = self.verdicts.setdefault((a, b), [[0, 0], [0, 0]])
            table[not first[a]][not first[b]] += 1
            agreed += first[a] == first[b]
            n += 1
        self.agreed.add(agreed, n, prompt)

    def summary(self) -> dict[str, Any]:
        """Every measure as plain JSON: an `Estimate` where there is an interval, None where there is no data."""
        measures: dict[str, Any] = {
            "judge": self.judge,
            "pairs": self.pairs,
            "judgements": self.abstained.n,
            "position": {
                "contradictions": self.contradictions.share().to_json(),  # of judgements
                "first_shown": self.first_shown.share().to_json(),  # of answers that prefer either
                "bias": self.first_position.mean().to_json(),  # log-odds that being shown first adds
            },
            "length": {unit: preference.summary() for unit, preference in self.longer.items()},
            "self_preference": self.self_preference.summary() if self.self_preference.judge.n else None,
            "authors": [{"author": name, "wins": wins.share().to_json()} for name, wins in sorted(self.wins.items())],
            "ties": {
                "pairs": self.tied_pairs.share().to_json(),
                "judgements": self.tied.share().to_json(),
                "contradictory_pairs": self.contradictory_ties,
                "contradictory_judgements": self.tied_by_contradiction,
            },
            "abstentions": {
                "pairs": self.abstained_pairs.share().to_json(),
                "judgements": self.abstained.share().to_json(),
                "reasons": dict(self.reasons.most_common()),
            },
            "principles": [counts.summary(name) for name, counts in sorted(self.principles.items())],
            "agreement": self._agreements(),
            "calibration": self.calibration.summary(),
        }
        return {**measures, "findings": findings(measures)}

    def _agreements(self) -> dict[str, Any]:
        """The agreement of every two principles, as a list of cells."""
        cells: list[dict[str, Any]] = [
            {
                "a": a,
                "b": b,
                "agree": wilson(table[0][0] + table[1][1], sum(map(sum, table))).to_json(),
                "kappa": kappa(table).to_json(),
            }
            for (a, b), table in sorted(self.verdicts.items())
        ]
        kappas = [cell["kappa"]["value"] for cell in cells if cell["kappa"]["value"] is not None]
        return {
            "mean": self.agreed.share().to_json(),  # over every two judgements of every pair
            "mean_kappa": sum(kappas) / len(kappas) if kappas else None,  # over the cells
            "cells": cells,
        }


def _picks(verdict: bool, people: bool | None, chosen_is_kind: bool) -> tuple[bool, bool | None]:
    """Whether the judge and the people pick the kind of response that is compared; None: people did not decide."""
    return verdict == chosen_is_kind, None if people is None else people == chosen_is_kind


# --- one judgement -------------------------------------------------------------------------------------------


def side(p: float | None) -> bool | None:
    """Whether p = P(chosen is better) prefers the chosen response; None: a tie, or no answer."""
    return None if p is None or abs(p - 0.5) <= TIE else p > 0.5


def prefers(odds: float) -> bool | None:
    """Whether log-odds prefer the first of two responses; None: a tie."""
    return None if abs(odds) <= 4 * TIE else odds > 0  # around 0, log-odds are 4 (p - 0.5)


def contradicts(j: Judgement) -> bool:
    """Whether the two orders prefer different responses. The orders of a check never do."""
    odds = odds_of(j)
    sides = [None] if odds is None else [prefers(x) for x in odds]
    return None not in sides and sides[0] != sides[1]


def verdict_of(j: Judgement) -> bool | None:
    """Whether the mean log-odds of both orders prefer the chosen response; None: a tie or an abstention."""
    odds = odds_of(j)
    return None if odds is None else prefers(sum(odds) / 2)


# --- in words ------------------------------------------------------------------------------------------------


def findings(measures: dict[str, Any]) -> list[str]:
    """The faults of the judge in sentences; empty where there is no fault.

    A fault is named where its interval lies beyond the bound above. The test corrects for the number of faults
    (`beyond_chance`): of forty judges without any fault, one is accused of one. Accuracy works the other way round: a
    judge whose interval reaches down to chance has not shown that it knows anything.
    """
    candidates = _position_faults(measures["position"])
    candidates += _preference_faults(measures["length"]["words"], "the longer", "the shorter")
    if measures["self_preference"]:
        candidates += _preference_faults(measures["self_preference"], "its own", "another's")
    ties, abstained = measures["ties"]["pairs"], measures["abstentions"]["judgements"]
    reason = next(iter(measures["abstentions"]["reasons"]), "")
    accuracy, too_sure = measures["calibration"]["accuracy"], measures["calibration"]["overconfidence"]
    candidates += [
        (_p(ties, TIES, "above"), f"The judge often prefers neither response: {_share(ties)} pairs are ties."),
        (
            _p(abstained, ABSTENTIONS, "above"),
            f'The judge abstains: in {_share(abstained)} judgements, most often "{reason}".',
        ),
        (
            _p(accuracy, 0.5, "below"),
            f"The judge disagrees with people: it is right in {_share(accuracy)} pairs that they decided.",
        ),
        (
            _p(too_sure, OVERCONFIDENCE, "above"),
            f"The judge is too sure: its confidence exceeds its share right by {_points(too_sure)}.",
        ),
    ]
    *shown, overconfident = beyond_chance([p for p, _ in candidates])
    sentences = [sentence for (_, sentence), is_shown in zip(candidates[:-1], shown, strict=True) if is_shown]
    if accuracy["n"] and not accuracy["low"] > 0.5 and not shown[-1]:  # the last of `shown` is the disagreement
        sentences.append(
            "People decided only one pair, which says nothing about the judge."
            if accuracy["n"] == 1
            else f"The judge cannot be told from a coin: right in {_share(accuracy)} pairs that people decided."
        )
    return [*sentences, candidates[-1][1]] if overconfident else sentences


def _position_faults(position: dict[str, Any]) -> list[tuple[float | None, str]]:
    turns, first = position["contradictions"], position["first_shown"]
    prefers = f"{_share(first)} answers name the response shown first; without such a preference it is 50 %."
    return [
        (
            _p(turns, CONTRADICTIONS, "above"),
            f"The judge contradicts itself when the order is swapped: in {_share(turns)} judgements; "
            "throwing a coin would give 50 %.",
        ),
        (_p(first, 0.5 + POSITION, "above"), f"The judge prefers the first position: {prefers}"),
        (_p(first, 0.5 - POSITION, "below"), f"The judge prefers the last position: {prefers}"),
    ]


def _preference_faults(preference: dict[str, Any], kind: str, other: str) -> list[tuple[float | None, str]]:
    """The judge prefers one kind of response more often than people do, or more than half the time without people.

    With people, both the share and the opportunity gap must be beyond the bound. A judge that errs often picks each
    kind nearer to half the time than people do, without a gap. A judge that sees large differences better than small
    ones has a gap, without a larger share.
    """
    judge, people, alone = preference["judge_beside_people"], preference["people"], preference["judge"]
    faults: list[tuple[float | None, str]] = []
    for name, side, sign in ((kind, ABOVE, 1), (other, BELOW, -1)):
        if people["n"]:
            both = [_p(preference[key], sign * BESIDE_PEOPLE, side) for key in ("difference", "opportunity_gap")]
            sentence = (
                f"The judge prefers {name} response more often than people do: it picks {kind} in {_share(judge)} "
                f"pairs, people in {100 * people['value']:.0f} % of these."
            )
            faults.append((None if None in both else max(p for p in both if p is not None), sentence))
        else:
            sentence = (
                f"The judge prefers {name} response: it picks {kind} in {_share(alone)} pairs. Whether that is "
                "right, only people's labels can tell."
            )
            faults.append((_p(alone, 0.5 + sign * WITHOUT_PEOPLE, side), sentence))
    return faults


def _p(estimate: dict[str, Any], bound: float, side: Side) -> float | None:
    return p_beyond(Estimate(*(estimate[key] for key in ("value", "low", "high", "n"))), bound, side)


def _share(e: dict[str, Any]) -> str:
    return "none" if e["low"] is None else f"{_interval(e, ' %')} of {e['n']:,}"


def _points(e: dict[str, Any]) -> str:
    return "none" if e["low"] is None else _interval(e, " points")


def _interval(e: dict[str, Any], unit: str) -> str:
    return f"{100 * e['value']:.0f}{unit} [{100 * e['low']:.0f}, {100 * e['high']:.0f}]"
