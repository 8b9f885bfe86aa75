"""Pointwise judging: how good is one response, from 1 to 10? And that as the reward itself.

Lee et al. 2023 (arXiv 2309.00267), section 2.4, "direct RLAIF": the likelihoods of the ten ratings are normalised,
and the expected value is the score. Or one yes-or-no question, whether the response breaks the principle. PPO can
climb either with no reward model in between, so nothing goes stale as the policy moves; each reward costs a question
to the judge.
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

ENOUGH = 0.5  # of the judge's probability must lie on the ratings that an endpoint tells of


def expected_rating(scores: Scores) -> tuple[float | None, str]:
    """The mean rating, 1 to 10; or None, and why the judge gave none.

    Some engines tell only the most likely answers. Ratings that are not among them hold next to nothing, if the told
    ones hold most of the probability; else there is no rating. (A chat API's single letters cannot say 10: behind
    `server:` use the scale "broken".)
    """
    if scores.error:
        return None, scores.error
    told = {n: math.exp(min(p, 0.0)) for n, p in enumerate(scores.logprobs, start=1) if p is not None}
    mass = sum(told.values())
    if not told:
        return None, "gave no rating"
    if mass < (LEAST_MASS if len(told) == len(LEVELS) else ENOUGH):
        return None, f"gave no rating (the ratings hold {mass:.1e} of its probability)"
    return sum(n * p for n, p in told.items()) / mass, ""


def kept_rating(scores: Scores) -> tuple[float | None, str]:
    """10 where the judge is sure that the principle is kept, 1 where it is sure that it is broken."""
    broken, why = first_option(scores)
    return (None, why) if broken is None else (10 - 9 * sigmoid(broken), "")


def rate(chats: Iterable[tuple[str, Chat]], judge: ModelJudge) -> Iterator[Rating]:
    """One rating a chat, in order. chats: (id, conversation that ends with the response).

    The judge's scale: "levels", the mean of the ratings 1 to 10 by their probabilities; "broken", one yes-or-no question,
    the probability that the principle is kept stretched over 1 to 10. There is one order only: whether a judge says yes
    too readily shows in no number here, but is the same for all responses.

    Principles are drawn for each conversation, the same for all responses to it. The ratings of several are averaged with
    their weights. A verifiable principle gives 10 where it is kept and 1 where it is broken.
    """
    scale = judge.settings.scale
    read = expected_rating if scale == "levels" else kept_rating
    left = iter(chats)
    while window := list(islice(left, WINDOW)):
        asked: dict[str, list[Principle]] = {}
        requests = []
        for i, chat in window:
            prompt, response = chat[:-1], text_of(chat)
            asked[i] = judge.draw("rate", judge.seed, [m.model_dump() for m in prompt])
            for n, p in enumerate(asked[i]):
                if p.check is None:
                    requests.append(_request(f"{i}/{n}", prompt, response, p.comparison, scale))
        answers = {s.id: read(s) for s in judge.engine.score(requests)}
        for i, chat in window:
            found = [answers[f"{i}/{n}"] if p.check is None else _by_check(p, chat) for n, p in enumerate(asked[i])]
            yield _rating(i, chat, asked[i], found, judge.meta())


def _rating(
    name: str, chat: Chat, asked: Sequence[Principle], found: Sequence[tuple[float | None, str]], meta: dict[str, Any]
) -> Rating:
    """found: of each principle its rating, or None and why there is none."""
    given = [(p.weight, value) for p, (value, _) in zip(asked, found, strict=True) if value is not None]
    weight = sum(w for w, _ in given)
    return Rating(
        id=name,
        prompt=chat[:-1],
        response=text_of(chat),
        rating=sum(w * value for w, value in given) / weight if weight else None,
        by_principle={p.id: value for p, (value, _) in zip(asked, found, strict=True)},
        abstained=None if weight else next((why for _, why in found if why), ""),
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
    except Exception as error:  # whatever a user's own check raises is that answer's abstention
        return None, f"the check failed: {error}"


class JudgeReward:
    """The judge's rating as PPO's reward: it scores as a reward model does, in standard deviations of a reference."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.mean, self.std = 0.0, 1.0
        self.rated = self.abstained = 0
        self.why = ""  # of the last abstention

    def normalise(self, reference: Sequence[Chat]) -> None:
        """Take mean and standard deviation from the ratings of a reference, conversations that end in a response."""
        given = [r for r in self._ratings(reference) if r is not None]
        if given:
            self.mean, self.std = fmean(given), max(pstdev(given), 1e-6)

    def score(self, chats: Sequence[Chat]) -> list[float]:
        """One reward a conversation. What the judge would not rate is no better and no worse than the reference."""
        return [0.0 if r is None else r for r in self.rated_scores(chats)]

    def rated_scores(self, chats: Sequence[Chat]) -> list[float | None]:
        """As `score`; None where the judge would not rate."""
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
