"""From a judge's answers to a label: the log-odds of both orders and of several principles become P(first is better).

All steps from the answer to the label use log-odds. A probability rounds to 1 at log-odds of 37, and two such orders would
cancel to a tie that the judge did not mean.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from solon.measures.statistics import NEAREST
from solon.records import Comparison, Judgement, Pair, assistant, text_of, turned

MOST = 700.0  # larger log-odds count as infinite: e^-700 is about the smallest probability that a double can hold
CERTAIN = (
    20.7  # log-odds of 1 - 1e-9; they stand for infinite log-odds, since an engine that says exactly 0 has rounded
)
OPPOSED = "certain of opposite sides in the two orders, with probabilities of exactly 0 and 1"


def log_odds(probability: float) -> float:
    """Natural log of p / (1 - p); infinite at 0 and 1."""
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def odds_of(j: Judgement) -> tuple[float, float] | None:
    """The log-odds that the first response is better, when shown first and when shown second; None: an abstention.

    In a record without log-odds, probabilities are limited to a distance of `NEAREST` from 0 and 1.
    """
    if j.forward is None or j.swapped is None:
        return None
    forward = log_odds(_bounded(j.forward)) if j.forward_log_odds is None else j.forward_log_odds
    swapped = log_odds(_bounded(j.swapped)) if j.swapped_log_odds is None else j.swapped_log_odds
    return forward, swapped


def label_odds(c: Comparison) -> float:
    """The log-odds of a comparison's label. In a record without log-odds the label is limited as in `odds_of`."""
    assert c.label is not None
    return log_odds(_bounded(c.label)) if c.log_odds is None else c.log_odds


def first_odds(c: Comparison) -> float | None:
    """The log-odds that the first response of the pair is better; None where the judge abstained."""
    if c.label is None:
        return None
    return label_odds(c) if c.first == "chosen" else -label_odds(c)


def combine(judgements: Sequence[Judgement], *, soft: bool = True) -> float | None:
    """P(first response is better), from all orders and principles; None where every judgement is an abstention."""
    odds = combined_odds(judgements, soft=soft)
    return None if odds is None else sigmoid(odds)


def combined_odds(judgements: Sequence[Judgement], *, soft: bool = True) -> float | None:
    """The log-odds that the first response is better: the weighted mean over orders and principles.

    A judgement that lacks an order is an abstention and does not count; the result is None where no judgement is left.
    Hard labels are infinite log-odds, or 0 where the orders contradict each other. If the two responses are exchanged,
    the result changes its sign and nothing else.
    """
    given = [(j.weight, odds) for j in judgements if (odds := odds_of(j)) is not None]
    weight = sum(w for w, _ in given)
    if not weight:
        return None
    # Each weight is divided first: the weight of a single judgement is then 1, and its log-odds are not rounded.
    forward, swapped = (sum(w / weight * odds[order] for w, odds in given) for order in (0, 1))
    if not soft:  # a verdict that changes with the order is a tie
        agree = (forward > 0) == (swapped > 0) and 0 not in (forward, swapped)
        return math.copysign(math.inf, forward) if agree else 0.0
    return (forward + swapped) / 2


def _bounded(p: float) -> float:
    return min(max(p, NEAREST), 1 - NEAREST)


def as_pairs(comparisons: Sequence[Comparison], seed: int) -> list[Pair]:
    """Labelled comparisons as pairs to judge. `human` keeps the label.

    The seed decides whether the chosen response stands first or second, so that a judge gains nothing by always
    preferring one position.
    """
    pairs = []
    for c in comparisons:
        sides = [(text_of(c.chosen), c.label), (text_of(c.rejected), None if c.label is None else 1 - c.label)]
        random.Random(f"{seed}/{c.id}").shuffle(sides)
        (first, preferred), (second, _) = sides
        pairs.append(Pair(id=c.id, prompt=c.prompt, responses=(first, second), source=c.source, human=preferred))
    return pairs


def to_comparison(
    pair: Pair, judgements: Sequence[Judgement], meta: dict[str, Any], *, soft: bool = True
) -> Comparison:
    """The comparison of a pair from its judgements. soft: the label is a probability; otherwise it is 1, 0 or 0.5."""
    return comparison_of(pair, judgements, combined_odds(judgements, soft=soft), meta)


def comparison_of(
    pair: Pair, judgements: Sequence[Judgement], odds: float | None, meta: Mapping[str, Any] | None = None
) -> Comparison:
    """odds: log-odds that the first response is better; None: an abstention. judgements: of the first response.

    The favoured response becomes `chosen`. On an exact tie or an abstention the first response does.
    """
    swap = odds is not None and odds < 0
    chosen, rejected = pair.responses[::-1] if swap else pair.responses
    if swap:  # judgements are about the chosen response, as the label is
        judgements = [turned(j) for j in judgements]
    return Comparison(
        id=pair.id,
        prompt=pair.prompt,
        chosen=(assistant(chosen),),
        rejected=(assistant(rejected),),
        label=None if odds is None else sigmoid(abs(odds)),
        first="rejected" if swap else "chosen",
        log_odds=None if odds is None or math.isinf(odds) else abs(odds),
        abstained=odds is None,
        judgements=tuple(judgements),
        labeler="ai",
        source=pair.source,
        authors=pair.authors if pair.authors is None or not swap else (pair.authors[1], pair.authors[0]),
        human=pair.human if pair.human is None or not swap else 1 - pair.human,
        principle=judgements[0].principle if len(judgements) == 1 else None,
        meta={**pair.meta, **(meta or {})},
    )
