"""One update of PPO: rewards and advantages of the rollouts, then some epochs of clipped steps on them.

`ppo.py` holds the formulas as functions of tensors. This module applies them to a model, in parts that fit into memory, and
over the processes that train together.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solon import distributed
from solon.models.passes import TOKENS_AT_ONCE
from solon.records import RolloutSummary
from solon.reinforcement import ppo
from solon.reinforcement.checkpoint import State
from solon.reinforcement.rollout import Rollouts
from solon.reinforcement.settings import PPOSettings


@dataclass(frozen=True)
class Targets:
    """The values that the steps of an update learn from. Every tensor is (rollouts, response)."""

    logprobs: Tensor  # nats, of the policy that sampled
    values: Tensor  # before the update: the value head's, and the reward model's of beginnings
    given: Tensor  # the part of the values that does not learn
    advantages: Tensor  # whitened
    returns: Tensor
    entropy: Tensor  # nats, of the policy that sampled
    kl_nats: float  # per response, policy against reference
    explained_variance: float


def learn(
    state: State,
    rollouts: Rollouts,
    raw: Tensor,
    ended: Tensor,
    settings: PPOSettings,
    rng: random.Random,
    beginnings: Tensor | None = None,
) -> RolloutSummary:
    """One update of the policy and the value head.

    raw: the reward of each rollout, (rollouts,). ended: whether the response has an end-of-turn token, (rollouts,), bool.
    beginnings: the reward of the response up to and with each token, (rollouts, response); None: not known.
    Raises Diverged where the first loss or gradient of the training is not finite.
    """
    targets = compute_targets(state, rollouts, raw, ended, settings, beginnings)
    steps: list[dict[str, float]] = []
    for indices in _minibatches(len(rollouts.rows), settings, rng):
        step = _optimiser_step(state, rollouts, targets, indices, settings)
        if step is None:
            break
        steps.append(step)
    if state.good.stopped is None:
        state.good.finish()
    coefficient = state.kl.coefficient
    stopped = state.good.stopped
    if stopped is None:
        state.kl.update(targets.kl_nats, len(rollouts.rows))

    def mean(name: str) -> float:
        return sum(s[name] for s in steps) / len(steps) if steps else 0.0

    summary = RolloutSummary(
        update=state.update,
        reward=raw.mean().item(),
        kl_nats=targets.kl_nats,
        entropy_nats=ppo.masked_mean(targets.entropy, rollouts.mask).item(),
        response_tokens=rollouts.mask.sum(-1).mean().item(),
        clip_fraction=mean("clip_fraction"),
        value_loss=mean("value_loss"),
        policy_loss=mean("policy_loss"),
        kl_coefficient=coefficient,
        ended=ended.float().mean().item(),
        approx_kl=mean("approx_kl"),
        explained_variance=targets.explained_variance,
        meta={"rollouts": len(rollouts.rows), "steps": len(steps), "first_ratio": steps[0]["ratio"] if steps else 1.0},
    )
    if stopped is None:
        return summary
    not_finite = {k: None for k, v in summary.model_dump().items() if isinstance(v, float) and not math.isfinite(v)}
    meta = {**summary.meta, "first_ratio": 1.0, "stopped": stopped}
    return summary.model_copy(update={**not_finite, "meta": meta})


@torch.no_grad()
def compute_targets(
    state: State,
    rollouts: Rollouts,
    raw: Tensor,
    ended: Tensor,
    settings: PPOSettings,
    beginnings: Tensor | None = None,
) -> Targets:
    """One pass of the policy and one of the reference over the rollouts; from these, the targets of the update."""
    policy, mask = state.policy, rollouts.mask
    scores = (raw - settings.missing_end_penalty * (~ended)).to(mask.device)
    scores = ppo.held_to_length(scores, mask.sum(-1), settings.length_target, settings.length_coefficient)
    scores = ppo.centred(scores, settings.responses_per_prompt)
    given = torch.zeros_like(mask)
    if beginnings is not None:
        # Beginnings have none of the penalties, so their baseline has none either.
        base = ppo.baseline(raw.to(mask.device), settings.responses_per_prompt)
        given = ppo.values_of_beginnings(beginnings.to(mask.device), base, mask)
    reference, logprobs, entropy, values = (torch.zeros_like(mask) for _ in range(4))
    parts = rollouts.parts(distributed.local_indices(len(rollouts.rows)), TOKENS_AT_ONCE)
    filler = parts[0] if parts else []
    for part, _ in distributed.synchronised_steps(parts, filler, distributed.is_sharded()):
        with policy.disable_adapter():
            reference[part] = rollouts.forward(policy, part, settings.temperature)[0]
        logprobs[part], entropy[part], hidden = rollouts.forward(policy, part, settings.temperature, entropy=True)
        values[part] = rollouts.scatter_to_padded(state.values(hidden.float()).squeeze(-1), part)
    for x in (reference, logprobs, entropy, values):
        distributed.all_reduce(x)  # each process filled the rows of its own rollouts, and left zeros elsewhere
    values = values + given
    kl_nats = (ppo.kl_estimate(logprobs, reference) * mask).sum(-1).mean().item()
    penalty = ppo.kl_estimate(logprobs, reference, settings.kl_estimator)
    rewards = ppo.token_rewards(scores, penalty, mask, state.kl.coefficient)
    if settings.whiten_rewards:
        rewards = ppo.whiten(rewards, mask, shift_mean=False)  # Huang et al. 2024, detail 5: the mean carries meaning
    advantages, returns = ppo.advantages_and_returns(rewards, values, mask, settings.gamma, settings.lam)
    explained = ppo.explained_variance(values, returns, mask)
    return Targets(logprobs, values, given, ppo.whiten(advantages, mask), returns, entropy, kl_nats, explained)


def _optimiser_step(
    state: State, rollouts: Rollouts, targets: Targets, indices: Sequence[int], settings: PPOSettings
) -> dict[str, float] | None:
    """One optimiser step on some rollouts. Returns its means over tokens; None where the update ends before the step."""
    trained = [p for group in state.optimiser.param_groups for p in group["params"]]
    state.optimiser.zero_grad()
    local, lengths = distributed.local_indices(len(rollouts.rows)), rollouts.mask.sum(-1)
    means = dict.fromkeys(("approx_kl", "clip_fraction", "policy_loss", "ratio", "value_loss"), 0.0)
    # The minibatch goes through the model in parts, so that memory does not grow with it. A part weighs as much as its
    # share of the tokens, so the gradient is that of the whole minibatch.
    parts = rollouts.parts([i for i in indices if i in local], TOKENS_AT_ONCE)
    for part, counts in distributed.synchronised_steps(parts, list(local[:1]), distributed.is_sharded()):
        share = counts * (lengths[part].sum() / lengths[indices].sum()).item()
        loss, part_means = _loss(state, rollouts, targets, part, settings)
        (share * loss).backward()  # type: ignore[no-untyped-call]
        for name, value in part_means.items():
            means[name] += share * value
    means = {name: distributed.all_reduce_number(value) for name, value in means.items()}
    distributed.all_reduce_gradients(trained)
    if settings.kl_stop is not None and means["approx_kl"] > settings.kl_stop:
        return None
    norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
    if not state.good.check(means["policy_loss"] + means["value_loss"], norm):
        return None
    state.optimiser.step()
    return means


def _loss(
    state: State, rollouts: Rollouts, targets: Targets, part: list[int], settings: PPOSettings
) -> tuple[Tensor, dict[str, float]]:
    """The loss of some rollouts, a mean over their tokens, and the numbers that a summary reports."""
    mask, bonus = rollouts.mask[part], settings.entropy_bonus
    logprobs, entropy, hidden = rollouts.forward(state.policy, part, settings.temperature, entropy=bonus > 0)
    # The hidden states are detached from the trunk: the value loss must not change the policy.
    values = rollouts.scatter_to_padded(state.values(hidden.detach().float()).squeeze(-1), part) + targets.given[part]
    policy = ppo.policy_loss(logprobs, targets.logprobs[part], targets.advantages[part], mask, settings.clip)
    value = ppo.value_loss(values, targets.values[part], targets.returns[part], mask, settings.value_clip)
    loss = policy.loss + settings.value_coefficient * value
    if bonus:
        loss = loss - bonus * ppo.masked_mean(entropy, mask)
    return loss, {
        "policy_loss": policy.loss.item(),
        "value_loss": value.item(),
        "clip_fraction": policy.clip_fraction,
        "approx_kl": policy.approx_kl,
        "ratio": policy.ratio,
    }


def _minibatches(n: int, settings: PPOSettings, rng: random.Random) -> Iterator[list[int]]:
    """Indices of rollouts, minibatch by minibatch. Every epoch holds all n rollouts in a new order.

    The responses to a prompt are neighbours. Those in one minibatch share a pass, which computes the prompt's tokens once.
    """
    group = settings.responses_per_prompt
    for _ in range(settings.epochs):
        order = [i for first in rng.sample(range(0, n, group), n // group) for i in range(first, first + group)]
        for start in range(0, n, settings.minibatch):
            yield order[start : start + settings.minibatch]
