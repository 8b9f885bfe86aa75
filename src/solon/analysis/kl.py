"""How far the policy that is written has moved from the model it started from, nats a response.

Measured after training, on prompts that were kept away from it, so it is the KL of the model that a user gets: not of
an update's rollouts, which come from a policy before the last steps, nor of a policy that was rolled back. The policy
answers each held-out prompt as it does in training (temperature and length of `ppo`). Policy and reference then score the same tokens
by the same pass, one model in memory at a time. The KL of a response is the sum of log p(token) - log r(token), an
estimate without bias of the KL of the two models' responses to that prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

AT_ONCE = 64  # prompts that are answered together


@dataclass(frozen=True)
class Responses:
    """What the policy answered: token ids of each prompt, and of its response with the end token where there is one."""

    ids: list[str]  # of the prompts
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

    policy, reference: directories of models, or what `--model` takes less servers. Log-probabilities are those of the
    distribution that was sampled, so both are taken at `temperature`. Raises InputError where no prompt could be answered.
    """

    def step(n: int) -> None:
        if progress:
            progress(n, 2 * len(prompts), {})

    with _loaded(policy, dtype) as (model, tokenizer):
        made, left_out = _answered(
            model, tokenizer, prompts, system=system, temperature=temperature, max_tokens=max_tokens, seed=seed
        )
        if not made.ids:
            raise InputError(
                f"the KL of the policy: none of the {len(prompts)} held-out prompts can be answered in {max_tokens} tokens "
                f"({', '.join(f'{n} {why}' for why, n in left_out.items())}); hold out other ones"
            )
        by_policy = _logprobs(model, made, temperature)
        step(len(prompts))
    with _loaded(reference, dtype) as (model, _):
        by_reference = _logprobs(model, made, temperature)
        step(2 * len(prompts))
    # Differences are summed in float64, token by token: of two long sums little would be left.
    each = [float((p.double() - r.double()).sum()) for p, r in zip(by_policy, by_reference, strict=True)]
    finite = [x for x in each if x - x == 0]
    read, written = sum(map(len, made.contexts)), sum(map(len, made.tokens))
    return {
        "examples": len(each),
        "kl_nats": mean(finite).to_json(),
        "by_prompt": {i: x if x - x == 0 else None for i, x in zip(made.ids, each, strict=True)},
        "not_finite": len(each) - len(finite),
        "identical": not any(each),  # every token is as probable under both: the policy did not move
        "response_tokens": written / len(each),
        "left_out": left_out,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "usage": (3 * read + 2 * written, written),  # sampled once, read by two models
    }


@contextmanager
def _loaded(spec: str, dtype: str) -> Iterator[tuple[Any, Any]]:
    """A model that is in memory inside only."""
    model, tokenizer = load_causal_lm(spec, dtype=dtype)
    held = [model.eval()]
    del model
    try:
        yield held[0], tokenizer
    finally:
        held.clear()
        give_memory_back()


def _answered(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, system: str | None, temperature: float, max_tokens: int,
    seed: int,
) -> tuple[Responses, dict[str, int]]:  # fmt: skip
    """One response a prompt, and how many prompts cannot be answered, by reason."""
    limit = context_limit(model.config, tokenizer).less(max_tokens, "the answer")
    fit: list[tuple[Prompt, list[int]]] = []
    left_out: Counter[str] = Counter()
    for p in prompts:
        try:
            fit.append((p, chat_ids(tokenizer, p.prompt, system=system, limit=limit)))
        except Unfit as error:
            left_out[error.reason] += 1
    made: list[Generated] = []
    for start in range(0, len(fit), AT_ONCE):
        batch = fit[start : start + AT_ONCE]
        uniforms = torch.stack([_uniforms(p.id, seed, max_tokens) for p, _ in batch])
        made += decode(
            model, [ids for _, ids in batch], uniforms, max_tokens=max_tokens, temperature=temperature,
            end=end_ids(tokenizer), pad=tokenizer.pad_token_id,
        )  # fmt: skip
    said = [m.ids + ([] if m.end is None else [m.end]) for m in made]
    responses = Responses([p.id for p, _ in fit], [ids for _, ids in fit], said, tokenizer.pad_token_id)
    return responses, dict(left_out)


@torch.no_grad()
def _logprobs(model: Any, made: Responses, temperature: float) -> list[torch.Tensor]:
    """The log-probability of each token of each response, by the pass that PPO trains with; on the CPU."""
    found: list[torch.Tensor] = []
    for start in range(0, len(made.ids), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        rollouts = Rollouts(made.contexts[part], made.tokens[part], made.pad, model.device)
        rows: dict[int, torch.Tensor] = {}
        for which in rollouts.parts(range(len(rollouts.rows)), TOKENS_AT_ONCE):
            logprobs = rollouts.forward(model, which, temperature)[0].float().cpu()
            rows |= {i: row[: len(rollouts.responses[i])] for i, row in zip(which, logprobs, strict=True)}
        found += [rows[i] for i in range(len(rollouts.rows))]
    return found


def _uniforms(name: str, seed: int, n: int) -> torch.Tensor:
    number = int(fingerprint("kl", name, seed), 16) % (2**63)
    return torch.rand(n, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
