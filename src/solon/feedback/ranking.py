"""Ranking of more than two responses: the judge compares pairs, and Bradley–Terry puts all responses on one scale.

Bradley and Terry 1952: P(i is better than j) = sigmoid(s_i - s_j). Comparisons of all pairs of k responses take k (k - 1) / 2
questions. A knock-out tournament takes k - 1, but says little about the responses that lose early.
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
PRIOR = 1e-3  # pulls every strength towards 0; otherwise a response that always wins would be infinitely strong


def bradley_terry(n: int, outcomes: Sequence[Outcome]) -> list[float | None]:
    """Strengths of n responses in log-odds, with mean 0; None for a response without an outcome.

    An outcome between 0 and 1 counts as a share of a win. Newton's method on the likelihood, which is concave.
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
        for row, column, sign in ((i, i, 1), (j, j, 1), (i, j, -1), (j, i, -1)):
            np.add.at(curvature, (row, column), sign * p * (1 - p))
        step = np.linalg.solve(curvature, gradient)
        strengths += step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))  # a long step would reach a flat region
        if np.abs(step).max() < 1e-9:
            break
    compared = {k for o in outcomes for k in o[:2]}
    mean = float(np.mean([strengths[k] for k in compared])) if compared else 0.0
    return [float(strengths[k]) - mean if k in compared else None for k in range(n)]


def rank(
    candidates: Iterable[Candidates], judge: Judge, *, scheme: Scheme = "all", failed: OnFailure | None = None
) -> Iterator[Ranking]:
    """One ranking per prompt, in order. scheme: compare all pairs, or a knock-out whose matches the judge's seed draws.

    All pairs of a prompt are compared under the same principles. In a knock-out, the response that was drawn first wins
    a tie or an abstention. failed: as in `Judge.compare`; called once for a prompt, which then has no ranking.
    """
    lost: set[str] = set()

    def lose(failure: Failure) -> None:
        name = failure.id.rpartition("/")[0]
        if failed and name not in lost:
            failed(Failure(name, failure.reason, failure.again))
        lost.add(name)

    remaining = iter(candidates)
    while window := list(islice(remaining, WINDOW)):
        played: dict[str, list[Match]] = {c.id: [] for c in window}
        players = {c.id: _shuffled(c, judge.seed) for c in window}
        while True:
            matches = {c.id: _matches(c, players[c.id], scheme) for c in window}
            pairs = [_pair(c, i, j) for c in window for i, j in matches[c.id]]
            asked = _same_principles(window, matches, judge)
            judged = {c.id: c for c in judge.compare(pairs, asked=asked, failed=lose if failed else None)}
            window = [c for c in window if c.id not in lost]
            for c in window:
                played[c.id] += [(i, j, judged[f"{c.id}/{i}-{j}"]) for i, j in matches[c.id]]
            if scheme == "all":
                break
            for c in window:
                winners = [j if _p_first(judged[f"{c.id}/{i}-{j}"]) < 0.5 else i for i, j in matches[c.id]]
                unmatched = players[c.id][2 * len(winners) :]
                players[c.id] = winners + unmatched
            if all(len(players[c.id]) == 1 for c in window):
                break
        for c in window:
            yield _ranking(c, played[c.id])


def _matches(c: Candidates, players: Sequence[int], scheme: Scheme) -> list[tuple[int, int]]:
    """The pairs of responses to compare next, as indices."""
    if scheme == "all":
        return list(combinations(range(len(c.responses)), 2))
    return list(zip(players[::2], players[1::2], strict=False))


def _pair(c: Candidates | Ranking, i: int, j: int) -> Pair:
    authors = getattr(c, "authors", None)
    return Pair(
        id=f"{c.id}/{i}-{j}", prompt=c.prompt, responses=(c.responses[i], c.responses[j]), source=c.source,
        authors=(authors[i], authors[j]) if authors else None, meta=c.meta,
    )  # fmt: skip


def _shuffled(c: Candidates, seed: int) -> list[int]:
    order = list(range(len(c.responses)))
    random.Random(fingerprint("draw", seed, c.id)).shuffle(order)
    return order


def _same_principles(
    window: Sequence[Candidates], matches: dict[str, list[tuple[int, int]]], judge: Judge
) -> dict[str, list[Principle]] | None:
    """The principles of each pair, the same for all pairs of a prompt; None: the judge draws them for each pair."""
    by_pair: dict[str, list[Principle]] = {}
    for c in window:
        principles = judge.principles_of_prompt(c.id)
        if principles is None:
            return None
        by_pair |= {f"{c.id}/{i}-{j}": principles for i, j in matches[c.id]}
    return by_pair


def _p_first(comparison: Comparison) -> float:
    """P(the first response of the pair is better); 0.5 where the judge abstained."""
    return 0.5 if comparison.p_first is None else comparison.p_first


def _ranking(c: Candidates, played: Sequence[Match]) -> Ranking:
    outcomes = [(i, j, _p_first(m)) for i, j, m in played if m.label is not None]
    strengths = bradley_terry(len(c.responses), outcomes)
    known = [k for k, s in enumerate(strengths) if s is not None]
    return Ranking(
        id=c.id,
        prompt=c.prompt,
        responses=c.responses,
        strengths=tuple(strengths),
        order=tuple(sorted(known, key=lambda k: -strengths[k])),  # type: ignore[operator]
        comparisons=tuple(m for _, _, m in played),
        source=c.source,
        meta={**c.meta, **(played[0][2].meta if played else {})},
    )


def preferences(ranking: Ranking) -> Iterator[Comparison]:
    """The ranking as comparisons of all pairs of its responses, with labels from the strengths.

    A pair that the judge compared has the judge's judgements. A pair is an abstention if the judge abstained on it, or
    if one of its responses has no strength.
    """
    compared = {c.id: c for c in ranking.comparisons}
    for i, j in combinations(range(len(ranking.responses)), 2):
        pair = _pair(ranking, i, j)
        judgements: tuple[Judgement, ...] = ()
        direct = compared.get(pair.id)
        if direct is not None:
            judgements = direct.judgements_of_first
        elif (direct := compared.get(f"{ranking.id}/{j}-{i}")) is not None:
            judgements = tuple(turned(m) for m in direct.judgements_of_first)
        first, second = ranking.strengths[i], ranking.strengths[j]
        if first is None or second is None or (direct is not None and direct.label is None):
            yield comparison_of(pair, judgements, None)
        else:
            yield comparison_of(pair, judgements, first - second, {"strengths": list(ranking.strengths)})
