"""Sampling: prompts are continued token by token.

This differs from `model.generate` in three ways. One cumulative sum takes the place of `multinomial`. Each row has its own
random numbers, so that a text does not depend on the other texts of its batch. Rows that have ended leave the batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from solon import distributed
from solon.models.passes import prompt_reader
from solon.models.paths import paths_of
from solon.models.sharding import is_sharded

GONE = 8  # rows leave the batch when one in this many has ended: to copy the cache costs more than to compute a few rows in vain
NUCLEUS = 256  # the most probable tokens that are sorted first: sorting the whole vocabulary takes far longer


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token for each row, and the logarithm of its probability among all tokens at this temperature, both (batch,).

    logits: (batch, vocabulary); uniform: (batch,) in [0, 1). top_p: tokens are drawn from the smallest set of the most
    probable ones that holds this much probability (Holtzman et al. 2020). A temperature of 0 takes the most probable token.
    """
    every = (logits.float() / (temperature or 1)).softmax(-1)
    if temperature == 0:
        best = logits.argmax(-1)
        return best, every.gather(-1, best.unsqueeze(-1)).squeeze(-1).log()
    probabilities, order = every, None
    if top_p < 1:
        size, count = every.shape[-1], NUCLEUS
        first, order = every.topk(min(count, size), -1)
        while count < size and bool((first.sum(-1) < top_p).any()):  # a flat distribution has a wider nucleus
            count *= 8
            first, order = every.topk(min(count, size), -1)
        before = first.cumsum(-1) - first
        probabilities = first.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    point = uniform.to(torch.float64).unsqueeze(-1) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, point, right=True).clamp(max=cumulative.shape[-1] - 1)
    if order is not None:
        picked = order.gather(-1, picked)
    return picked.squeeze(-1), every.gather(-1, picked).squeeze(-1).log()


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """The scores of seen tokens, divided by the penalty where they are positive and multiplied by it where negative.

    logits, seen: (batch, vocabulary). Keskar et al. 2019 (arXiv 1909.05858), section 4.1, as transformers does it.
    """
    logits = logits.float()
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@dataclass
class Generated:
    """What was sampled after one prompt."""

    ids: list[int] = field(default_factory=list)  # without the end token
    end: int | None = None  # the end token that was sampled
    logprobs: list[float] = field(default_factory=list)  # of each token, and of the end token

    @property
    def ended(self) -> bool:
        """Whether an end token was sampled."""
        return self.end is not None


@torch.no_grad()
def decode(
    model: Any,
    prompts: list[list[int]],
    uniforms: Tensor,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    end: Collection[int],
    pad: int = 0,
) -> list[Generated]:
    """Continue each prompt until an end token or `max_tokens`. Returns one `Generated` for each prompt, in order.

    prompts: token ids. uniforms: (len(prompts), max_tokens) in [0, 1): the random numbers of each row. end: the end tokens.
    """
    draw = partial(sample, temperature=temperature, top_p=top_p)
    options = draw, repetition_penalty, torch.tensor(sorted(end), device=model.device), pad
    uniforms = uniforms[:, :max_tokens].to(model.device)
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) == 1 or paths_of(model).padded:
        return _decode_batch(model, prompts, uniforms, *options)
    completions: dict[int, Generated] = {}
    for length in lengths:
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        batch = _decode_batch(model, [prompts[i] for i in rows], uniforms[rows], *options)
        completions |= zip(rows, batch, strict=True)
    return [completions[i] for i in range(len(prompts))]


def _decode_batch(
    model: Any, prompts: list[list[int]], uniforms: Tensor, draw: Any, penalty: float, ends: Tensor, pad: int
) -> list[Generated]:
    max_tokens = uniforms.shape[1]
    reader = prompt_reader(model, prompts, max_tokens, pad)
    logits = reader.logits
    completions = [Generated() for _ in prompts]
    alive = torch.arange(len(prompts), device=model.device)  # the prompt of each row that is still in the batch
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)  # of the rows in the batch
    together, idle = is_sharded(model), False  # idle: this process has finished and goes on for the other processes
    seen = None
    if penalty != 1:
        seen = torch.zeros(len(prompts), logits.shape[-1], dtype=torch.bool, device=model.device)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
        seen[:, ends] = False  # an end token of the prompt is not penalised: an answer may always end
    for step in range(max_tokens):
        if seen is not None:
            logits = penalise(logits, seen[alive], penalty)
        token, logprob = draw(logits, uniforms[alive, step])
        if seen is not None:
            seen[alive, token] = True
        if not idle:
            stopped = torch.isin(token, ends)
            _record(completions, alive, token, logprob, stopped)
            ended |= stopped
            idle = bool(ended.all())
            if reader.shrinks and GONE * int(ended.sum()) >= len(alive):
                keep = alive.new_zeros(1) if idle else (~ended).nonzero().squeeze(-1)
                alive, token, ended = alive[keep], token[keep], ended[keep]
                reader.keep(keep)
        if not (distributed.all_reduce_number(not idle) if together else not idle):
            break
        if step + 1 < max_tokens:
            logits = reader.read(token)
    return completions


def _record(completions: list[Generated], alive: Tensor, token: Tensor, logprob: Tensor, stopped: Tensor) -> None:
    """Add the tokens of one step to the completions. token, logprob, stopped: (rows,)."""
    steps = zip(*(x.tolist() for x in (alive, token, logprob, stopped)), strict=True)
    for row, token_id, value, is_end in steps:
        completion = completions[row]
        if completion.ended:  # the row could not be taken out of the cache
            continue
        completion.logprobs.append(value)
        if is_end:
            completion.end = token_id
        else:
            completion.ids.append(token_id)
