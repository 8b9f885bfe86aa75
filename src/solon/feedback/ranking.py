"""Ranking more than two responses: pairs of them are compared, and Bradley–Terry makes one scale of the outcomes.

Bradley and Terry 1952: P(i is better than j) = sigmoid(s_i - s_j). Comparisons of all pairs cost k (k - 1) / 2
questions, a knock-out tournament k - 1, at the price of knowing little about those that leave early.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, islice
from typing import Any, Literal

import numpy as np

from solon.constitution import Constitution
from solon.engines.base import Engine, Failure, OnFailure
from solon.feedback.judge import WINDOW, Judging, compare, probability_for, sigmoid, to_comparison, turned
from solon.feedback.questions import Example
from solon.records import Candidates, Comparison, Pair, Ranking, assistant, fingerprint, text_of

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
    candidates: Iterable[Candidates],
    engine: Engine,
    constitution: Constitution,
    how: Judging = Judging(),  # noqa: B008
    *,
    scheme: Literal["all", "tournament"] = "all",
    examples: Sequence[Example] = (),
    seed: int = 0,
    meta: dict[str, Any] | None = None,
    failed: OnFailure | None = None,
) -> Iterator[Ranking]:
    """One ranking a prompt, in order. scheme: compare all pairs, or a knock-out whose draw the seed decides.

    All pairs of a prompt are compared under the same principles. In a knock-out a tie or an abstention lets the one
    drawn first go on. failed: as `compare` takes it; told of a prompt once, and no ranking is made of it.
    """
    lost: set[str] = set()

    def lose(failure: Failure) -> None:
        name = failure.id.rpartition("/")[0]
        if failed and name not in lost:
            failed(Failure(name, failure.reason, failure.again))
        lost.add(name)

    left = iter(candidates)
    while window := list(islice(left, WINDOW)):
        found: dict[str, list[tuple[int, int, Comparison]]] = {c.id: [] for c in window}
        going = {c.id: _drawn(c, seed) for c in window}
        while True:
            matches = {
                c.id: list(combinations(range(len(c.responses)), 2))
                if scheme == "all"
                else list(zip(going[c.id][::2], going[c.id][1::2], strict=False))
                for c in window
            }
            asked = {
                f"{c.id}/{i}-{j}": Pair(id=f"{c.id}/{i}-{j}", prompt=c.prompt, responses=(c.responses[i], c.responses[j]),
                     source=c.source, authors=(c.authors[i], c.authors[j]) if c.authors else None, meta=c.meta)
                for c in window for i, j in matches[c.id]
            }  # fmt: skip
            principles = _same_for_all(window, matches, constitution, how, seed)
            judged = compare(
                asked.values(), engine, constitution, how, asked=principles, examples=examples, seed=seed, meta=meta,
                failed=lose if failed else None,
            )  # fmt: skip
            said = {c.id: c for c in judged}
            window = [c for c in window if c.id not in lost]
            for c in window:
                found[c.id] += [(i, j, said[f"{c.id}/{i}-{j}"]) for i, j in matches[c.id]]
            if scheme == "all":
                break
            for c in window:
                names, met = going[c.id], {(i, j): said[f"{c.id}/{i}-{j}"] for i, j in matches[c.id]}
                won = [j if _first_better(m, c, i) < 0.5 else i for (i, j), m in met.items()]
                going[c.id] = won + names[len(names) - len(names) % 2 :]
            if all(len(going[c.id]) == 1 for c in window):
                break
        for c in window:
            yield _ranking(c, found[c.id], meta or {})


def _drawn(c: Candidates, seed: int) -> list[int]:
    order = list(range(len(c.responses)))
    random.Random(fingerprint("draw", seed, c.id)).shuffle(order)
    return order


def _same_for_all(
    window: Sequence[Candidates], matches: dict[str, list[tuple[int, int]]], constitution: Constitution, how: Judging, seed: int
) -> dict[str, Any] | None:  # fmt: skip
    if how.principles is None:
        return None
    from solon.constitution.drawing import draw_principles

    drawn = {c.id: draw_principles(constitution, how.principles, "rank", seed, c.id) for c in window}
    return {f"{i}/{a}-{b}": drawn[i] for i, pairs in matches.items() for a, b in pairs}


def _first_better(comparison: Comparison, c: Candidates, i: int) -> float:
    """P(response i is better) of a comparison that i stood first in; a tie where the judge abstained."""
    p = probability_for(comparison, c.responses[i])
    return 0.5 if p is None else p


def _ranking(c: Candidates, found: Sequence[tuple[int, int, Comparison]], meta: dict[str, Any]) -> Ranking:
    outcomes = [(i, j, _first_better(m, c, i)) for i, j, m in found if m.label is not None]
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
        meta={**c.meta, **meta},
    )


def preferences(ranking: Ranking) -> Iterator[Comparison]:
    """The ranking as comparisons of all pairs of its responses, labelled by their strengths.

    Where a pair itself was compared its judgements stand with it. Where the judge said nothing of one of the two, or
    abstained on just these, that pair is an abstention.
    """
    compared = {c.id: c for c in ranking.comparisons}
    for i, j in combinations(range(len(ranking.responses)), 2):
        name = f"{ranking.id}/{i}-{j}"
        direct = compared.get(name) or compared.get(f"{ranking.id}/{j}-{i}")
        a, b = ranking.strengths[i], ranking.strengths[j]
        if direct is not None and direct.label is None:
            yield direct.model_copy(update={"id": name})
            continue
        if a is None or b is None:  # of one of them nothing is known
            pair = Pair(id=name, prompt=ranking.prompt, responses=(ranking.responses[i], ranking.responses[j]),
                        source=ranking.source, meta=ranking.meta)  # fmt: skip
            yield to_comparison(pair, (), {})
            continue
        chosen, rejected = (i, j) if a >= b else (j, i)
        label = sigmoid(abs(a - b))
        judgements = () if direct is None else direct.judgements
        if direct is not None and text_of(direct.chosen) != ranking.responses[chosen]:  # the scale overrules the pair
            judgements = tuple(turned(m) for m in judgements)
        yield Comparison(
            id=name,
            prompt=ranking.prompt,
            chosen=(assistant(ranking.responses[chosen]),),
            rejected=(assistant(ranking.responses[rejected]),),
            label=label,
            log_odds=abs(a - b),
            judgements=judgements,
            source=ranking.source,
            meta={**ranking.meta, "strengths": list(ranking.strengths)},
        )
