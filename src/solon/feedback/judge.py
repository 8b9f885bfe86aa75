"""The AI judge: which of two responses does a principle favour, and how surely?

Bai et al. 2022 (arXiv 2212.08073), section 4.1: the feedback model sees the conversation, a principle and two
options, and the label is the normalised probability of the two option letters. Each pair is shown in both orders
and the two are averaged in log-odds, so a preference for a position cancels. From the model's answer to the label
they stay log-odds: a probability rounds to 1 at log-odds of 37, and two such orders would cancel to a tie that the
judge did not mean. What the judge could not answer is an abstention with its reason, never a label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
from scipy.special import log_expit, logsumexp

from solon.constitution import Constitution, Principle
from solon.constitution.drawing import draw_principles
from solon.engines.base import Engine, Failure, GenerationRequest, OnFailure, Sampling, ScoreRequest, Scores
from solon.feedback.checks import judge_by_check
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
from solon.measures.statistics import NEAREST
from solon.measures.texts import is_refusal
from solon.records import Chat, Comparison, Judgement, Pair, assistant, text_of

LEAST_MASS = 1e-3  # both options together less probable than this: the judge is saying something else
MOST = 700.0  # log-odds beyond are no number: a probability of e^-700 is about the least that a double can hold
# An engine that says exactly 0 has rounded: the log-odds of a probability of one in a thousand million stand for it.
CERTAIN = 20.7
OPPOSED = "certain of opposite sides in the two orders, with probabilities of exactly 0 and 1"
WINDOW = 64  # pairs whose requests go to the engine together


@dataclass(frozen=True)
class Judging:
    """How a pair is judged.

    principles: how many are drawn for each pair, by the seed and their weights; None: all of them.
    together: ask about all a pair's principles in one question, not in one each.
    labels: "soft", the probability; "hard", 1 or 0, and 0.5 where the two orders contradict each other.
    rationales: chain of thought, so many samples an order whose probabilities are averaged (0: none, answer at once).
    clamp: after a chain of thought the probability is held inside these: it is near 0 or 1 and badly calibrated
        there (Bai et al. 2022, section 4.1, found 40–60 % best).
    """

    principles: int | None = 1
    together: bool = False
    labels: Literal["soft", "hard"] = "soft"
    rationales: int = 0
    clamp: tuple[float, float] = (0.4, 0.6)
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=160))


def log_odds(probability: float) -> float:
    """Natural log of p / (1 - p); infinite at 0 and 1."""
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


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


def odds_of(j: Judgement) -> tuple[float, float] | None:
    """The log-odds that the first response is better, shown first and shown second; None: an abstention.

    A record that has only probabilities is held `NEAREST` from 0 and 1, as Solon's own records of that kind were.
    """
    if j.forward is None or j.swapped is None:
        return None
    forward = log_odds(_inside(j.forward)) if j.forward_log_odds is None else j.forward_log_odds
    swapped = log_odds(_inside(j.swapped)) if j.swapped_log_odds is None else j.swapped_log_odds
    return forward, swapped


def label_odds(c: Comparison) -> float:
    """The log-odds of a comparison's label, which it must have; a label alone is held `NEAREST` from 0 and 1."""
    assert c.label is not None
    return log_odds(_inside(c.label)) if c.log_odds is None else c.log_odds


def odds_for(c: Comparison, response: str) -> float | None:
    """The log-odds that this one of the two compared responses is better; None where the judge abstained."""
    if c.label is None:
        return None
    return label_odds(c) if text_of(c.chosen) == response else -label_odds(c)


def probability_for(c: Comparison, response: str) -> float | None:
    """P(this one of the two compared responses is better); None where the judge abstained."""
    if c.label is None:
        return None
    return c.label if text_of(c.chosen) == response else 1 - c.label


def combine(judgements: Sequence[Judgement], labels: Literal["soft", "hard"] = "soft") -> float | None:
    """P(first response is better) over orders and principles; None where every judgement is an abstention."""
    odds = combined_odds(judgements, labels)
    return None if odds is None else sigmoid(odds)


def combined_odds(judgements: Sequence[Judgement], labels: Literal["soft", "hard"] = "soft") -> float | None:
    """The log-odds that the first response is better, over orders and principles: their weighted mean.

    A judgement that lacks an order is an abstention and takes no part; None where none is left. Hard labels are
    infinite log-odds, or 0 where the orders contradict each other. The two responses changed, the result is the same
    with the other sign, to the last bit.
    """
    given = [(j.weight, odds) for j in judgements if (odds := odds_of(j)) is not None]
    weight = sum(w for w, _ in given)
    if not weight:
        return None
    # Each weight is divided first: that of a single judgement is then 1, and its label is the judge's word unrounded.
    forward, swapped = (sum(w / weight * odds[order] for w, odds in given) for order in (0, 1))
    if labels == "hard":  # a verdict that turns with the order is none
        agree = (forward > 0) == (swapped > 0) and 0 not in (forward, swapped)
        return math.copysign(math.inf, forward) if agree else 0.0
    return (forward + swapped) / 2


def _inside(p: float) -> float:
    return min(max(p, NEAREST), 1 - NEAREST)


def compare(
    pairs: Iterable[Pair],
    engine: Engine,
    constitution: Constitution,
    how: Judging = Judging(),
    *,
    asked: Mapping[str, Sequence[Principle]] | None = None,
    examples: Sequence[Example] = (),
    seed: int = 0,
    meta: dict[str, Any] | None = None,
    failed: OnFailure | None = None,
) -> Iterator[Comparison]:
    """One comparison a pair, in the order of `pairs`, in memory that does not grow with their number.

    asked: the principles of each pair by its id, where they are already decided. examples: shown before each
    comparison, less those of the pair's own prompt. failed: called in place of an abstention for a pair that lacks an
    answer which a later start may get (an outage); such a pair yields no comparison.
    """
    left = iter(pairs)
    while window := list(islice(left, WINDOW)):
        tasks = [task for pair in window for task in _tasks(pair, constitution, how, asked, seed)]
        answers = _answers(tasks, engine, how, examples, seed)
        judgements: dict[str, list[Judgement]] = {pair.id: [] for pair in window}
        for task in tasks:
            if task.check is not None:
                judgements[task.pair.id].append(judge_by_check(task.check, task.pair.prompt, *task.pair.responses))
            else:
                judgements[task.pair.id].append(task.judgement(answers))
        out_of_reach = {
            t.pair.id: a.again for t in tasks for i, _, _ in t.orders() if (a := answers.get(i)) and a.again
        }
        for pair in window:
            if failed and pair.id in out_of_reach:
                failed(Failure(pair.id, out_of_reach[pair.id], again=True))
                continue
            yield to_comparison(pair, judgements[pair.id], meta or {}, how.labels)


@dataclass(frozen=True)
class _Task:
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

    def judgement(self, answers: Mapping[str, _Answer]) -> Judgement:
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
class _Answer:
    odds: float | None  # log-odds of A against B; infinite: see `first_option`
    why: str = ""  # where odds is None
    rationale: str | None = None
    again: str = ""  # a failure that may pass, so that a later start may get the answer


def _tasks(
    pair: Pair,
    constitution: Constitution,
    how: Judging,
    asked: Mapping[str, Sequence[Principle]] | None,
    seed: int,
) -> list[_Task]:
    if asked is not None:
        principles = list(asked[pair.id])
    elif how.principles is None:
        principles = list(constitution.principles)
    else:
        principles = draw_principles(constitution, how.principles, "compare", seed, pair.id)
    asked_together = tuple(p for p in principles if p.check is None) if how.together else ()
    groups = [asked_together] if asked_together else []
    groups += [(p,) for p in principles if p not in asked_together]
    return [_Task(pair, n, group) for n, group in enumerate(groups)]


def _answers(
    tasks: Sequence[_Task], engine: Engine, how: Judging, examples: Sequence[Example], seed: int
) -> dict[str, _Answer]:
    """The answer to each request by its id."""
    chats: dict[str, Chat] = {}
    requests: dict[str, ScoreRequest] = {}
    for task in tasks:
        if task.check is not None:
            continue
        shown = [e for e in examples if e.prompt != task.pair.prompt]  # none that tells the answer
        for i, a, b in task.orders():
            if how.rationales:
                chats[i] = comparison_chat(task.pair.prompt, a, b, task.question, shown, REASON)
            else:
                chat = comparison_chat(task.pair.prompt, a, b, task.question, shown)
                typed = comparison_question(task.pair.prompt, a, b, task.question, shown)
                requests[i] = ScoreRequest(i, chat, OPTIONS, PREFIX, question=typed)
    if how.rationales:
        return _reasoned(chats, engine, how, seed)
    found = {}
    for s in engine.score(requests.values()):
        odds, why = first_option(s)
        found[s.id] = _Answer(odds, why, again=why if s.again else "")
    return found


def _reasoned(chats: Mapping[str, Chat], engine: Engine, how: Judging, seed: int) -> dict[str, _Answer]:
    """Chain of thought: a rationale first, then the options' probabilities, clamped; averaged over the samples."""
    asked = [GenerationRequest(f"{i}/{n}", chat, seed) for i, chat in chats.items() for n in range(how.rationales)]
    rationales: dict[str, dict[str, str]] = {i: {} for i in chats}
    failed = dict.fromkeys(chats, "")
    again = dict.fromkeys(chats, "")
    for made in engine.generate(asked, how.sampling):
        i = made.id.rpartition("/")[0]
        if made.error:
            failed[i] = made.error
            again[i] = made.error if made.again else again[i]
        elif not made.text.strip():
            failed[i] = "gave no reasoning"
        elif is_refusal(made.text):
            failed[i] = f"refused: {made.text[:80]}"
        else:
            rationales[i][made.id] = made.text
    requests = [
        ScoreRequest(name, reasoned_chat(chats[i], text), OPTIONS, PREFIX)
        for i, texts in rationales.items()
        for name, text in texts.items()
    ]
    found: dict[str, list[float]] = {i: [] for i in chats}
    for scores in engine.score(requests):
        i = scores.id.rpartition("/")[0]
        odds, why = first_option(scores)
        if odds is None:
            failed[i] = why
            again[i] = why if scores.again else again[i]
        else:
            found[i].append(min(max(odds, log_odds(how.clamp[0])), log_odds(how.clamp[1])))
    answers = {}
    for i, odds_of_samples in found.items():
        said = "\n---\n".join(text for _, text in sorted(rationales[i].items())) or None
        odds_of_all = _mean_probability(odds_of_samples) if odds_of_samples else None
        answers[i] = _Answer(odds_of_all, "" if odds_of_samples else failed[i], said, again[i])
    return answers


def _mean_probability(odds: Sequence[float]) -> float:
    """The log-odds of the mean of probabilities, each given by its log-odds; exact where they are near 0 and 1."""
    x = np.array(odds)
    return float(logsumexp(log_expit(x)) - logsumexp(log_expit(-x)))


def turned(j: Judgement) -> Judgement:
    """The same judgement of the same pair, with the second response as its first.

    The two orders change places too: `forward` is always the one that shows the first response first.
    """
    forward, swapped = (
        (None if odds is None else -odds, None if p is None else 1 - p if odds is None else sigmoid(-odds))
        for odds, p in ((j.swapped_log_odds, j.swapped), (j.forward_log_odds, j.forward))
    )
    return j.model_copy(
        update={
            "forward": forward[1],
            "swapped": swapped[1],
            "forward_log_odds": forward[0],
            "swapped_log_odds": swapped[0],
            "rationale": j.rationale_swapped,
            "rationale_swapped": j.rationale,
        }
    )


def to_comparison(
    pair: Pair, judgements: Sequence[Judgement], meta: dict[str, Any], labels: Literal["soft", "hard"] = "soft"
) -> Comparison:
    """The favoured response becomes `chosen`; on an exact tie or an abstention the first one stands there."""
    odds = combined_odds(judgements, labels)
    first, second = pair.responses
    swap = odds is not None and odds < 0
    chosen, rejected = (second, first) if swap else (first, second)
    if swap:  # judgements speak of the chosen response, as the label does
        judgements = [turned(j) for j in judgements]
    return Comparison(
        id=pair.id,
        prompt=pair.prompt,
        chosen=(assistant(chosen),),
        rejected=(assistant(rejected),),
        label=None if odds is None else sigmoid(abs(odds)),
        log_odds=None if odds is None or math.isinf(odds) else abs(odds),
        abstained=odds is None,
        judgements=tuple(judgements),
        labeler="ai",
        source=pair.source,
        authors=pair.authors if pair.authors is None or not swap else (pair.authors[1], pair.authors[0]),
        human=pair.human if pair.human is None or not swap else 1 - pair.human,
        principle=judgements[0].principle if len(judgements) == 1 else None,
        meta={**pair.meta, **meta},
    )
