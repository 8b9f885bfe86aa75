"""Whether a judge can be trusted: what its own comparisons give away.

`Trust` takes in comparisons one by one and keeps counts, so that a labelling run of any size is measured as it goes.
Most measures need nothing but the judge's answers (does the verdict turn with the order? does the longer response
win?); where people labelled the same pairs, theirs stands beside it, because longer may simply be better. `summary`
gives every number with its n and its 95 % interval, and `findings` says in words which of them are beyond what a
judge without that fault would show.

Terms: a *pair* is one comparison; a *judgement* is what one principle said of a pair, asked in both orders; an
*answer* is one order of it. Sides are "chosen" (what the label favours) and "rejected", as in `Comparison`.

Left out: biases towards style, flattery or authority. They need pairs made for the purpose.
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
# What an interval must lie beyond before a finding is raised. The margins are there so that with thousands of pairs
# a difference too small to matter raises none.
CONTRADICTIONS = 0.25  # a judge that knows half of its answers and throws a coin for the rest contradicts as often
POSITION = 0.05  # from 0.5. Both orders are asked and averaged: a lean smaller than this turns few labels
BESIDE_PEOPLE = 0.05  # from the people's share on the same pairs, and the opportunity gap from 0
WITHOUT_PEOPLE = 0.10  # from 0.5, where nobody says whether the longer (or the judge's own) is better: it often is
TIES = 0.25  # of pairs: they teach a reward model nothing
ABSTENTIONS = 0.05  # of judgements: what is left may no longer be a fair sample of the pairs
OVERCONFIDENCE = 0.05  # mean confidence less share right
REASONS = 20  # different reasons of abstentions that are told apart; a server's messages may differ without end


@dataclass
class Beside:
    """How often the judge picks one kind of response (the longer, its own), beside how often people do."""

    judge: Ratio = field(default_factory=Ratio)
    judge_where_people: Ratio = field(default_factory=Ratio)  # on the pairs that people decided too
    people: Ratio = field(default_factory=Ratio)
    more: Ratio = field(default_factory=Ratio)  # 1 where the judge alone picks it, -1 where people alone do
    both: Counter[tuple[bool, bool]] = field(default_factory=Counter)  # (judge, people) picked it, where people chose

    def add(self, judge: bool, people: bool | None, prompt: str) -> None:
        self.judge.add(judge, 1, prompt)
        if people is not None:
            self.judge_where_people.add(judge, 1, prompt)
            self.people.add(people, 1, prompt)
            self.more.add(judge - people, 1, prompt)
            self.both[judge, people] += 1

    def summary(self) -> dict[str, Any]:
        """judge: share on all pairs. The others are on the pairs that people decided too.

        opportunity_gap: P(judge picks it | people pick it) - P(judge picks the other | people pick the other), 0 for
        a judge that errs as often either way (Wataoka et al. 2024, arXiv 2410.21819); its interval takes each pair
        for itself, also where a prompt has several.
        """
        yes, missed = self.both[True, True], self.both[False, True]
        wrong, no = self.both[True, False], self.both[False, False]
        n = yes + missed + wrong + no
        alone = self.more.clusters == n
        found = {
            "judge": self.judge.share(),
            "judge_beside_people": self.judge_where_people.share(),
            "people": self.people.share(),
            "difference": paired_difference_of_shares(wrong, missed, n) if alone else self.more.mean(),
            "opportunity_gap": difference_of_shares((yes, yes + missed), (no, no + wrong)),
        }
        return {name: value.to_json() for name, value in found.items()}


@dataclass
class OfPrinciple:
    """One principle's judgements."""

    kind: Literal["model", "check"]
    abstained: int = 0
    ties: int = 0
    confidence: Ratio = field(default_factory=Ratio)  # |log-odds|
    right: Ratio = field(default_factory=Ratio)  # judgements of pairs that people decided; a tie counts half

    def summary(self, name: str) -> dict[str, Any]:
        return {
            "principle": name,
            "kind": self.kind,
            "n": self.confidence.n,
            "abstained": self.abstained,
            "ties": self.ties,
            # a check knows yes and no only: its certainty measures nothing
            "confidence": None if self.kind == "check" else self.confidence.mean().to_json(),
            "agrees_with_people": self.right.share().to_json(),
        }


class Trust:
    """Takes in the comparisons of one judge and says how far it can be trusted. Memory does not grow with the pairs.

    judge: its name as it stands in `Comparison.authors`; None where self-preference is not asked for. Comparisons of
    one prompt that follow each other are one cluster: they are not independent.
    """

    def __init__(self, judge: str | None = None) -> None:
        self.judge = judge
        self.pairs = 0
        self.contradictory_ties = 0
        self.tied_pairs, self.abstained_pairs = Ratio(), Ratio()
        # a share over judgements or answers each; checks take no part in the first three
        self.contradictions, self.first_shown, self.first_position = Ratio(), Ratio(), Ratio()
        self.tied, self.abstained, self.agreed = Ratio(), Ratio(), Ratio()
        self.tied_by_contradiction = 0
        self.reasons: Counter[str] = Counter()
        self.longer = {"words": Beside(), "characters": Beside()}
        self.own = Beside()
        self.wins: dict[str, Ratio] = {}  # author → pairs won of those decided against other authors
        self.principles: dict[str, OfPrinciple] = {}
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
            a, b = size(chosen), size(rejected)
            if a != b:
                self.longer[unit].add(verdict == (a > b), None if people is None else people == (a > b), prompt)
        if c.authors and c.authors[0] != c.authors[1]:
            for author, won in zip(c.authors, (verdict, not verdict), strict=True):
                self.wins.setdefault(author, Ratio()).add(won, 1, prompt)
            if self.judge in c.authors:
                chosen_is_own = c.authors[0] == self.judge
                self.own.add(verdict == chosen_is_own, None if people is None else people == chosen_is_own, prompt)

    def _judgements(self, judgements: Sequence[Judgement], people: bool | None, prompt: str) -> None:
        """Position, ties, abstentions, and each principle's row."""
        turned = judged = firsts = answers = tied = answered = 0
        towards_first = 0.0
        for j in judgements:
            row = self.principles.setdefault(j.principle, OfPrinciple(j.kind))
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
                turned += contradicts(j)
                shown_first = [prefers(odds[0]), prefers(-odds[1])]  # True: the answer names what was shown first
                firsts += shown_first.count(True)
                answers += 2 - shown_first.count(None)
                towards_first += (odds[0] - odds[1]) / 2
        self.contradictions.add(turned, judged, prompt)
        self.first_shown.add(firsts, answers, prompt)
        self.first_position.add(towards_first, judged, prompt)
        self.tied.add(tied, answered, prompt)
        self.abstained.add(len(judgements) - answered, len(judgements), prompt)

    def _reason(self, text: str | None) -> None:
        """Counted without what differs from case to case, which stands behind a colon or in brackets."""
        reason = re.split(r":| \(", text or "", maxsplit=1)[0].strip()[:60] or "no reason given"
        known = reason in self.reasons or len(self.reasons) < REASONS
        self.reasons[reason if known else "other reasons"] += 1

    def _agreement(self, c: Comparison, prompt: str) -> None:
        """Every two principles that decided this pair. Which response counts as the first: by the pair's id."""
        first = {j.principle: v != flipped(c.id) for j in c.judgements if (v := verdict_of(j)) is not None}
        agreed = n = 0
        for a, b in combinations(sorted(first), 2):
            table = self.verdicts.setdefault((a, b), [[0, 0], [0, 0]])
            table[not first[a]][not first[b]] += 1
            agreed += first[a] == first[b]
            n += 1
        self.agreed.add(agreed, n, prompt)

    def summary(self) -> dict[str, Any]:
        """Every measure as plain JSON: an `Estimate` where there is an interval, None where there is nothing to say."""
        found: dict[str, Any] = {
            "judge": self.judge,
            "pairs": self.pairs,
            "judgements": self.abstained.n,
            "position": {
                "contradictions": self.contradictions.share().to_json(),  # of judgements
                "first_shown": self.first_shown.share().to_json(),  # of answers that prefer either
                "bias": self.first_position.mean().to_json(),  # log-odds that being shown first adds
            },
            "length": {unit: beside.summary() for unit, beside in self.longer.items()},
            "self_preference": self.own.summary() if self.own.judge.n else None,
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
            "principles": [row.summary(name) for name, row in sorted(self.principles.items())],
            "agreement": self._agreements(),
            "calibration": self.calibration.summary(),
        }
        return {**found, "findings": findings(found)}

    def _agreements(self) -> dict[str, Any]:
        """The upper half of the K x K matrix, as a list of its cells."""
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


# --- one judgement -------------------------------------------------------------------------------------------


def side(p: float | None) -> bool | None:
    """Whether p = P(chosen is better) prefers the chosen response; None: a tie, or no answer."""
    return None if p is None or abs(p - 0.5) <= TIE else p > 0.5


def prefers(odds: float) -> bool | None:
    """Whether log-odds prefer the first of two; None: a tie."""
    return None if abs(odds) <= 4 * TIE else odds > 0  # around 0, log-odds are 4 (p - 0.5)


def contradicts(j: Judgement) -> bool:
    """Whether the two orders prefer different responses. A check's never do."""
    odds = odds_of(j)
    sides = [None] if odds is None else [prefers(x) for x in odds]
    return None not in sides and sides[0] != sides[1]


def verdict_of(j: Judgement) -> bool | None:
    """Whether a judgement prefers the chosen response, by the mean log-odds of both orders; None: tie, abstention."""
    odds = odds_of(j)
    return None if odds is None else prefers(sum(odds) / 2)


# --- in words ------------------------------------------------------------------------------------------------


def findings(found: dict[str, Any]) -> list[str]:
    """What a summary shows against the judge, in sentences; empty where none of these faults was found.

    A fault is named where its interval lies beyond the margin above, with all the faults that are looked for taken
    together (`beyond_chance`): of a judge without any fault, one in forty is accused of one. Accuracy alone is the
    other way round: a judge whose interval reaches down to chance has not yet shown that it knows anything.
    """
    looked_for = [*_of_position(found["position"]), *_beside(found["length"]["words"], "the longer", "the shorter")]
    if own := found["self_preference"]:
        looked_for += _beside(own, "its own", "another's")
    ties, abstained = found["ties"]["pairs"], found["abstentions"]["judgements"]
    reason = next(iter(found["abstentions"]["reasons"]), "")
    accuracy, too_sure = found["calibration"]["accuracy"], found["calibration"]["overconfidence"]
    looked_for += [
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
    *sure, disagrees, overconfident = beyond_chance([p for p, _ in looked_for])
    coin = accuracy["n"] and not accuracy["low"] > 0.5 and not disagrees
    a_coin = (
        "People decided only one pair, which says nothing about the judge."
        if accuracy["n"] == 1
        else f"The judge cannot be told from a coin: right in {_share(accuracy)} pairs that people decided."
    )
    return [
        sentence
        for (_, sentence), yes in zip(
            [*looked_for[:-1], (None, a_coin), looked_for[-1]], [*sure, disagrees, coin, overconfident], strict=True
        )
        if yes
    ]


def _of_position(position: dict[str, Any]) -> list[tuple[float | None, str]]:
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


def _beside(beside: dict[str, Any], kind: str, other: str) -> list[tuple[float | None, str]]:
    """One kind of response is preferred more than people prefer it; where no people say, more than half the time.

    Beside people's, both the share and the opportunity gap must be beyond the margin. A judge that only errs a lot
    picks each kind nearer to half the time than people do, with no gap; one that sees large differences better than
    small ones shows a gap, and no larger share.
    """
    judge, people, alone = beside["judge_beside_people"], beside["people"], beside["judge"]
    found: list[tuple[float | None, str]] = []
    for name, side, sign in ((kind, ABOVE, 1), (other, BELOW, -1)):
        if people["n"]:
            both = [_p(beside[key], sign * BESIDE_PEOPLE, side) for key in ("difference", "opportunity_gap")]
            sentence = (
                f"The judge prefers {name} response more often than people do: it picks {kind} in {_share(judge)} "
                f"pairs, people in {100 * people['value']:.0f} % of these."
            )
            found.append((None if None in both else max(p for p in both if p is not None), sentence))
        else:
            sentence = (
                f"The judge prefers {name} response: it picks {kind} in {_share(alone)} pairs. Whether that is "
                "right, only people's labels can tell."
            )
            found.append((_p(alone, 0.5 + sign * WITHOUT_PEOPLE, side), sentence))
    return found


def _p(estimate: dict[str, Any], bound: float, side: Side) -> float | None:
    return p_beyond(Estimate(*(estimate[key] for key in ("value", "low", "high", "n"))), bound, side)


def _share(e: dict[str, Any]) -> str:
    if e["value"] is None or e["low"] is None:
        return "none"
    return f"{100 * e['value']:.0f} % [{100 * e['low']:.0f}, {100 * e['high']:.0f}] of {e['n']:,}"


def _points(e: dict[str, Any]) -> str:
    if e["value"] is None or e["low"] is None:
        return "none"
    return f"{100 * e['value']:.0f} points [{100 * e['low']:.0f}, {100 * e['high']:.0f}]"
