"""KL of the written policy to the model that it started from, in nats per response.

The KL is measured after training, on prompts that were kept out of training. It is the KL of the model that a user gets:
the rollouts of an update come from a policy before the last steps, and a policy may have been rolled back. The policy
answers each held-out prompt as in training (temperature and length of `ppo`). Policy and reference then score the same
tokens by the same pass, one model in memory at a time. The KL of a response is the sum of log p(token) - log r(token),
an unbiased estimate of the KL of the two models' responses to that prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from solon.errors import InputError, Unfit
from solon.measures.statistics import mean
from solon.models.chat.encode import chat_ids, end_ids
from solon.models.chat.limits import context_limit
from solon.models.decoding import Generated, decode
from solon.models.passes import TOKENS_AT_ONCE
from solon.models.weights import load_causal_lm
from solon.records import Prompt, fingerprint
from solon.reinforcement.rollout import Rollouts
from solon.training.saving import give_memory_back
from solon.training.settings import Progress

BATCH = 64  # prompts that are answered together
KL_LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # nats per response, at which two runs can be compared


@dataclass(frozen=True)
class Responses:
    """The policy's answers: token ids of each prompt, and of its response with the end token where there is one."""

    ids: list[str]  # the prompts' ids
    contexts: list[list[int]]
    tokens: list[list[int]]
    pad: int


def kl_of_written(
    policy: str,
    reference: str,
    prompts: Sequence[Prompt],
    *,
    system: str | None,
    temperature: float,
    max_tokens: int,
    seed: int = 0,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The KL of each prompt's response, and their mean with its interval over prompts.

    policy, reference: any model in this process that `--model` takes. Log-probabilities are those of the distribution
    that was sampled, so both are taken at `temperature`. Raises InputError where no prompt could be answered.
    """

    def step(n: int) -> None:
        if progress:
            progress(n, 2 * len(prompts), {})

    with _loaded(policy, dtype) as (model, tokenizer):
        responses, left_out = _answer(
            model, tokenizer, prompts, system=system, temperature=temperature, max_tokens=max_tokens, seed=seed
        )
        if not responses.ids:
            raise InputError(
                f"the KL of the policy: none of the {len(prompts)} held-out prompts can be answered in {max_tokens} tokens "
                f"({', '.join(f'{n} {why}' for why, n in left_out.items())}); hold out other ones"
            )
        by_policy = _logprobs(model, responses, temperature)
        step(len(prompts))
    with _loaded(reference, dtype) as (model, _):
        by_reference = _logprobs(model, responses, temperature)
        step(2 * len(prompts))
    # Token by token in float64: the difference of two long sums would lose precision.
    kls = [float((p.double() - r.double()).sum()) for p, r in zip(by_policy, by_reference, strict=True)]
    finite = [x for x in kls if math.isfinite(x)]
    read, written = sum(map(len, responses.contexts)), sum(map(len, responses.tokens))
    return {
        "examples": len(kls),
        "kl_nats": mean(finite).to_json(),
        "by_prompt": {i: x if math.isfinite(x) else None for i, x in zip(responses.ids, kls, strict=True)},
        "not_finite": len(kls) - len(finite),
        "identical": not any(kls),  # every token is as probable under both: the policy did not move
        "response_tokens": written / len(kls),
        "left_out": left_out,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "usage": (3 * read + 2 * written, written),  # sampled once, read by two models
    }


@contextmanager
def _loaded(spec: str, dtype: str) -> Iterator[tuple[Any, Any]]:
    """A model that is in memory only inside the `with` block."""
    model, tokenizer = load_causal_lm(spec, dtype=dtype)
    held = [model.eval()]
    del model
    try:
        yield held[0], tokenizer
    finally:
        held.clear()
        give_memory_back()


def _answer(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, system: str | None, temperature: float, max_tokens: int,
    seed: int,
) -> tuple[Responses, dict[str, int]]:  # fmt: skip
    """One response per prompt, and how many prompts cannot be answered, by reason."""
    limit = context_limit(model.config, tokenizer).less(max_tokens, "the answer")
    fit: list[tuple[Prompt, list[int]]] = []
    left_out: Counter[str] = Counter()
    for p in prompts:
        try:
            fit.append((p, chat_ids(tokenizer, p.prompt, system=system, limit=limit)))
        except Unfit as error:
            left_out[error.reason] += 1
    generated: list[Generated] = []
    for start in range(0, len(fit), BATCH):
        batch = fit[start : start + BATCH]
        uniforms = torch.stack([_uniforms(p.id, seed, max_tokens) for p, _ in batch])
        generated += decode(
            model, [ids for _, ids in batch], uniforms, max_tokens=max_tokens, temperature=temperature,
            end=end_ids(tokenizer), pad=tokenizer.pad_token_id,
        )  # fmt: skip
    tokens = [g.ids + ([] if g.end is None else [g.end]) for g in generated]
    responses = Responses([p.id for p, _ in fit], [ids for _, ids in fit], tokens, tokenizer.pad_token_id)
    return responses, dict(left_out)


@torch.no_grad()
def _logprobs(model: Any, answers: Responses, temperature: float) -> list[torch.Tensor]:
    """The log-probability of each token of each response, by the pass that PPO trains with; on the CPU."""
    logprobs_by_response: list[torch.Tensor] = []
    for start in range(0, len(answers.ids), BATCH):
        part = slice(start, start + BATCH)
        rollouts = Rollouts(answers.contexts[part], answers.tokens[part], answers.pad, model.device)
        rows: dict[int, torch.Tensor] = {}
        for which in rollouts.parts(range(len(rollouts.rows)), TOKENS_AT_ONCE):
            logprobs = rollouts.forward(model, which, temperature)[0].float().cpu()
            rows |= {i: row[: len(rollouts.responses[i])] for i, row in zip(which, logprobs, strict=True)}
        logprobs_by_response += [rows[i] for i in range(len(rollouts.rows))]
    return logprobs_by_response


def _uniforms(name: str, seed: int, n: int) -> torch.Tensor:
    number = int(fingerprint("kl", name, seed), 16) % (2**63)
    return torch.rand(n, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def at_same_kl(updates: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The rollouts' mean reward where training first reached each of KL_LEVELS, by a straight line between two updates.

    A policy gains reward by moving away from its reference, so two runs are compared at the same KL, not only at their ends.
    """
    curve = [
        (float(u["kl_nats"]), float(u["reward"]), u["update"])
        for u in updates
        if all(isinstance(u.get(k), (int, float)) and math.isfinite(u[k]) for k in ("kl_nats", "reward"))
    ]
    rows = []
    for level in KL_LEVELS:
        for (kl0, r0, _), (kl1, r1, update) in pairwise(curve):
            if kl0 < level <= kl1:
                reward = r0 + (r1 - r0) * (level - kl0) / (kl1 - kl0)
                rows.append({"kl_nats": level, "reward": reward, "update": update})
                break
    return rows
