"""Ranking more than two responses: pairs of them are compared, and Bradley–Terry makes one scale of the outcomes.

Bradley and Terry 1952: P(i is better than j) = sigmoid(s_i - s_j). Comparisons of all pairs cost k (k - 1) / 2
questions, a knock-out tournament k - 1, at the price of knowing little about those that leave early.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, islice
from typing import Literal

import numpy as np

from solon.constitution import Principle
from solon.engines.base import Failure, OnFailure
from solon.feedback.judge import WINDOW, Judge
from solon.feedback.labels import comparison_of
from solon.records import Candidates, Comparison, Judgement, Pair, Ranking, fingerprint, turned

Scheme = Literal["all", "tournament"]
Match = tuple[int, int, Comparison]
Outcome = tuple[int, int, float]  # i, j, P(i is better than j)
PRIOR = 1e-3  # pull of every strength towards 0: without it a response that always wins would be infinitely strong


def bradley_terry(n: int, outcomes: Sequence[Outcome]) -> list[float | None]:
    """Strengths in log-odds, their mean 0; None for a response that no outcome speaks of.

    Soft outcomes count as what they are, a share of a win. Newton's method on the likelihood, which is concave.
    """
    strengths = np.zeros(n)
    i, j = (np.array([o[side] for o in outcomes], dtype=int) for side in (0, 1))
    won = np.array([o[2] for o in outcomes])
    for _ in range(100 if len(outcomes) else 0):
        p = 1 / (1 + np.exp(strengths[j] - strengths[i]))
        gradient = -PRIOR * strengths
        np.add.at(gradient, i, won - p)
        np.add.at(gradient, j, p - won)
        curvature = PRIOR * np.eye(n)
        for a, b, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
            np.add.at(curvature, (a, b), sign * p * (1 - p))
        step = np.linalg.solve(curvature, gradient)
        strengths += step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))  # no step into where the curve is flat
        if np.abs(step).max() < 1e-9:
            break
    spoken = {k for o in outcomes for k in o[:2]}
    mean = float(np.mean([strengths[k] for k in spoken])) if spoken else 0.0
    return [float(strengths[k]) - mean if k in spoken else None for k in range(n)]


def rank(
    candidates: Iterable[Candidates], judge: Judge, *, scheme: Scheme = "all", failed: OnFailure | None = None
) -> Iterator[Ranking]:
    """One ranking a prompt, in order. scheme: compare all pairs, or a knock-out that the judge's seed draws.

    All pairs of a prompt are compared under the same principles. In a knock-out a tie or an abstention lets the one
    drawn first go on. failed: as `Judge.compare` takes it; told of a prompt once, and no ranking is made of it.
    """
    lost: set[str] = set()

    def lose(failure: Failure) -> None:
        name = failure.id.rpartition("/")[0]
        if failed and name not in lost:
            failed(Failure(name, failure.reason, failure.again))
        lost.add(name)

    left = iter(candidates)
    while window := list(islice(left, WINDOW)):
        found: dict[str, list[Match]] = {c.id: [] for c in window}
        going = {c.id: _drawn(c, judge.seed) for c in window}
        while True:
            matches = {c.id: _matches(c, going[c.id], scheme) for c in window}
            pairs = [_pair(c, i, j) for c in window for i, j in matches[c.id]]
            asked = _same_principles(window, matches, judge)
            judged = {c.id: c for c in judge.compare(pairs, asked=asked, failed=lose if failed else None)}
            window = [c for c in window if c.id not in lost]
            for c in window:
                found[c.id] += [(i, j, judged[f"{c.id}/{i}-{j}"]) for i, j in matches[c.id]]
            if scheme == "all":
                break
            for c in window:
                drawn, met = going[c.id], {(i, j): judged[f"{c.id}/{i}-{j}"] for i, j in matches[c.id]}
                won = [j if _first_better(m) < 0.5 else i for (i, j), m in met.items()]
                going[c.id] = won + drawn[len(drawn) - len(drawn) % 2 :]
            if all(len(going[c.id]) == 1 for c in window):
                break
        for c in window:
            yield _ranking(c, found[c.id])


def _matches(c: Candidates, going: Sequence[int], scheme: Scheme) -> list[tuple[int, int]]:
    """Which responses of a prompt meet next, by their indices."""
    if scheme == "all":
        return list(combinations(range(len(c.responses)), 2))
    return list(zip(going[::2], going[1::2], strict=False))


def _pair(c: Candidates, i: int, j: int) -> Pair:
    authors = (c.authors[i], c.authors[j]) if c.authors else None
    responses = (c.responses[i], c.responses[j])
    return Pair(
        id=f"{c.id}/{i}-{j}", prompt=c.prompt, responses=responses, source=c.source, authors=authors, meta=c.meta
    )


def _drawn(c: Candidates, seed: int) -> list[int]:
    order = list(range(len(c.responses)))
    random.Random(fingerprint("draw", seed, c.id)).shuffle(order)
    return order


def _same_principles(
    window: Sequence[Candidates], matches: dict[str, list[tuple[int, int]]], judge: Judge
) -> dict[str, list[Principle]] | None:
    """The principles of each pair, the same for all pairs of a prompt; None: the judge takes each pair's own."""
    found: dict[str, list[Principle]] = {}
    for c in window:
        principles = judge.principles_of_prompt(c.id)
        if principles is None:
            return None
        found |= {f"{c.id}/{a}-{b}": principles for a, b in matches[c.id]}
    return found


def _first_better(comparison: Comparison) -> float:
    """P(the first response of the pair is better); a tie where the judge abstained."""
    return 0.5 if comparison.p_first is None else comparison.p_first


def _ranking(c: Candidates, found: Sequence[Match]) -> Ranking:
    outcomes = [(i, j, _first_better(m)) for i, j, m in found if m.label is not None]
    strengths = bradley_terry(len(c.responses), outcomes)
    known = [k for k, s in enumerate(strengths) if s is not None]
    return Ranking(
        id=c.id,
        prompt=c.prompt,
        responses=c.responses,
        strengths=tuple(strengths),
        order=tuple(sorted(known, key=lambda k: -strengths[k])),  # type: ignore[operator]
        comparisons=tuple(m for _, _, m in found),
        source=c.source,
        meta={**c.meta, **(found[0][2].meta if found else {})},
    )


def preferences(ranking: Ranking) -> Iterator[Comparison]:
    """The ranking as comparisons of all pairs of its responses, labelled by their strengths.

    Where a pair itself was compared its judgements stand with it. Where the judge said nothing of one of the two, or
    abstained on just these, that pair is an abstention.
    """
    compared = {c.id: c for c in ranking.comparisons}
    for i, j in combinations(range(len(ranking.responses)), 2):
        pair = Pair(
            id=f"{ranking.id}/{i}-{j}", prompt=ranking.prompt, responses=(ranking.responses[i], ranking.responses[j]),
            source=ranking.source, meta=ranking.meta,
        )  # fmt: skip
        judgements: tuple[Judgement, ...] = ()
        direct = compared.get(pair.id)
        if direct is not None:
            judgements = direct.judgements_of_first
        elif (direct := compared.get(f"{ranking.id}/{j}-{i}")) is not None:
            judgements = tuple(turned(m) for m in direct.judgements_of_first)
        a, b = ranking.strengths[i], ranking.strengths[j]
        if a is None or b is None or (direct is not None and direct.label is None):
            yield comparison_of(pair, judgements, None)
        else:
            yield comparison_of(pair, judgements, a - b, {"strengths": list(ranking.strengths)})
