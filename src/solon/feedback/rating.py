"""Ratings of single responses, from 1 to 10, and their use as PPO's reward.

Lee et al. 2023 (arXiv 2309.00267), section 2.4, "direct RLAIF": the likelihoods of the ten ratings are normalised, and the
expected value is the score. The other scale asks one yes-or-no question: whether the response breaks the principle. With a
rating as the reward, PPO needs no reward model that ages as the policy changes, but each reward takes a question to the judge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from statistics import fmean, pstdev
from typing import Any

from solon.constitution import Principle
from solon.engines.base import ScoreRequest, Scores
from solon.errors import InputError
from solon.feedback.answers import LEAST_MASS, first_option
from solon.feedback.checks import satisfies
from solon.feedback.judge import WINDOW, Judge, ModelJudge
from solon.feedback.labels import sigmoid
from solon.feedback.questions import (
    LEVELS,
    OPTIONS,
    PREFIX,
    SUFFIX,
    breaking_chat,
    breaking_question,
    rating_chat,
    rating_question,
)
from solon.feedback.settings import Scale
from solon.records import Chat, Rating, fingerprint, text_of

ENOUGH = 0.5  # least probability of the ratings that an endpoint reports, where it does not report all of them


def expected_rating(scores: Scores) -> tuple[float | None, str]:
    """(mean rating from 1 to 10, ""), or (None, the reason why the judge gave no rating).

    Some engines report only the most likely answers. If the reported ratings hold most of the probability, the others
    count as 0; otherwise there is no rating. A chat API scores single letters, which cannot say 10, so a judge behind
    `server:` needs the scale "broken".
    """
    if scores.error:
        return None, scores.error
    reported = {n: math.exp(min(p, 0.0)) for n, p in enumerate(scores.logprobs, start=1) if p is not None}
    mass = sum(reported.values())
    if not reported:
        return None, "gave no rating"
    if mass < (LEAST_MASS if len(reported) == len(LEVELS) else ENOUGH):
        return None, f"gave no rating (the ratings hold {mass:.1e} of its probability)"
    return sum(n * p for n, p in reported.items()) / mass, ""


def unbroken_rating(scores: Scores) -> tuple[float | None, str]:
    """10 - 9 P(the response breaks the principle), as `expected_rating` gives it."""
    broken, reason = first_option(scores)
    return (None, reason) if broken is None else (10 - 9 * sigmoid(broken), "")


def rate(chats: Iterable[tuple[str, Chat]], judge: ModelJudge) -> Iterator[Rating]:
    """One rating per conversation, in order. chats: (id, conversation that ends with the response).

    The judge's scale: "levels" is the mean of the ratings 1 to 10, weighted by their probabilities. "broken" is one
    yes-or-no question, and the probability that the response follows the principle is mapped to 1 to 10. There is one
    order only, so a bias towards yes is not measured; the bias is the same for all responses.

    Principles are drawn per prompt, so all responses to a prompt have the same principles. The ratings of several
    principles are averaged with their weights. A principle with a check gives 10 where the response passes, 1 where not.
    """
    scale = judge.settings.scale
    read = expected_rating if scale == "levels" else unbroken_rating
    remaining = iter(chats)
    while window := list(islice(remaining, WINDOW)):
        drawn = {i: judge.draw("rate", judge.seed, [m.model_dump() for m in chat[:-1]]) for i, chat in window}
        requests = [
            _request(f"{i}/{n}", chat[:-1], text_of(chat), p.comparison, scale)
            for i, chat in window
            for n, p in enumerate(drawn[i])
            if p.check is None
        ]
        answers = {s.id: read(s) for s in judge.engine.score(requests)}
        for i, chat in window:
            ratings = [answers[f"{i}/{n}"] if p.check is None else _by_check(p, chat) for n, p in enumerate(drawn[i])]
            yield _rating(i, chat, drawn[i], ratings, judge.meta())


def _rating(
    name: str, chat: Chat, principles: Sequence[Principle], ratings: Sequence[tuple[float | None, str]],
    meta: dict[str, Any],
) -> Rating:  # fmt: skip
    """ratings: (rating, "") of each principle, or (None, the reason)."""
    rated = [(p.weight, value) for p, (value, _) in zip(principles, ratings, strict=True) if value is not None]
    weight = sum(w for w, _ in rated)
    return Rating(
        id=name,
        prompt=chat[:-1],
        response=text_of(chat),
        rating=sum(w * value for w, value in rated) / weight if weight else None,
        by_principle={p.id: value for p, (value, _) in zip(principles, ratings, strict=True)},
        abstained=None if weight else next((reason for _, reason in ratings if reason), ""),
        meta=meta,
    )


def _request(name: str, prompt: Chat, response: str, question: str, scale: Scale) -> ScoreRequest:
    if scale == "levels":
        typed = rating_question(prompt, response, question)
        return ScoreRequest(name, rating_chat(prompt, response, question), LEVELS, PREFIX, SUFFIX, typed)
    typed = breaking_question(prompt, response, question)
    return ScoreRequest(name, breaking_chat(prompt, response, question), OPTIONS, PREFIX, question=typed)


def _by_check(principle: Principle, chat: Chat) -> tuple[float | None, str]:
    assert principle.check is not None
    try:
        return 1 + 9 * satisfies(principle.check, chat[:-1], text_of(chat)), ""
    except InputError:
        raise
    except Exception as error:  # a check by the user may raise anything; the answer is then an abstention
        return None, f"the check failed: {error}"


class JudgeReward:
    """The judge's rating as PPO's reward, in standard deviations of a reference, as a reward model scores."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.mean, self.std = 0.0, 1.0
        self.rated = self.abstained = 0
        self.why = ""  # the reason of the last abstention

    def normalise(self, reference: Sequence[Chat]) -> None:
        """Set mean and standard deviation from the ratings of reference conversations, which end with a response."""
        rated = [r for r in self._ratings(reference) if r is not None]
        if rated:
            self.mean, self.std = fmean(rated), max(pstdev(rated), 1e-6)

    def score(self, chats: Sequence[Chat]) -> list[float]:
        """One reward per conversation. A response without a rating gets 0, the mean of the reference."""
        return [0.0 if r is None else r for r in self.rated_scores(chats)]

    def rated_scores(self, chats: Sequence[Chat]) -> list[float | None]:
        """As `score`, but None for a response without a rating."""
        return [None if r is None else (r - self.mean) / self.std for r in self._ratings(chats)]

    def _ratings(self, chats: Sequence[Chat]) -> list[float | None]:
        names = [f"{n}-{fingerprint('rated', [m.model_dump() for m in c])}" for n, c in enumerate(chats)]
        ratings = []
        for r in self.judge.rate(zip(names, chats, strict=True)):
            ratings.append(r.rating)
            self.why = r.abstained or self.why
        self.rated += len(ratings)
        self.abstained += ratings.count(None)
        return ratings
