"""The AI judge: which of two responses does a principle favour, and how surely?

Bai et al. 2022 (arXiv 2212.08073), section 4.1: the feedback model sees the conversation, a principle and two
options, and the label is the normalised probability of the two option letters. Each pair is shown in both orders
and the two are averaged in log-odds, so a preference for a position cancels. What the judge could not answer is an
abstention with its reason, never a label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

from solon.constitution import Constitution, Principle
from solon.engines.base import Engine, Failure, GenerationRequest, OnFailure, Sampling, ScoreRequest, Scores
from solon.evaluation.metrics import is_refusal
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
from solon.records import Chat, Comparison, Judgement, Pair, assistant
from solon.supervised.critique_revision import draw_principles

LEAST_MASS = 1e-3  # both options together less probable than this: the judge is saying something else
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
    return math.log(probability) - math.log1p(-probability)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def first_option(scores: Scores) -> tuple[float | None, str]:
    """P(A) of P(A) + P(B); or None, and why the judge gave no answer."""
    if scores.error:
        return None, scores.error
    a, b = scores.logprobs
    if a is None or b is None:
        return None, "no probability for an option"
    if math.exp(a) + math.exp(b) < LEAST_MASS:
        return None, f"answered neither option (they hold {math.exp(a) + math.exp(b):.1e} of its probability)"
    return sigmoid(a - b), ""


def combine(judgements: Sequence[Judgement], labels: Literal["soft", "hard"] = "soft") -> float | None:
    """P(first response is better) over orders and principles: the weighted mean of their log-odds.

    A judgement that lacks an order is an abstention and takes no part; None where none is left.
    """
    forward = swapped = weight = 0.0
    for j in judgements:
        if j.forward is None or j.swapped is None:
            continue
        forward += j.weight * log_odds(_inside(j.forward))
        swapped += j.weight * log_odds(_inside(j.swapped))
        weight += j.weight
    if not weight:
        return None
    if labels == "hard":  # a verdict that turns with the order is none
        return 0.5 if forward * swapped <= 0 else float(forward > 0)
    return sigmoid((forward + swapped) / 2 / weight)


def _inside(p: float) -> float:
    return min(max(p, 1e-6), 1 - 1e-6)


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
        return Judgement(
            principle=name,
            forward=forward.p,
            swapped=None if swapped.p is None else 1 - swapped.p,
            weight=weight,
            rationale=forward.rationale,
            rationale_swapped=swapped.rationale,
            abstained=forward.why or swapped.why or None,
        )


@dataclass(frozen=True)
class _Answer:
    p: float | None  # P(A)
    why: str = ""  # where p is None
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
        p, why = first_option(s)
        found[s.id] = _Answer(p, why, again=why if s.again else "")
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
        p, why = first_option(scores)
        if p is None:
            failed[i] = why
            again[i] = why if scores.again else again[i]
        else:
            found[i].append(min(max(p, how.clamp[0]), how.clamp[1]))
    answers = {}
    for i, ps in found.items():
        said = "\n---\n".join(text for _, text in sorted(rationales[i].items())) or None
        answers[i] = _Answer(sum(ps) / len(ps) if ps else None, "" if ps else failed[i], said, again[i])
    return answers


def turned(j: Judgement) -> Judgement:
    """The same judgement of the same pair, with the second response as its first.

    The two orders change places too: `forward` is always the one that shows the first response first.
    """
    return j.model_copy(
        update={
            "forward": None if j.swapped is None else 1 - j.swapped,
            "swapped": None if j.forward is None else 1 - j.forward,
            "rationale": j.rationale_swapped,
            "rationale_swapped": j.rationale,
        }
    )


def to_comparison(
    pair: Pair, judgements: Sequence[Judgement], meta: dict[str, Any], labels: Literal["soft", "hard"] = "soft"
) -> Comparison:
    """The favoured response becomes `chosen`; on an exact tie or an abstention the first one stands there."""
    label = combine(judgements, labels)
    first, second = pair.responses
    swap = label is not None and label < 0.5
    chosen, rejected = (second, first) if swap else (first, second)
    if swap:  # judgements speak of the chosen response, as the label does
        judgements = [turned(j) for j in judgements]
    return Comparison(
        id=pair.id,
        prompt=pair.prompt,
        chosen=(assistant(chosen),),
        rejected=(assistant(rejected),),
        label=None if label is None else max(label, 1 - label),
        abstained=label is None,
        judgements=tuple(judgements),
        labeler="ai",
        source=pair.source,
        authors=pair.authors if pair.authors is None or not swap else (pair.authors[1], pair.authors[0]),
        human=pair.human if pair.human is None or not swap else 1 - pair.human,
        principle=judgements[0].principle if len(judgements) == 1 else None,
        meta={**pair.meta, **meta},
    )
