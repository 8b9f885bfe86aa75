"""Decoding: prompts are continued token by token, by whichever way through the model is taken.

What it does that `model.generate` does not: sampling by one cumulative sum instead of `multinomial`, each row's own
randomness, so that a text does not depend on its neighbours, and rows that leave the batch when they end.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from solon import distributed
from solon.models.passes import prompt_reader
from solon.models.paths import paths_of
from solon.models.sharding import is_sharded

NUCLEUS = 256  # sorting the whole vocabulary took 255 ms a step (96 rows of 49k, two cores), the first 256 take 9


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """One token a row, and the logarithm of its probability. logits: (batch, vocabulary); uniform: (batch,) in [0, 1).

    top_p: only the most probable tokens are drawn from, as many as it takes to hold that much probability. The
    probability given is that among all tokens, at this temperature. Returns (batch,), (batch,).
    """
    probabilities = (logits.float() / (temperature or 1)).softmax(-1)
    if temperature == 0:
        best = logits.argmax(-1)
        return best, probabilities.gather(-1, best.unsqueeze(-1)).squeeze(-1).log()
    every, order = probabilities, None
    if top_p < 1:
        size, count = probabilities.shape[-1], NUCLEUS
        first, order = probabilities.topk(min(count, size), -1)
        while count < size and bool((first.sum(-1) < top_p).any()):  # a flat row: its nucleus is wider
            count *= 8
            first, order = probabilities.topk(min(count, size), -1)
        before = first.cumsum(-1) - first
        probabilities = first.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    point = uniform.to(torch.float64).unsqueeze(-1) * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, point, right=True).clamp(max=cumulative.shape[-1] - 1)
    if order is not None:
        picked = order.gather(-1, picked)
    return picked.squeeze(-1), every.gather(-1, picked).squeeze(-1).log()


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores of the tokens seen divided by the penalty where positive, multiplied by it where negative.

    logits, seen: (batch, vocabulary). Keskar et al. 2019 (arXiv 1909.05858), section 4.1, as transformers does it.
    """
    logits = logits.float()
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


@dataclass
class Generated:
    row: int
    ids: list[int]  # without the end token
    ended: bool
    end: int | None = None  # the end token that was sampled
    logprobs: list[float] = field(default_factory=list)  # of each token, the end token's included


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
    """Continue each prompt until an end token or `max_tokens`.

    prompts: token ids. uniforms: (len(prompts), max_tokens) in [0, 1): each row's own randomness, so a text does
    not depend on which other prompts are in the batch. Returns one `Generated` a prompt, in order.
    """
    lengths = {len(p) for p in prompts}
    if len(lengths) > 1 and not paths_of(model).padded:  # prompts of one length at a time
        found: dict[int, Generated] = {}
        for length in sorted(lengths):
            rows = [i for i, p in enumerate(prompts) if len(p) == length]
            part = decode(
                model, [prompts[i] for i in rows], uniforms[rows], max_tokens=max_tokens, temperature=temperature,
                top_p=top_p, repetition_penalty=repetition_penalty, end=end, pad=pad,
            )  # fmt: skip
            found |= {i: replace(g, row=i) for i, g in zip(rows, part, strict=True)}
        return [found[i] for i in range(len(prompts))]
    device, uniforms = model.device, uniforms.to(model.device)
    done = [Generated(i, [], ended=False) for i in range(len(prompts))]
    alive = torch.arange(len(prompts), device=device)
    ends = torch.tensor(sorted(end), device=device)
    reader = prompt_reader(model, prompts, max_tokens, pad)
    logits = reader.logits
    together, idle = is_sharded(model), False  # idle: this process has nothing left and goes on for the others
    seen = None
    if repetition_penalty != 1:
        seen = torch.zeros(len(prompts), logits.shape[-1], dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            seen[row, prompt] = True
        seen[:, ends] = False  # an answer may always end
    for step in range(max_tokens):
        if seen is not None:
            logits = penalise(logits, seen[alive], repetition_penalty)
        token, logprob = sample(logits, uniforms[alive, step], temperature, top_p)
        stopped = torch.isin(token, ends)
        if not idle:
            _note(done, alive, token, logprob, stopped)
        if seen is not None:
            seen[alive, token] = True
        if stopped.any() and not idle and not reader.shrinks:
            idle = all(g.ended for g in done)
        elif stopped.any() and not idle:
            keep = (~stopped).nonzero().squeeze(-1)
            idle = keep.numel() == 0
            if idle:
                keep = torch.zeros_like(alive[:1])
            alive, token = alive[keep], token[keep]
            reader.keep(keep)
        if not distributed.all_reduce_number(not idle) if together else idle:
            break
        if step + 1 < max_tokens:
            logits = reader.read(token)
    return done


def _note(done: list[Generated], alive: Tensor, token: Tensor, logprob: Tensor, stopped: Tensor) -> None:
    """Write down what was sampled in one step."""
    for row, value, logp, stop in zip(*(x.tolist() for x in (alive, token, logprob, stopped)), strict=True):
        if done[row].ended:  # goes on where rows cannot be taken out of the cache
            continue
        done[row].logprobs.append(logp)
        if stop:
            done[row].ended, done[row].end = True, value
        else:
            done[row].ids.append(value)
