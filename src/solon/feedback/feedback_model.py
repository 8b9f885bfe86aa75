"""Training of a small judge on labelled comparisons, with the questions that the judge will answer.

A small model answers (A) or (B) by position: SmolLM2-135M picks the same letter in both orders for almost every pair.
Therefore both orders of a pair are one example, and the loss uses their mean log-odds, as the judge does: a preference for a
position cancels in the mean. The loss also asks that the two orders agree: it adds the part of the log-odds that belongs to the
position. The log-odds of two options say nothing about other answers, and a judge that gives another answer abstains. Therefore the
loss also asks that the two options hold the probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from solon.constitution import Constitution
from solon.engines import LazyEngine
from solon.errors import InputError
from solon.feedback.judge import ModelJudge
from solon.feedback.labels import as_pairs
from solon.feedback.principles import own_principle, own_principles, question_for
from solon.feedback.questions import HHH, OPTIONS, PREFIX, comparison_chat
from solon.feedback.settings import FeedbackTrainSettings
from solon.feedback.trust import Trust
from solon.models.batching import distinct_tokens
from solon.models.chat.encode import option_ids
from solon.models.chat.limits import UNLIMITED, Limit, context_limit
from solon.models.chat.template import tokenizer_name
from solon.models.head import head_of
from solon.models.lora import add_adapters
from solon.models.passes import last_hidden_states
from solon.models.settings import AdapterSettings
from solon.models.weights import load_causal_lm, resolve
from solon.records import Comparison, text_of
from solon.training.loop import encode_all, fit
from solon.training.saving import save_merged
from solon.training.settings import Progress


@dataclass(frozen=True)
class Example:
    first: list[int]  # token ids up to the judge's answer, with the chosen response first
    second: list[int]  # the same with the chosen response second
    options: tuple[int, ...]  # the tokens of the two answers
    label: float  # P(chosen is better), 0..1


def encode(
    tokenizer: Any,
    comparison: Comparison,
    constitution: Constitution,
    question: str,
    system: str | None,
    limit: Limit = UNLIMITED,
) -> Example:
    """A comparison in both orders. Raises Unfit where it is too long, or where the chat template cannot render it.

    The question is the comparison question of the comparison's principle, or `question` if the constitution lacks it.
    """
    asked = question_for(comparison, constitution, question)
    chosen, rejected = text_of(comparison.chosen), text_of(comparison.rejected)
    orders = []
    for a, b in ((chosen, rejected), (rejected, chosen)):
        chat = comparison_chat(comparison.prompt, a, b, asked)
        orders.append(option_ids(tokenizer, chat, OPTIONS, system=system, prefix=PREFIX, limit=limit))
    answers = {tuple(tail[0] for tail in order.tails) for order in orders}
    if len(answers) > 1 or any(len(tail) > 1 for order in orders for tail in order.tails):
        raise InputError(
            f"{tokenizer_name(tokenizer)}: its tokenizer does not make one token of each answer ({', '.join(OPTIONS)}); "
            "this model cannot become a feedback model"
        )
    assert comparison.label is not None
    return Example(orders[0].context, orders[1].context, answers.pop(), comparison.label)


def option_scores(model: Any, rows: Sequence[list[int]], options: Sequence[int], pad: int) -> tuple[Tensor, Tensor]:
    """After each row: log-odds of the first option over the second, and the log-probability of both together, (rows,)."""
    logits = head_of(model)(last_hidden_states(model, rows, pad))
    option_logits = logits[:, list(options)]
    return option_logits[:, 0] - option_logits[:, 1], option_logits.logsumexp(-1) - logits.logsumexp(-1)


def train_feedback_model(
    comparisons: Sequence[Comparison],
    constitution: Constitution,
    model: str,
    out: Path,
    *,
    question: str,
    settings: FeedbackTrainSettings,
    adapter: AdapterSettings | None,
    system: str | None,
    seed: int = 0,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune `model` to judge, and write a complete model to `out`. Returns counts, tokens and losses.

    Abstentions and ties are left out. Raises InputError where no comparison has a label that prefers a side.
    """
    labelled = [c for c in comparisons if c.label is not None and c.label != 0.5]
    if not labelled:
        raise InputError("no comparison carries a label that prefers a side; a feedback model learns from those")
    lm, tokenizer = load_causal_lm(model, dtype=dtype if adapter else "float32", learns=adapter is not None)
    torch.manual_seed(seed)
    if adapter:
        lm = add_adapters(lm, adapter)
    limit = context_limit(lm.config, tokenizer).at_most(settings.max_length, "max_length")
    encoded, left_out = encode_all(
        "comparison", labelled, lambda c: encode(tokenizer, c, constitution, question, system, limit)
    )
    options = encoded[0].options

    def loss(batch: Sequence[Example]) -> Tensor:
        rows = [b.first for b in batch] + [b.second for b in batch]
        odds, mass = option_scores(lm, rows, options, tokenizer.pad_token_id)
        first, second = odds[: len(batch)], odds[len(batch) :]  # the chosen response shown first, then second
        combined, bias = (first - second) / 2, (first + second) / 2  # no bias: the orders agree
        labels = torch.tensor([b.label for b in batch], device=combined.device)
        disagreement = F.smooth_l1_loss(bias, torch.zeros_like(bias))
        preference = F.binary_cross_entropy_with_logits(combined, labels)
        return preference + settings.agreement * disagreement - mass.mean()

    fitted = fit(
        encoded,
        loss,
        [{"params": [p for p in lm.parameters() if p.requires_grad]}],
        settings=settings,
        tokens=lambda row: distinct_tokens([row.first, row.second]),
        seed=seed,
        progress=progress,
    )
    save_merged(lm, tokenizer, out, base=resolve(model) if adapter else None)
    return {
        "comparisons": len(encoded),
        "other_principles": sum(own_principle(c, constitution) is None for c in labelled),  # under `question`
        "left_out": left_out,
        "steps": len(fitted.values),
        "tokens": settings.epochs * sum(len(e.first) + len(e.second) for e in encoded),
        **fitted.to_json(),
    }


def measure_judge(
    model: str, comparisons: Sequence[Comparison], constitution: Constitution, *, system: str | None, dtype: str
) -> dict[str, Any]:
    """The `Trust` summary of a judge on comparisons that people labelled, each under the principle that it names.

    other_principles: the number of comparisons under the general question, because the constitution lacks the principle.
    """
    trust = Trust()
    asked, others = own_principles(comparisons, constitution, HHH)
    with LazyEngine(model, system=system, dtype=dtype) as engine:
        for judged in ModelJudge(engine, constitution).compare(as_pairs(comparisons, 0), asked=asked):
            trust.add(judged)
    return {**trust.summary(), "other_principles": others}
