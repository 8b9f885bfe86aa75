"""The AI judge: which of two responses does a principle favour, and how surely?

Bai et al. 2022 (arXiv 2212.08073), section 4.1: the feedback model sees the conversation, a principle and two
options, and the label is the normalised probability of the two option letters. Each pair is shown in both orders
and the two are averaged in log-odds, so a preference for a position cancels. What the judge could not answer is an
abstention with its reason, never a label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from solon.constitution import Constitution, Principle
from solon.engines.base import Engine, ScoreRequest, Scores
from solon.records import Chat, Comparison, Judgement, Pair, assistant, fingerprint, user
from solon.supervised.critique_revision import draw_principles

OPTIONS = ("A", "B")
PREFIX = "("  # the judge's answer starts here; the option's letter is the next token
TEMPLATE = """\
Here is a conversation, and two responses to it.

{conversation}

Response (A): {a}

Response (B): {b}

{question} Answer (A) or (B)."""
TEMPLATE_FINGERPRINT = fingerprint("comparison", TEMPLATE, PREFIX, OPTIONS)
_SPEAKER = {"user": "Human", "assistant": "Assistant", "system": "System"}


def comparison_chat(prompt: Chat, a: str, b: str, question: str) -> Chat:
    """What the judge is asked. a is shown first."""
    conversation = "\n\n".join(f"{_SPEAKER[m.role]}: {m.content}" for m in prompt)
    parts = {"conversation": conversation, "a": a, "b": b, "question": question}
    text = TEMPLATE
    # From the last name to the first, each found in the template alone: no value is ever searched for names.
    for name in sorted(parts, key=lambda n: TEMPLATE.index("{" + n + "}"), reverse=True):
        at = TEMPLATE.index("{" + name + "}")
        text = text[:at] + parts[name] + text[at + len(name) + 2 :]
    return (user(text),)


def log_odds(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def option_log_odds(scores: Scores) -> float | None:
    """log P(A) - log P(B), or None where the engine could not tell one of them."""
    a, b = scores.logprobs
    return None if a is None or b is None else a - b


def combine(judgements: Sequence[Judgement]) -> float | None:
    """P(first response is better) over orders and principles: the weighted mean of their log-odds.

    A judgement that lacks an order is an abstention and takes no part; None where none is left.
    """
    total = weight = 0.0
    for j in judgements:
        if j.forward is None or j.swapped is None:
            continue
        total += j.weight * (log_odds(_inside(j.forward)) + log_odds(_inside(j.swapped))) / 2
        weight += j.weight
    return sigmoid(total / weight) if weight else None


def _inside(p: float) -> float:
    return min(max(p, 1e-6), 1 - 1e-6)


def compare(
    pairs: Sequence[Pair],
    engine: Engine,
    constitution: Constitution,
    *,
    principles_per_pair: int | None = 1,
    asked: Mapping[str, Sequence[Principle]] | None = None,
    seed: int = 0,
    meta: dict[str, Any] | None = None,
) -> Iterator[Comparison]:
    """One comparison a pair, in the order of `pairs`.

    principles_per_pair: drawn by the seed, or all where None; several are averaged with their weights. asked: the
    principles of each pair by its id, where they are already decided.
    """
    if asked is None:
        asked = {
            p.id: list(constitution.principles)
            if principles_per_pair is None
            else draw_principles(constitution, principles_per_pair, "compare", seed, p.id)
            for p in pairs
        }
    requests = []
    for pair in pairs:
        first, second = pair.responses
        for n, principle in enumerate(asked[pair.id]):
            for order, (a, b) in (("forward", (first, second)), ("swapped", (second, first))):
                chat = comparison_chat(pair.prompt, a, b, principle.comparison)
                requests.append(ScoreRequest(f"{pair.id}/{n}/{order}", chat, OPTIONS, PREFIX))
    scores = {s.id: s for s in engine.score(requests)}
    for pair in pairs:
        judgements = []
        for n, principle in enumerate(asked[pair.id]):
            forward = scores[f"{pair.id}/{n}/forward"]
            swapped = scores[f"{pair.id}/{n}/swapped"]
            f, s = option_log_odds(forward), option_log_odds(swapped)
            reason = forward.error or swapped.error or "no probability for an option"
            judgements.append(
                Judgement(
                    principle=principle.id,
                    forward=None if f is None else sigmoid(f),
                    swapped=None if s is None else sigmoid(-s),
                    weight=principle.weight,
                    abstained=reason if f is None or s is None else None,
                )
            )
        yield to_comparison(pair, judgements, meta or {})


def to_comparison(pair: Pair, judgements: Sequence[Judgement], meta: dict[str, Any]) -> Comparison:
    """The favoured response becomes `chosen`; on an exact tie or an abstention the first one stands there."""
    label = combine(judgements)
    first, second = pair.responses
    swap = label is not None and label < 0.5
    chosen, rejected = (second, first) if swap else (first, second)
    if swap:  # judgements speak of the chosen response, as the label does
        judgements = [
            j.model_copy(
                update={
                    "forward": None if j.forward is None else 1 - j.forward,
                    "swapped": None if j.swapped is None else 1 - j.swapped,
                }
            )
            for j in judgements
        ]
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
