"""One question to a judge in both orders, and the judge's answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import log_expit, logsumexp

from solon.constitution import Principle
from solon.engines.base import Engine, GenerationRequest, Sampling, ScoreRequest, Scores
from solon.feedback.labels import CERTAIN, MOST, OPPOSED, log_odds, sigmoid
from solon.feedback.questions import (
    OPTIONS,
    PREFIX,
    REASON,
    Example,
    comparison_chat,
    comparison_question,
    each_chat,
    each_question,
    reasoned_chat,
    several,
)
from solon.measures.texts import is_refusal
from solon.records import Judgement, Pair

ALIKE = "certain of the same answer for both responses, with probabilities of exactly 0 and 1"
LEAST_MASS = 1e-3  # least probability of both options together; below it the judge says something else


def first_option(scores: Scores) -> tuple[float | None, str]:
    """(log-odds of A against B, ""), or (None, the reason why the judge gave no answer).

    The log-odds are infinite where the engine says that the other option is impossible: the engine rounds, so its
    certainty is unknown.
    """
    if scores.error:
        return None, scores.error
    a, b = scores.logprobs
    if a is None or b is None:
        return None, "no probability for an option"
    mass = math.exp(a) + math.exp(b)
    if mass < LEAST_MASS:
        return None, f"answered neither option (they hold {mass:.1e} of its probability)"
    odds = a - b
    return (math.copysign(math.inf, odds) if abs(odds) > MOST else odds), ""


@dataclass(frozen=True)
class Task:
    """A pair under one question: the question of one principle, or of several principles together."""

    pair: Pair
    n: int
    principles: tuple[Principle, ...]

    @property
    def check(self) -> Principle | None:
        """The principle of this task, if it is one that is verified without a model."""
        return self.principles[0] if self.principles[0].check is not None else None

    @property
    def question(self) -> str:
        return several([p.comparison for p in self.principles])

    def orders(self) -> Iterator[tuple[str, str, str]]:
        """(request id, response shown as A, response shown as B) for both orders."""
        first, second = self.pair.responses
        yield f"{self.pair.id}/{self.n}/forward", first, second
        yield f"{self.pair.id}/{self.n}/swapped", second, first

    def judgement(self, answers: Mapping[str, Answer], kind: Literal["model", "each"] = "model") -> Judgement:
        forward, swapped = (answers[i] for i, _, _ in self.orders())
        odds = [forward.odds, None if swapped.odds is None else -swapped.odds]
        reason = forward.reason or swapped.reason or None
        if odds in ([math.inf, -math.inf], [-math.inf, math.inf]):  # nobody knows which order is the surer one
            odds, reason = [None, None], OPPOSED
        odds = [math.copysign(CERTAIN, x) if x is not None and math.isinf(x) else x for x in odds]
        probabilities = [None if x is None else sigmoid(x) for x in odds]
        return Judgement(
            principle="+".join(p.id for p in self.principles),
            forward=probabilities[0],
            swapped=probabilities[1],
            forward_log_odds=odds[0],
            swapped_log_odds=odds[1],
            weight=sum(p.weight for p in self.principles),
            rationale=forward.rationale,
            rationale_swapped=swapped.rationale,
            abstained=reason,
            kind=kind,
        )


@dataclass(frozen=True)
class Answer:
    """A judge's answer to one request."""

    odds: float | None  # log-odds of A against B; infinite: see `first_option`
    reason: str = ""  # why odds is None
    rationale: str | None = None
    again: str = ""  # a failure that may pass, so that a later start may get the answer


def ask(tasks: Sequence[Task], engine: Engine, examples: Sequence[Example]) -> dict[str, Answer]:
    """The answer to each request, by request id, from the probabilities of the two options."""
    requests: dict[str, ScoreRequest] = {}
    for task in tasks:
        shown = _without_pair(examples, task)
        for i, a, b in task.orders():
            chat = comparison_chat(task.pair.prompt, a, b, task.question, shown)
            typed = comparison_question(task.pair.prompt, a, b, task.question, shown)
            requests[i] = ScoreRequest(i, chat, OPTIONS, PREFIX, question=typed)
    answers = {}
    for scores in engine.score(requests.values()):
        odds, reason = first_option(scores)
        answers[scores.id] = Answer(odds, reason, again=reason if scores.again else "")
    return answers


def ask_of_each(tasks: Sequence[Task], engine: Engine) -> dict[str, Answer]:
    """As `ask`, where the judge sees one response at a time: the difference of the log-odds that each response is good.

    The difference belongs to no order, so the answers to both requests of a task are the same judgement.
    """
    requests = [
        ScoreRequest(
            f"{task.pair.id}/{task.n}/{side}", each_chat(task.pair.prompt, response, task.question), OPTIONS, PREFIX,
            question=each_question(task.pair.prompt, response, task.question),
        )
        for task in tasks
        for side, response in enumerate(task.pair.responses)
    ]  # fmt: skip
    scores = {s.id: s for s in engine.score(requests)}
    answers = {}
    for task in tasks:
        sides = [scores[f"{task.pair.id}/{task.n}/{side}"] for side in (0, 1)]
        (first, why), (second, other) = map(first_option, sides)
        odds = None if first is None or second is None else _finite(first) - _finite(second)
        if first is not None and math.isinf(first) and first == second:  # nobody knows of which one it is surer
            odds, why = None, ALIKE
        again = next((s.error for s in sides if s.again and s.error), "")
        (forward, *_), (swapped, *_) = task.orders()
        answers[forward] = Answer(odds, why or other, again=again)
        answers[swapped] = Answer(None if odds is None else -odds, why or other, again=again)
    return answers


def _finite(odds: float) -> float:
    return math.copysign(CERTAIN, odds) if math.isinf(odds) else odds


def _without_pair(examples: Sequence[Example], task: Task) -> list[Example]:
    """The examples except those with the prompt of the pair, which would reveal the answer."""
    return [e for e in examples if e.prompt != task.pair.prompt]


def ask_with_rationales(
    tasks: Sequence[Task], engine: Engine, examples: Sequence[Example], *,
    rationales: int, sampling: Sampling, clamp: tuple[float, float], seed: int,
) -> dict[str, Answer]:  # fmt: skip
    """The answer to each request after a chain of thought: the clamped probabilities, averaged over the rationales."""
    chats = {
        i: comparison_chat(task.pair.prompt, a, b, task.question, _without_pair(examples, task), REASON)
        for task in tasks
        for i, a, b in task.orders()
    }
    requests = [GenerationRequest(f"{i}/{n}", chat, seed) for i, chat in chats.items() for n in range(rationales)]
    texts: dict[str, dict[str, str]] = {i: {} for i in chats}
    failed, again = dict.fromkeys(chats, ""), dict.fromkeys(chats, "")
    for completion in engine.generate(requests, sampling):
        i, text = completion.id.rpartition("/")[0], completion.text
        if completion.error:
            failed[i] = completion.error
            again[i] = completion.error if completion.again else again[i]
        elif not text.strip():
            failed[i] = "gave no reasoning"
        elif is_refusal(text):
            failed[i] = f"refused: {text[:80]}"
        else:
            texts[i][completion.id] = text
    questions = [
        ScoreRequest(name, reasoned_chat(chats[i], text), OPTIONS, PREFIX)
        for i, rationale_texts in texts.items()
        for name, text in rationale_texts.items()
    ]
    samples: dict[str, list[float]] = {i: [] for i in chats}
    for scores in engine.score(questions):
        i = scores.id.rpartition("/")[0]
        odds, reason = first_option(scores)
        if odds is None:
            failed[i] = reason
            again[i] = reason if scores.again else again[i]
        else:
            samples[i].append(min(max(odds, log_odds(clamp[0])), log_odds(clamp[1])))
    answers = {}
    for i, sampled in samples.items():
        rationale = "\n---\n".join(text for _, text in sorted(texts[i].items())) or None
        odds = _mean_probability(sampled) if sampled else None
        answers[i] = Answer(odds, "" if sampled else failed[i], rationale, again[i])
    return answers


def _mean_probability(odds: Sequence[float]) -> float:
    """The log-odds of the mean of probabilities that are given as log-odds. The result is exact near 0 and 1."""
    x = np.array(odds)
    return float(logsumexp(log_expit(x)) - logsumexp(log_expit(-x)))
