"""One question to a judge in both orders, and what the judge answered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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
    reasoned_chat,
    several,
)
from solon.measures.texts import is_refusal
from solon.records import Judgement, Pair

LEAST_MASS = 1e-3  # both options together less probable than this: the judge is saying something else


def first_option(scores: Scores) -> tuple[float | None, str]:
    """Log-odds of A against B; or None, and why the judge gave no answer.

    Infinite where the engine says that the other option is impossible: it rounds, and how sure it is nobody knows.
    """
    if scores.error:
        return None, scores.error
    a, b = scores.logprobs
    if a is None or b is None:
        return None, "no probability for an option"
    if math.exp(a) + math.exp(b) < LEAST_MASS:
        return None, f"answered neither option (they hold {math.exp(a) + math.exp(b):.1e} of its probability)"
    odds = a - b
    return (math.copysign(math.inf, odds) if abs(odds) > MOST else odds), ""


@dataclass(frozen=True)
class Task:
    """A pair under one question: that of a principle, or of several together."""

    pair: Pair
    n: int
    principles: tuple[Principle, ...]

    @property
    def check(self) -> Principle | None:
        """The principle that is verified without a model, where this is one."""
        return self.principles[0] if self.principles[0].check is not None else None

    @property
    def question(self) -> str:
        return several([p.comparison for p in self.principles])

    def orders(self) -> Iterator[tuple[str, str, str]]:
        """(request id, shown as (A), shown as (B)) of both orders."""
        first, second = self.pair.responses
        yield f"{self.pair.id}/{self.n}/forward", first, second
        yield f"{self.pair.id}/{self.n}/swapped", second, first

    def judgement(self, answers: Mapping[str, Answer]) -> Judgement:
        name, weight = "+".join(p.id for p in self.principles), sum(p.weight for p in self.principles)
        forward, swapped = (answers[i] for i, _, _ in self.orders())
        odds = [forward.odds, None if swapped.odds is None else -swapped.odds]
        why = forward.why or swapped.why or None
        if odds in ([math.inf, -math.inf], [-math.inf, math.inf]):  # which is the surer one, nobody knows
            odds, why = [None, None], OPPOSED
        kept = [math.copysign(CERTAIN, x) if x is not None and math.isinf(x) else x for x in odds]
        return Judgement(
            principle=name,
            forward=None if kept[0] is None else sigmoid(kept[0]),
            swapped=None if kept[1] is None else sigmoid(kept[1]),
            forward_log_odds=kept[0],
            swapped_log_odds=kept[1],
            weight=weight,
            rationale=forward.rationale,
            rationale_swapped=swapped.rationale,
            abstained=why,
        )


@dataclass(frozen=True)
class Answer:
    """What a judge answered to one request."""

    odds: float | None  # log-odds of A against B; infinite: see `first_option`
    why: str = ""  # where odds is None
    rationale: str | None = None
    again: str = ""  # a failure that may pass, so that a later start may get the answer


def ask(tasks: Sequence[Task], engine: Engine, examples: Sequence[Example]) -> dict[str, Answer]:
    """The answer to each request, by its id: the probabilities of the two options."""
    requests: dict[str, ScoreRequest] = {}
    for task in tasks:
        shown = _shown(task, examples)
        for i, a, b in task.orders():
            chat = comparison_chat(task.pair.prompt, a, b, task.question, shown)
            typed = comparison_question(task.pair.prompt, a, b, task.question, shown)
            requests[i] = ScoreRequest(i, chat, OPTIONS, PREFIX, question=typed)
    found = {}
    for s in engine.score(requests.values()):
        odds, why = first_option(s)
        found[s.id] = Answer(odds, why, again=why if s.again else "")
    return found


def _shown(task: Task, examples: Sequence[Example]) -> list[Example]:
    """The examples without those of the pair's own prompt, which would tell the answer."""
    return [e for e in examples if e.prompt != task.pair.prompt]


def ask_with_rationales(
    tasks: Sequence[Task], engine: Engine, examples: Sequence[Example], *,
    rationales: int, sampling: Sampling, clamp: tuple[float, float], seed: int,
) -> dict[str, Answer]:  # fmt: skip
    """Chain of thought: a rationale first, then the options' probabilities, clamped; averaged over the samples."""
    chats = {
        i: comparison_chat(task.pair.prompt, a, b, task.question, _shown(task, examples), REASON)
        for task in tasks
        for i, a, b in task.orders()
    }
    asked = [GenerationRequest(f"{i}/{n}", chat, seed) for i, chat in chats.items() for n in range(rationales)]
    texts: dict[str, dict[str, str]] = {i: {} for i in chats}
    failed = dict.fromkeys(chats, "")
    again = dict.fromkeys(chats, "")
    for made in engine.generate(asked, sampling):
        i = made.id.rpartition("/")[0]
        if made.error:
            failed[i] = made.error
            again[i] = made.error if made.again else again[i]
        elif not made.text.strip():
            failed[i] = "gave no reasoning"
        elif is_refusal(made.text):
            failed[i] = f"refused: {made.text[:80]}"
        else:
            texts[i][made.id] = made.text
    requests = [
        ScoreRequest(name, reasoned_chat(chats[i], text), OPTIONS, PREFIX)
        for i, written in texts.items()
        for name, text in written.items()
    ]
    found: dict[str, list[float]] = {i: [] for i in chats}
    for scores in engine.score(requests):
        i = scores.id.rpartition("/")[0]
        odds, why = first_option(scores)
        if odds is None:
            failed[i] = why
            again[i] = why if scores.again else again[i]
        else:
            found[i].append(min(max(odds, log_odds(clamp[0])), log_odds(clamp[1])))
    answers = {}
    for i, odds_of_samples in found.items():
        said = "\n---\n".join(text for _, text in sorted(texts[i].items())) or None
        odds_of_all = _mean_probability(odds_of_samples) if odds_of_samples else None
        answers[i] = Answer(odds_of_all, "" if odds_of_samples else failed[i], said, again[i])
    return answers


def _mean_probability(odds: Sequence[float]) -> float:
    """The log-odds of the mean of probabilities, each given by its log-odds; exact where they are near 0 and 1."""
    x = np.array(odds)
    return float(logsumexp(log_expit(x)) - logsumexp(log_expit(-x)))
