"""Laws of pointwise judging, and of PPO that climbs it with no reward model."""

from __future__ import annotations

import math

import pytest

from solon.constitution import load_constitution
from solon.engines import ScoreRequest, ScriptedEngine
from solon.engines.base import Scores
from solon.engines.local import LocalEngine
from solon.feedback.judge import ModelJudge
from solon.feedback.questions import LEVELS
from solon.feedback.rating import JudgeReward, expected_rating
from solon.records import Chat, assistant, user
from tests.asking import rate

RULES = load_constitution("simple")


def chat(response: str, prompt: str = "hello") -> Chat:
    return (user(prompt), assistant(response))


def likes_short(request: ScoreRequest) -> tuple[float, ...]:
    """Rates n words with 10 - n, fairly surely."""
    assert request.continuations == LEVELS and request.question is not None
    best = 10 - len(request.question.state["response"].split())
    weights = [math.exp(-abs(n - best)) for n in range(1, 11)]
    return tuple(math.log(w / sum(weights)) for w in weights)


def test_the_rating_is_the_expected_value() -> None:
    even = Scores("x", tuple(math.log(0.1) for _ in LEVELS))
    assert expected_rating(even)[0] == pytest.approx(5.5)
    sure = Scores("x", tuple(0.0 if level == "10" else -40.0 for level in LEVELS))
    assert expected_rating(sure)[0] == pytest.approx(10)


def test_what_the_judge_does_not_rate_is_an_abstention() -> None:
    assert expected_rating(Scores("x", (None,) * 10))[0] is None
    assert expected_rating(Scores("x", (math.log(0.2), *(None,) * 9)))[0] is None  # most of it told of other words
    assert expected_rating(Scores("x", (None, math.log(0.9), *(None,) * 8)))[0] == pytest.approx(2)
    assert expected_rating(Scores("x", (-30.0,) * 10))[0] is None
    [one] = rate([("a", chat("x"))], ScriptedEngine(prefer=lambda r: (None,) * 10), RULES)
    assert one.rating is None and one.abstained


def test_several_principles_are_averaged_with_their_weights() -> None:
    first, second, *_rest = RULES.principles
    rules = RULES.model_copy(update={"principles": (first, second.model_copy(update={"weight": 3.0}))})

    def prefer(request: ScoreRequest) -> tuple[float, ...]:
        level = "4" if first.comparison in request.chat[-1].content else "8"
        return tuple(0.0 if x == level else -60.0 for x in LEVELS)

    [one] = rate([("a", chat("x"))], ScriptedEngine(prefer=prefer), rules, principles=None)
    assert one.rating == pytest.approx(7.0)
    assert one.by_principle == {first.id: pytest.approx(4.0), second.id: pytest.approx(8.0)}


def test_a_model_s_ratings_are_a_distribution_over_whole_answers(tiny: str) -> None:
    """ "1" must not be counted for "10" as well."""
    engine = LocalEngine.load(tiny, dtype="float32")
    [scores] = engine.score([ScoreRequest("r", chat("x")[:1], LEVELS, "(", ")")])
    assert sum(math.exp(p) for p in scores.logprobs if p is not None) < 1 + 1e-5
    [one] = rate([("a", chat("x"))], engine, RULES)
    assert one.rating is None or 1 <= one.rating <= 10


def test_a_broken_principle_is_asked_about_with_yes_and_no() -> None:
    def prefer(request: ScoreRequest) -> tuple[float, float]:
        assert request.continuations == ("A", "B") and request.question is not None and request.question.kind == "noul"
        said = 4.0 if "rude" in request.question.state["response"] else -4.0
        return said, 0.0

    rude, kind = rate([("a", chat("rude")), ("b", chat("x"))], ScriptedEngine(prefer=prefer), RULES, scale="broken")
    assert rude.rating == pytest.approx(10 - 9 / (1 + math.exp(-4))) and rude.rating < 2 < 9 < kind.rating  # type: ignore[operator]
    [none] = rate([("a", chat("x"))], ScriptedEngine(prefer=lambda r: (None, None)), RULES, scale="broken")
    assert none.rating is None and none.abstained


def test_rewards_are_in_standard_deviations_and_an_abstention_is_neither_good_nor_bad() -> None:
    def prefer(request: ScoreRequest) -> tuple[float | None, ...]:
        assert request.question is not None
        return (None,) * 10 if "secret" in request.question.state["response"] else likes_short(request)

    rewards = JudgeReward(ModelJudge(ScriptedEngine(prefer=prefer), RULES))
    reference = [chat("a " * n) for n in range(1, 7)]
    rewards.normalise(reference)
    scores = rewards.score(reference)
    assert sum(scores) == pytest.approx(0, abs=1e-9)
    assert sum(s * s for s in scores) / len(scores) == pytest.approx(1)
    assert scores == sorted(scores, reverse=True)
    assert rewards.score([chat("the secret"), chat("a")])[0] == 0.0 and rewards.abstained == 1


def test_a_judge_that_rates_nothing_says_why() -> None:
    rewards = JudgeReward(ModelJudge(ScriptedEngine(prefer=lambda r: (None,) * 10), RULES))
    rewards.normalise([chat("x"), chat("y")])
    assert rewards.abstained == rewards.rated == 2 and rewards.why
