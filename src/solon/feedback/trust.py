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

from solon.evaluation.metrics import words
from solon.feedback.calibration import NEAREST, TIE, Calibration, flipped
from solon.feedback.judge import log_odds
from solon.records import Comparison, Judgement, text_of
from solon.statistics import Ratio, difference_of_shares, kappa, paired_difference_of_shares, wilson

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

    n: int = 0
    judge: int = 0
    both: Counter[tuple[bool, bool]] = field(default_factory=Counter)  # (judge, people) picked it, where people chose

    def add(self, judge: bool, people: bool | None) -> None:
        self.n += 1
        self.judge += judge
        if people is not None:
            self.both[judge, people] += 1

    def summary(self) -> dict[str, Any]:
        """judge: share on all pairs. The others are on the pairs that people decided too.

        opportunity_gap: P(judge picks it | people pick it) - P(judge picks the other | people pick the other), 0 for
        a judge that errs as often either way (Wataoka et al. 2024, arXiv 2410.21819).
        """
        yes, missed = self.both[True, True], self.both[False, True]
        wrong, no = self.both[True, False], self.both[False, False]
        n = yes + missed + wrong + no
        found = {
            "judge": wilson(self.judge, self.n),
            "judge_beside_people": wilson(yes + wrong, n),
            "people": wilson(yes + missed, n),
            "difference": paired_difference_of_shares(wrong, missed, n),
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
    people: int = 0  # judgements of pairs that people decided
    right: float = 0.0  # of these; a tie counts half

    def summary(self, name: str) -> dict[str, Any]:
        return {
            "principle": name,
            "kind": self.kind,
            "n": self.confidence.n,
            "abstained": self.abstained,
            "ties": self.ties,
            # a check knows yes and no only: its certainty measures nothing
            "confidence": None if self.kind == "check" else self.confidence.mean().to_json(),
            "agrees_with_people": wilson(self.right, self.people).to_json(),
        }


class Trust:
    """Takes in the comparisons of one judge and says how far it can be trusted. Memory does not grow with the pairs.

    judge: its name as it stands in `Comparison.authors`; None where self-preference is not asked for.
    """

    def __init__(self, judge: str | None = None) -> None:
        self.judge = judge
        self.pairs = 0
        self.abstained_pairs = self.tied_pairs = self.contradictory_ties = 0
        # a share over judgements or answers each; checks take no part in the first three
        self.contradictions, self.first_shown, self.first_position = Ratio(), Ratio(), Ratio()
        self.tied, self.abstained, self.agreed = Ratio(), Ratio(), Ratio()
        self.tied_by_contradiction = 0
        self.reasons: Counter[str] = Counter()
        self.longer = {"words": Beside(), "characters": Beside()}
        self.own = Beside()
        self.wins: dict[str, list[int]] = {}  # author → [pairs won, pairs decided] against other authors
        self.principles: dict[str, OfPrinciple] = {}
        # (principle, principle) → [[both first, first and second], [second and first, both second]]
        self.verdicts: dict[tuple[str, str], list[list[int]]] = {}
        self.calibration = Calibration()

    def add(self, comparison: Comparison) -> None:
        c, people = comparison, side(comparison.human)
        self.pairs += 1
        self._judgements(c.judgements, people)
        self._agreement(c)
        if c.label is None:
            self.abstained_pairs += 1
            return
        if c.human is not None:
            self.calibration.add(c.id, c.label, c.human)
        verdict = side(c.label)
        if verdict is None:
            self.tied_pairs += 1
            self.contradictory_ties += any(contradicts(j) for j in c.judgements)
            return
        chosen, rejected = text_of(c.chosen), text_of(c.rejected)
        for unit, size in (("words", words), ("characters", len)):
            a, b = size(chosen), size(rejected)
            if a != b:
                self.longer[unit].add(verdict == (a > b), None if people is None else people == (a > b))
        if c.authors and c.authors[0] != c.authors[1]:
            for author, won in zip(c.authors, (verdict, not verdict), strict=True):
                row = self.wins.setdefault(author, [0, 0])
                row[0] += won
                row[1] += 1
            if self.judge in c.authors:
                chosen_is_own = c.authors[0] == self.judge
                self.own.add(verdict == chosen_is_own, None if people is None else people == chosen_is_own)

    def _judgements(self, judgements: Sequence[Judgement], people: bool | None) -> None:
        """Position, ties, abstentions, and each principle's row."""
        turned = judged = firsts = answers = tied = answered = 0
        towards_first = 0.0
        for j in judgements:
            row = self.principles.setdefault(j.principle, OfPrinciple(j.kind))
            if j.forward is None or j.swapped is None:
                row.abstained += 1
                self._reason(j.abstained)
                continue
            answered += 1
            verdict, odds = verdict_of(j), _odds(j)
            row.confidence.add(abs(sum(odds)) / 2, 1)
            if verdict is None:
                tied += 1
                row.ties += 1
                self.tied_by_contradiction += contradicts(j)
            if people is not None:
                row.people += 1
                row.right += 0.5 if verdict is None else verdict == people
            if j.kind == "model":
                judged += 1
                turned += contradicts(j)
                shown_first = [side(j.forward), side(1 - j.swapped)]  # True: the answer names what was shown first
                firsts += shown_first.count(True)
                answers += 2 - shown_first.count(None)
                towards_first += (odds[0] - odds[1]) / 2
        self.contradictions.add(turned, judged)
        self.first_shown.add(firsts, answers)
        self.first_position.add(towards_first, judged)
        self.tied.add(tied, answered)
        self.abstained.add(len(judgements) - answered, len(judgements))

    def _reason(self, text: str | None) -> None:
        """Counted without what differs from case to case, which stands behind a colon or in brackets."""
        reason = re.split(r":| \(", text or "", maxsplit=1)[0].strip()[:60] or "no reason given"
        known = reason in self.reasons or len(self.reasons) < REASONS
        self.reasons[reason if known else "other reasons"] += 1

    def _agreement(self, c: Comparison) -> None:
        """Every two principles that decided this pair. Which response counts as the first: by the pair's id."""
        first = {j.principle: v != flipped(c.id) for j in c.judgements if (v := verdict_of(j)) is not None}
        agreed = n = 0
        for a, b in combinations(sorted(first), 2):
            table = self.verdicts.setdefault((a, b), [[0, 0], [0, 0]])
            table[not first[a]][not first[b]] += 1
            agreed += first[a] == first[b]
            n += 1
        self.agreed.add(agreed, n)

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
            "self_preference": self.own.summary() if self.own.n else None,
            "authors": [
                {"author": name, "wins": wilson(won, n).to_json()} for name, (won, n) in sorted(self.wins.items())
            ],
            "ties": {
                "pairs": wilson(self.tied_pairs, self.pairs - self.abstained_pairs).to_json(),
                "judgements": self.tied.share().to_json(),
                "contradictory_pairs": self.contradictory_ties,
                "contradictory_judgements": self.tied_by_contradiction,
            },
            "abstentions": {
                "pairs": wilson(self.abstained_pairs, self.pairs).to_json(),
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


def contradicts(j: Judgement) -> bool:
    """Whether the two orders prefer different responses. A check's never do."""
    forward, swapped = side(j.forward), side(j.swapped)
    return None not in (forward, swapped) and forward != swapped


def verdict_of(j: Judgement) -> bool | None:
    """Whether a judgement prefers the chosen response, by the mean log-odds of both orders; None: tie, abstention."""
    if j.forward is None or j.swapped is None:
        return None
    mean = sum(_odds(j)) / 2
    return None if abs(mean) <= 4 * TIE else mean > 0  # around 0, log-odds are 4 (p - 0.5)


def _odds(j: Judgement) -> tuple[float, float]:
    """Log-odds that the chosen response is better, shown first and shown second."""
    assert j.forward is not None and j.swapped is not None
    forward, swapped = (log_odds(min(max(p, NEAREST), 1 - NEAREST)) for p in (j.forward, j.swapped))
    return forward, swapped


# --- in words ------------------------------------------------------------------------------------------------


def findings(found: dict[str, Any]) -> list[str]:
    """What a summary shows against the judge, in sentences; empty where none of these faults was found.

    A fault is named where its whole 95 % interval lies beyond the margin above. Accuracy alone is the other way
    round: a judge whose interval reaches down to chance has not yet shown that it knows anything.
    """
    said = []
    contradictions, first_shown = found["position"]["contradictions"], found["position"]["first_shown"]
    if _above(contradictions, CONTRADICTIONS):
        said.append(
            f"The judge contradicts itself when the order is swapped: in {_share(contradictions)} judgements; "
            "throwing a coin would give 50 %."
        )
    if _above(first_shown, 0.5 + POSITION) or _below(first_shown, 0.5 - POSITION):
        said.append(
            f"The judge prefers the {'first' if first_shown['value'] > 0.5 else 'last'} position: "
            f"{_share(first_shown)} answers name the response shown first; without such a preference it is 50 %."
        )
    said += _beside(found["length"]["words"], "the longer response", "the shorter response")
    if own := found["self_preference"]:
        said += _beside(own, "its own response", "another's response")
    if _above(found["ties"]["pairs"], TIES):
        said.append(f"The judge often prefers neither response: {_share(found['ties']['pairs'])} pairs are ties.")
    abstained = found["abstentions"]["judgements"]
    if _above(abstained, ABSTENTIONS):
        reason = next(iter(found["abstentions"]["reasons"]))
        said.append(f'The judge abstains: in {_share(abstained)} judgements, most often "{reason}".')
    accuracy, overconfidence = found["calibration"]["accuracy"], found["calibration"]["overconfidence"]
    if _below(accuracy, 0.5):
        said.append(f"The judge disagrees with people: it is right in {_share(accuracy)} pairs that they decided.")
    elif accuracy["n"] and not _above(accuracy, 0.5):
        said.append(f"The judge cannot be told from a coin: right in {_share(accuracy)} pairs that people decided.")
    if _above(overconfidence, OVERCONFIDENCE):
        said.append(f"The judge is too sure: its confidence exceeds its share right by {_points(overconfidence)}.")
    return said


def _beside(beside: dict[str, Any], kind: str, other: str) -> list[str]:
    """One kind of response is preferred more than people prefer it; where no people say, more than half the time.

    Beside people's, both the share and the opportunity gap must be beyond the margin. A judge that only errs a lot
    picks each kind nearer to half the time than people do, with no gap; one that sees large differences better than
    small ones shows a gap, and no larger share.
    """
    judge, people = beside["judge_beside_people"], beside["people"]
    both = beside["difference"], beside["opportunity_gap"]
    if people["n"]:
        more = all(_above(e, BESIDE_PEOPLE) for e in both)
        if not more and not all(_below(e, -BESIDE_PEOPLE) for e in both):
            return []
        return [
            f"The judge prefers {kind if more else other} more often than people do: it picks {kind} in "
            f"{_share(judge)} pairs, people in {100 * people['value']:.0f} % of these."
        ]
    judge = beside["judge"]
    more = _above(judge, 0.5 + WITHOUT_PEOPLE)
    if not more and not _below(judge, 0.5 - WITHOUT_PEOPLE):
        return []
    return [
        f"The judge prefers {kind if more else other}: it picks {kind} in {_share(judge)} pairs. Whether that is "
        "right, only people's labels can tell."
    ]


def _above(estimate: dict[str, Any], bound: float) -> bool:
    return estimate["low"] is not None and estimate["low"] > bound


def _below(estimate: dict[str, Any], bound: float) -> bool:
    return estimate["high"] is not None and estimate["high"] < bound


def _share(e: dict[str, Any]) -> str:
    return f"{100 * e['value']:.0f} % [{100 * e['low']:.0f}, {100 * e['high']:.0f}] of {e['n']:,}"


def _points(e: dict[str, Any]) -> str:
    return f"{100 * e['value']:.0f} points [{100 * e['low']:.0f}, {100 * e['high']:.0f}]"
