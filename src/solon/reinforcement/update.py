"""One update of PPO: rewards and advantages of the rollouts, then some epochs of clipped steps on them.

The functions of `ppo.py` say what is computed; here they are wired to a model, in parts that fit into memory, and over the
processes that train together.
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
from solon.reinforcement.checkpoint import State
from solon.reinforcement.ppo import (
    advantages_and_returns,
    centred,
    explained_variance,
    held_to_length,
    kl_estimate,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from solon.reinforcement.rollout import Rollouts
from solon.reinforcement.settings import PPOSettings

MEANS = ("policy_loss", "value_loss", "clip_fraction", "approx_kl", "ratio")  # of an optimiser step, over its tokens


@dataclass(frozen=True)
class Targets:
    """What an update's steps learn from. All (rollouts, response), but kl_nats and explained."""

    old: Tensor  # log-probabilities under the policy that sampled
    old_values: Tensor
    advantages: Tensor  # whitened
    returns: Tensor
    entropy: Tensor  # nats, of the policy that sampled
    kl_nats: float  # per response, to the reference
    explained: float  # variance of the returns that the values explain


def learn(
    state: State, rollouts: Rollouts, raw: Tensor, ended: Tensor, settings: PPOSettings, rng: random.Random
) -> RolloutSummary:
    """One update. raw: the reward of each rollout. ended: whether it ended by itself. Both (rollouts,)."""
    targets = targets_of(state, rollouts, raw, ended, settings)
    steps: list[dict[str, float]] = []
    for rows in _minibatches(len(rollouts.rows), settings, rng):
        step = _step(state, rollouts, targets, rows, settings)
        if step is None:
            break
        steps.append(step)
    if state.good.stopped is None:
        state.good.finish()
    coefficient = state.kl.coefficient
    if state.good.stopped is None:
        state.kl.update(targets.kl_nats, len(rollouts.rows))

    def mean(name: str) -> float:
        return sum(s[name] for s in steps) / len(steps) if steps else 0.0

    summary = RolloutSummary(
        update=state.update,
        reward=raw.mean().item(),
        kl_nats=targets.kl_nats,
        entropy_nats=masked_mean(targets.entropy, rollouts.mask).item(),
        response_tokens=rollouts.mask.sum(-1).mean().item(),
        clip_fraction=mean("clip_fraction"),
        value_loss=mean("value_loss"),
        policy_loss=mean("policy_loss"),
        kl_coefficient=coefficient,
        ended=ended.float().mean().item(),
        approx_kl=mean("approx_kl"),
        explained_variance=targets.explained,
        meta={"rollouts": len(rollouts.rows), "steps": len(steps), "first_ratio": steps[0]["ratio"] if steps else 1.0},
    )
    if state.good.stopped is None:
        return summary
    told = {k: None for k, v in summary.model_dump().items() if isinstance(v, float) and not math.isfinite(v)}
    return summary.model_copy(
        update={**told, "meta": {**summary.meta, "first_ratio": 1.0, "stopped": state.good.stopped}}
    )


@torch.no_grad()
def targets_of(state: State, rollouts: Rollouts, raw: Tensor, ended: Tensor, settings: PPOSettings) -> Targets:
    """One pass of the policy and one of the reference over the rollouts, and what follows from them."""
    policy, mask = state.policy, rollouts.mask
    scores = (raw - settings.missing_end_penalty * (~ended)).to(mask.device)
    scores = held_to_length(scores, mask.sum(-1), settings.length_target, settings.length_coefficient)
    scores = centred(scores, settings.responses_per_prompt)
    reference, old, entropy, old_values = (torch.zeros_like(mask) for _ in range(4))
    parts = rollouts.parts(distributed.local_indices(len(rollouts.rows)), TOKENS_AT_ONCE)
    filler = parts[0] if parts else []
    for part, _ in distributed.synchronised_steps(parts, filler, distributed.is_sharded()):
        with policy.disable_adapter():
            reference[part] = rollouts.passed(policy, part, settings.temperature)[0]
        old[part], entropy[part], states = rollouts.passed(policy, part, settings.temperature, entropy=True)
        old_values[part] = rollouts.spread(state.values(states.float()).squeeze(-1), part)
    for x in (reference, old, entropy, old_values):
        distributed.all_reduce(x)  # each process had its own rollouts, and zeros elsewhere
    kl_nats = (kl_estimate(old, reference) * mask).sum(-1).mean().item()
    penalty = kl_estimate(old, reference, settings.kl_estimator)
    rewards = token_rewards(scores, penalty, mask, state.kl.coefficient)
    if settings.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)  # Huang et al. 2024, detail 5: the mean means something
    advantages, returns = advantages_and_returns(rewards, old_values, mask, settings.gamma, settings.lam)
    explained = explained_variance(old_values, returns, mask)
    return Targets(old, old_values, whiten(advantages, mask), returns, entropy, kl_nats, explained)


def _step(
    state: State, rollouts: Rollouts, targets: Targets, rows: Sequence[int], settings: PPOSettings
) -> dict[str, float] | None:
    """One optimiser step on some rollouts, and its means; None where the update ends before it."""
    trained = [p for group in state.optimiser.param_groups for p in group["params"]]
    state.optimiser.zero_grad()
    own, lengths = distributed.local_indices(len(rollouts.rows)), rollouts.mask.sum(-1)
    step = dict.fromkeys(MEANS, 0.0)
    # In parts, so that memory does not grow with the minibatch; each weighs as many tokens as it holds, so that the
    # gradient is that of the whole.
    parts = rollouts.parts([r for r in rows if r in own], TOKENS_AT_ONCE)
    for part, counts in distributed.synchronised_steps(parts, list(own[:1]), distributed.is_sharded()):
        share = counts * (lengths[part].sum() / lengths[rows].sum()).item()
        loss, means = _loss(state, rollouts, targets, part, settings)
        (share * loss).backward()
        for name, value in means.items():
            step[name] += share * value
    step = {name: distributed.all_reduce_number(value) for name, value in sorted(step.items())}
    distributed.all_reduce_gradients(trained)
    if settings.kl_stop is not None and step["approx_kl"] > settings.kl_stop:
        return None  # before the step that would go further
    norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
    if not state.good.check(step["policy_loss"] + step["value_loss"], norm):
        return None
    state.optimiser.step()
    return step


def _loss(
    state: State, rollouts: Rollouts, targets: Targets, part: list[int], settings: PPOSettings
) -> tuple[Tensor, dict[str, float]]:
    """The loss of some rollouts, a mean over their tokens, and its parts."""
    mask = rollouts.mask[part]
    bonus = settings.entropy_bonus
    new, entropy, states = rollouts.passed(state.policy, part, settings.temperature, entropy=bonus > 0)
    # Cut off from the trunk: learning values cannot move the policy.
    values = rollouts.spread(state.values(states.detach().float()).squeeze(-1), part)
    of_policy = policy_loss(new, targets.old[part], targets.advantages[part], mask, settings.clip)
    of_values = value_loss(values, targets.old_values[part], targets.returns[part], mask, settings.value_clip)
    loss = of_policy.loss + settings.value_coefficient * of_values
    if bonus:
        loss = loss - bonus * masked_mean(entropy, mask)
    means = of_policy.loss.item(), of_values.item(), of_policy.clip_fraction, of_policy.approx_kl, of_policy.ratio
    return loss, dict(zip(MEANS, means, strict=True))


def _minibatches(n: int, settings: PPOSettings, rng: random.Random) -> Iterator[list[int]]:
    """Of each epoch: all n rollouts, in an order of its own."""
    for _ in range(settings.epochs):
        order = rng.sample(range(n), n)
        for start in range(0, n, settings.minibatch):
            yield order[start : start + settings.minibatch]
