"""Training of a small judge on labelled comparisons, with the questions that the judge will answer.

A small model answers (A) or (B) by position: SmolLM2-135M picks the same letter in both orders for almost every pair.
Therefore both orders of a pair are one example, and the loss uses their mean log-odds, as the judge does: a preference for a
position cancels in the mean. The loss also asks that the two orders agree: it adds the part of the log-odds that belongs to the
position. The log-odds of two options say nothing about other answers, and a judge that gives another answer abstains. Therefore the
loss also asks that the two options hold the probability.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from solon.feedback.questions import HHH, OPTIONS, PREFIX, comparison_chat, each_chat
from solon.feedback.settings import Ask, FeedbackTrainSettings, JudgeSettings
from solon.feedback.trust import Trust
from solon.models.batching import distinct_tokens
from solon.models.chat.encode import option_ids, text_ids
from solon.models.chat.limits import UNLIMITED, Limit, context_limit
from solon.models.chat.template import tokenizer_name
from solon.models.head import head_of
from solon.models.lora import add_adapters
from solon.models.passes import HiddenStates, last_hidden_states, stored_lower_blocks
from solon.models.settings import AdapterSettings
from solon.models.weights import load_causal_lm, resolve
from solon.records import Comparison, text_of
from solon.training.loop import all_passes, encode_all, fit_in_parts, learned_rows
from solon.training.saving import save_merged
from solon.training.settings import Progress


@dataclass(frozen=True)
class Example:
    """Two questions, as token ids up to the judge's answer.

    `ask: pair`: the comparison with the chosen response first, then with it second. `ask: each`: the question about the chosen
    response, then the question about the rejected one.
    """

    first: list[int]
    second: list[int]
    options: tuple[int, ...]  # the tokens of the two answers
    label: float  # P(chosen is better), 0..1
    opening: Example | None = None  # the same about the first tokens of both responses


def encode(
    tokenizer: Any,
    comparison: Comparison,
    constitution: Constitution,
    question: str,
    system: str | None,
    limit: Limit = UNLIMITED,
    ask: Ask = "pair",
    opening_tokens: int = 0,
) -> Example:
    """A comparison as two questions. Raises Unfit where it is too long, or where the chat template cannot render it.

    The question is the comparison question of the comparison's principle, or `question` if the constitution lacks it.
    opening_tokens: the tokens of each response in the example's `opening`; 0: it has none.
    """
    asked = question_for(comparison, constitution, question)

    def example(texts: Sequence[str], opening: Example | None = None) -> Example:
        chosen, rejected = texts
        if ask == "each":
            chats = [each_chat(comparison.prompt, text, asked) for text in texts]
        else:
            orders = ((chosen, rejected), (rejected, chosen))
            chats = [comparison_chat(comparison.prompt, a, b, asked) for a, b in orders]
        rows = [option_ids(tokenizer, chat, OPTIONS, system=system, prefix=PREFIX, limit=limit) for chat in chats]
        answers = {tuple(tail[0] for tail in row.tails) for row in rows}
        if len(answers) > 1 or any(len(tail) > 1 for row in rows for tail in row.tails):
            raise InputError(
                f"{tokenizer_name(tokenizer)}: its tokenizer does not make one token of each answer ({', '.join(OPTIONS)}); "
                "this model cannot become a feedback model"
            )
        assert comparison.label is not None
        return Example(rows[0].context, rows[1].context, answers.pop(), comparison.label, opening)

    texts = [text_of(comparison.chosen), text_of(comparison.rejected)]
    if not opening_tokens:
        return example(texts)
    return example(texts, example([beginning(tokenizer, text, opening_tokens) for text in texts]))


def beginning(tokenizer: Any, text: str, tokens: int) -> str:
    """The text of the first tokens, without a character that they cut in two."""
    return str(tokenizer.decode(text_ids(tokenizer, text)[:tokens])).rstrip("\ufffd")


def option_scores(
    model: Any, rows: Sequence[list[int]], options: Sequence[int], pad: int, compute: HiddenStates | None = None
) -> tuple[Tensor, Tensor]:
    """After each row: log-odds of the first option over the second, and the log-probability of both together, (rows,)."""
    logits = head_of(model)(last_hidden_states(model, rows, pad, compute))
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
    ask: Ask = "pair",
    seed: int = 0,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune `model` to judge, and write a complete model to `out`. Returns counts, tokens and losses.

    ask: how the judge will be asked (`JudgeSettings.ask`). Abstentions and ties are left out.
    Raises InputError where no comparison has a label that prefers a side.
    """
    labelled = [c for c in comparisons if c.better_and_worse]
    if not labelled:
        raise InputError("no comparison carries a label that prefers a side; a feedback model learns from those")
    lm, tokenizer = load_causal_lm(model, dtype=dtype if adapter else "float32", learns=adapter is not None)
    torch.manual_seed(seed)
    if adapter:
        lm = add_adapters(lm, adapter)
    limit = context_limit(lm.config, tokenizer).at_most(settings.max_length, "max_length")
    opening_tokens = settings.opening_tokens

    def encoded_one(c: Comparison) -> Example:
        return encode(tokenizer, c, constitution, question, system, limit, ask, opening_tokens)

    encoded, left_out = encode_all("comparison", labelled, encoded_one)
    options = encoded[0].options
    tokens = _tokens(encoded) + _tokens(e.opening for e in encoded)
    lower = stored_lower_blocks(lm, tokens, tokenizer.pad_token_id)
    compute = lower.hidden_states if lower else None

    def loss(batch: Sequence[Example]) -> Tensor:
        rows = [b.first for b in batch] + [b.second for b in batch]
        odds, mass = option_scores(lm, rows, options, tokenizer.pad_token_id, compute)
        first, second = odds[: len(batch)], odds[len(batch) :]
        labels = torch.tensor([b.label for b in batch], device=odds.device)
        if ask == "each":
            return F.binary_cross_entropy_with_logits(first - second, labels) - mass.mean()
        combined, bias = (first - second) / 2, (first + second) / 2  # no bias: the orders agree
        disagreement = F.smooth_l1_loss(bias, torch.zeros_like(bias))
        preference = F.binary_cross_entropy_with_logits(combined, labels)
        return preference + settings.agreement * disagreement - mass.mean()

    fitted = fit_in_parts(
        encoded,
        lambda e: e.opening or e,
        loss,
        lambda: [{"params": [p for p in lm.parameters() if p.requires_grad]}],
        settings=settings,
        tokens=lambda row: distinct_tokens([row.first, row.second]),
        seed=seed,
        progress=progress,
    )
    save_merged(lm, tokenizer, out, base=resolve(model) if adapter else None)
    return {
        "comparisons": len(learned_rows(encoded, settings, seed)),
        "other_principles": sum(own_principle(c, constitution) is None for c in labelled),  # under `question`
        "left_out": left_out,
        "steps": fitted.steps,
        "tokens": _tokens(all_passes(encoded, settings, seed))
        + settings.opening_epochs * _tokens(e.opening for e in encoded),
        **fitted.to_json(),
    }


def _tokens(examples: Iterable[Example | None]) -> int:
    return sum(len(e.first) + len(e.second) for e in examples if e)


def measure_judge(
    model: str,
    comparisons: Sequence[Comparison],
    constitution: Constitution,
    *,
    system: str | None,
    dtype: str,
    ask: Ask = "pair",
) -> dict[str, Any]:
    """The `Trust` summary of a judge on comparisons that people labelled, each under the principle that it names.

    other_principles: the number of comparisons under the general question, because the constitution lacks the principle.
    """
    trust = Trust()
    asked, others = own_principles(comparisons, constitution, HHH)
    with LazyEngine(model, system=system, dtype=dtype) as engine:
        for judged in ModelJudge(engine, constitution, JudgeSettings(ask=ask)).compare(
            as_pairs(comparisons, 0), asked=asked
        ):
            trust.add(judged)
    return {**trust.summary(), "other_principles": others}
