"""Laws of ranking: Bradley–Terry finds the strengths it is given; neither the order of responses nor a tournament's
draw changes who is best when the judge is clear."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solon.constitution import load_constitution
from solon.engines import ScoreRequest, ScriptedEngine
from solon.feedback.labels import sigmoid
from solon.feedback.ranking import bradley_terry, preferences
from solon.feedback.settings import JudgeSettings
from solon.records import Candidates, text_of, user
from tests.asking import rank

RULES = load_constitution("simple")
GOOD = {"w": 3.0, "x": 1.0, "y": 0.0, "z": -2.0}


def judge(good: dict[str, float] = GOOD) -> ScriptedEngine:
    def prefer(request: ScoreRequest) -> tuple[float, float]:
        assert request.question is not None
        a, b = request.question.criteria
        return good[a] - good[b] + 0.3, 0.0  # and a leaning to the first place

    return ScriptedEngine(prefer=prefer)


def candidates(*responses: str, name: str = "c") -> Candidates:
    return Candidates(id=name, prompt=(user("hello"),), responses=responses)


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6))
def test_strengths_are_found_again_from_what_they_predict(true: list[float]) -> None:
    outcomes = [(i, j, sigmoid(true[i] - true[j])) for i, j in combinations(range(len(true)), 2)]
    found = bradley_terry(len(true), outcomes)
    mean = sum(true) / len(true)
    assert found == pytest.approx([t - mean for t in true], abs=0.05)


def test_who_always_wins_is_strong_but_not_infinitely() -> None:
    found = bradley_terry(3, [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0)])
    assert all(f is not None and math.isfinite(f) for f in found)
    assert found[0] > found[1] > found[2]  # type: ignore[operator]


def test_nothing_said_is_no_strength() -> None:
    assert bradley_terry(3, [(0, 2, 0.5)]) == [pytest.approx(0), None, pytest.approx(0)]
    assert bradley_terry(2, []) == [None, None]


@pytest.mark.parametrize("scheme", ["all", "tournament"])
def test_the_best_is_best_however_the_responses_lie(scheme: str) -> None:
    for seed in range(6):
        given_ = list(GOOD)
        random.Random(seed).shuffle(given_)
        [one] = rank([candidates(*given_)], judge(), RULES, scheme=scheme, seed=seed)  # type: ignore[arg-type]
        assert one.responses[one.order[0]] == "w"
        assert len(one.comparisons) == (6 if scheme == "all" else 3)
        if scheme == "all":
            assert [one.responses[k] for k in one.order] == ["w", "x", "y", "z"]
            spread = one.strengths[one.order[0]] - one.strengths[one.order[-1]]  # type: ignore[operator]
            assert spread == pytest.approx(5.0, abs=0.1)  # w less z, the leaning to a place gone


def test_prompts_side_by_side_are_ranked_as_alone() -> None:
    two = [candidates("w", "x", "y", name="a"), candidates("z", "y", name="b"), candidates(*GOOD, name="c")]
    for scheme in ("all", "tournament"):
        together = list(rank(two, judge(), RULES, scheme=scheme, seed=3))  # type: ignore[arg-type]
        alone = [next(rank([c], judge(), RULES, scheme=scheme, seed=3)) for c in two]  # type: ignore[arg-type]
        assert together == alone


def test_a_ranking_becomes_comparisons_that_agree_with_it() -> None:
    [one] = rank([candidates("z", "w", "y")], judge(), RULES, JudgeSettings(principles_per_pair=2))
    made = {c.id: c for c in preferences(one)}
    assert len(made) == 3
    for c in made.values():
        assert GOOD[text_of(c.chosen)] > GOOD[text_of(c.rejected)]
        assert c.label == pytest.approx(sigmoid(GOOD[text_of(c.chosen)] - GOOD[text_of(c.rejected)]), abs=0.02)
        assert len(c.judgements) == 2 and all(j.forward > 0.5 and j.swapped > 0.5 for j in c.judgements)
        assert len({j.principle for m in made.values() for j in m.judgements}) == 2  # all under the same


def test_an_abstention_in_a_ranking_stays_one() -> None:
    def prefer(request: ScoreRequest) -> tuple[float | None, float]:
        assert request.question is not None
        a, b = request.question.criteria
        return (None, 0.0) if "y" in (a, b) else (GOOD[a] - GOOD[b], 0.0)

    [one] = rank([candidates("w", "y", "x")], ScriptedEngine(prefer=prefer), RULES)
    assert one.strengths[1] is None and one.order == (0, 2)
    assert sorted(c.abstained for c in preferences(one)) == [False, True, True]


@pytest.mark.parametrize("scheme", ["all", "tournament"])
@pytest.mark.parametrize("silent", ["w", "x", "y", "wxyz"])
def test_every_pair_of_responses_becomes_one_record_by_its_own_id(scheme: str, silent: str) -> None:
    """Whatever was drawn and whatever was not answered: a labelling that is started again must know its records."""

    def prefer(request: ScoreRequest) -> tuple[float | None, float]:
        assert request.question is not None
        a, b = request.question.criteria
        return (None, 0.0) if (a in silent and b not in silent[1:]) or b in silent else (GOOD[a] - GOOD[b], 0.0)

    for seed in range(6):
        [one] = rank([candidates(*"wxyz", name="c")], ScriptedEngine(prefer=prefer), RULES, scheme=scheme, seed=seed)  # type: ignore[arg-type]
        made = list(preferences(one))
        assert sorted(c.id for c in made) == [f"c/{i}-{j}" for i in range(4) for j in range(i + 1, 4)]
        for c in made:
            i, j = (int(k) for k in c.id.removeprefix("c/").split("-"))
            assert {text_of(c.chosen), text_of(c.rejected)} == {one.responses[i], one.responses[j]}
            assert c.abstained == (c.label is None)
