"""The PPO loop: wires the functions of `ppo.py` to models.

Policy, reference, reward and values are one trunk with adapters: the reference is the policy with its adapters switched
off, a reward model that was trained from the same weights is a second set of them (`reward_model.py`), and the value head is
a linear map of the policy's states. The reward may be any other function of conversations, such as a judge's rating.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solon import distributed
from solon.engines.identity import of_model
from solon.errors import InputError
from solon.identity import of_records
from solon.models.chat.encode import answer_text, chat_ids, end_ids
from solon.models.chat.limits import context_limit
from solon.models.decoding import Generated
from solon.models.lora import add_adapters
from solon.models.passes import TOKENS_AT_ONCE, lower_blocks
from solon.models.settings import AdapterSettings
from solon.models.weights import load_causal_lm, resolve
from solon.records import Chat, Prompt, RolloutSummary, assistant, fingerprint
from solon.reinforcement.checkpoint import Kept, State, pack, restore, save
from solon.reinforcement.monitors import Check, Watch, of_texts
from solon.reinforcement.ppo import (
    AdaptiveKL,
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
from solon.reinforcement.reward_model import RewardModel
from solon.reinforcement.rollout import Rollouts, sample
from solon.reinforcement.settings import GROWS, PPOSettings
from solon.training.finite import LastGood
from solon.training.loop import fitting
from solon.training.saving import give_memory_back, save_merged
from solon.training.settings import Progress

Reward = Callable[[Sequence[Chat]], Sequence[float]]


def ppo(
    prompts: Sequence[Prompt],
    model: str,
    reward: Reward | str,
    out: Path,
    *,
    settings: PPOSettings,
    adapter: AdapterSettings,
    system: str | None,
    seed: int = 0,
    dtype: str = "auto",
    checkpoint: Path | None = None,
    watch: Watch | None = None,
    log: Callable[[dict[str, Any], int], None] | None = None,
    progress: Progress | None = None,
    more: Mapping[str, Any] | None = None,
) -> Iterator[RolloutSummary]:
    """Train `model` to earn `reward` while staying near itself; one summary an update, then the model in `out`.

    reward: one score a conversation, in units of about one standard deviation; or the directory of a reward model,
    which becomes adapters on the same trunk where it was trained from `model`. checkpoint: a directory written after
    every `checkpoint_every` updates; where it holds one, training goes on from there, and on a CPU along the same path.
    watch: asked every `check_every` updates; where its last check finds the reward gamed, the policy of its best check
    is what is written. log: takes each summary's numbers and the updates done. more: what else made the training, such as
    the judge behind `reward`; a checkpoint of another one is refused.
    """
    probing = len(watch.probes) if watch and settings.check_every else settings.rollouts
    if distributed.is_sharded() and min(settings.rollouts, probing) < distributed.world_size():
        raise InputError(
            f"--use_fsdp with {distributed.world_size()} processes needs as many rollouts (and probes) at least"
        )
    policy, tokenizer = load_causal_lm(model, dtype=dtype, learns=True)
    torch.manual_seed(seed)
    policy = add_adapters(policy, adapter).eval()  # eval throughout: no dropout in any role
    rewards = _reward_model(reward, policy, tokenizer, model, dtype) if isinstance(reward, str) else None
    score = rewards.score if rewards else reward
    assert callable(score)
    lower = lower_blocks(policy, tokenizer.pad_token_id)
    if rewards:
        rewards.share(lower)
    state = _start(policy, settings, rewards)
    watch = watch if settings.check_every else None
    identity = {
        "model": of_model(model),
        "reward": of_model(reward) if isinstance(reward, str) else "a function",
        "prompts": of_records(prompts),
        "adapter": adapter.model_dump(),
        "system": system,
        "seed": seed,
        "dtype": str(policy.dtype).removeprefix("torch."),
        "settings": settings.model_dump(exclude=GROWS),
        "probes": of_records(watch.probes) if watch else None,
        **(more or {}),
    }
    restore(checkpoint, state, watch, identity)
    limit = context_limit(policy.config, tokenizer).less(settings.max_tokens, "the response")

    def encode(p: Prompt) -> tuple[Prompt, list[int]]:
        if rewards:
            rewards.ids((*p.prompt, assistant("")), rewards.limit.less(settings.max_tokens, "the response"))
        return p, chat_ids(tokenizer, p.prompt, system=system, limit=limit)

    readable, left_out = fitting("prompt", prompts, encode)
    prompts, contexts = [p for p, _ in readable], {p.id: ids for p, ids in readable}
    probes: list[list[int]] = []
    if watch:
        answerable, _ = fitting("probe prompt", watch.probes, encode)
        watch.probes, probes = [p for p, _ in answerable], [ids for _, ids in answerable]

    def respond(asked: list[list[int]], number: int) -> list[Generated]:
        return sample(
            policy,
            asked,
            seed=number,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            ends=end_ids(tokenizer),
            pad=tokenizer.pad_token_id,
        )

    def said(made: Sequence[Generated]) -> list[str]:
        return [answer_text(tokenizer, m.ids)[0] for m in made]

    def check(watch: Watch) -> Check:
        found = watch.check(state.update, said(respond(probes, _number(seed, "probes"))), partial(_scored, score))
        if lower:
            lower.forget()
        if watch.best is found:
            state.best = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
        return found

    if watch and not watch.checks:
        check(watch)
    unsaved: Kept | None = None
    try:
        while state.update < settings.updates and not _over(state, watch, settings):
            update = state.update
            different = _draw(prompts, settings.rollouts // settings.responses_per_prompt, update, seed)
            drawn = [p for p in different for _ in range(settings.responses_per_prompt)]
            made = respond([contexts[p.id] for p in drawn], _number(seed, update))
            texts = said(made)
            rollouts = Rollouts(
                [contexts[p.id] for p in drawn],
                [m.ids + ([] if m.end is None else [m.end]) for m in made],
                tokenizer.pad_token_id,
                policy.device,
                lower,
            )
            chats = [(*p.prompt, assistant(t)) for p, t in zip(drawn, texts, strict=True)]
            own = distributed.local_indices(len(chats))
            if lower:
                read = rewards.rows([chats[i] for i in own]) if rewards and rewards.lower else []
                lower.add([*(rollouts.rows[i] for i in own), *read])
            raw = torch.tensor(_scored(score, chats))
            ended = torch.tensor([m.ended for m in made])
            summary = learn(state, rollouts, raw, ended, settings, random.Random(_number(seed, update)))
            if lower:
                lower.forget()
            state.update += 1
            state.kl_seen = float(summary.kl_nats or 0)
            found = None
            if watch and (_last(state, watch, settings) or state.update % settings.check_every == 0):
                found = check(watch)
            summary = summary.model_copy(
                update={
                    "watched": of_texts(texts),
                    "check": found.summary() if found else None,
                    "meta": {
                        **summary.meta,
                        "prompt_tokens": sum(len(contexts[p.id]) for p in drawn),
                        "left_out": left_out,
                    },
                }
            )
            kept = checkpoint is not None and distributed.is_main() and state.good.stopped is None
            unsaved = pack(state, watch, identity) if kept else None
            give_memory_back()
            if log:
                log(summary.numbers(), state.update)
            yield summary  # before it counts as done: a kill in between makes it once more, and the same
            if (
                checkpoint
                and unsaved
                and (_last(state, watch, settings) or state.update % settings.checkpoint_every == 0)
            ):
                save(checkpoint, unsaved)
                unsaved = None
            if progress:
                shown = {"reward": float(summary.reward or 0), "kl": state.kl_seen}
                progress(state.update, settings.updates, shown)
    except BaseException:  # Ctrl-C, a judge that fails: the whole updates since the last checkpoint are not lost
        if checkpoint and unsaved:
            save(checkpoint, unsaved)
        raise
    if watch and watch.checks[-1].gamed:
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if name in state.best:
                    parameter.copy_(state.best[name])
    save_merged(policy, tokenizer, out, base=resolve(model))


def _over(state: State, watch: Watch | None, settings: PPOSettings) -> bool:
    """Whether training ends before its last update: numbers not finite, beyond the KL bound, or the reward is gamed."""
    if state.good.stopped is not None:
        return True
    gamed = settings.stop_when_gamed and watch is not None and watch.checks[-1].gamed
    return gamed or not state.kl_seen <= settings.kl_bound


def _last(state: State, watch: Watch | None, settings: PPOSettings) -> bool:
    return state.update == settings.updates or _over(state, watch, settings)


def _minibatches(n: int, settings: PPOSettings, rng: random.Random) -> Iterator[list[int]]:
    """Of each epoch: all n rollouts, in an order of its own."""
    for _ in range(settings.epochs):
        order = rng.sample(range(n), n)
        for start in range(0, n, settings.minibatch):
            yield order[start : start + settings.minibatch]


def learn(
    state: State, rollouts: Rollouts, raw: Tensor, ended: Tensor, settings: PPOSettings, rng: random.Random
) -> RolloutSummary:
    """One update: rewards and advantages of the rollouts, then some epochs of clipped steps on them.

    raw: the reward of each rollout. ended: whether it ended by itself. Both (rollouts,).
    """
    policy, values, mask = state.policy, state.values, rollouts.mask
    device, n = mask.device, len(rollouts.rows)
    lengths = mask.sum(-1)
    scores = (raw - settings.missing_end_penalty * (~ended)).to(device)
    scores = held_to_length(scores, lengths, settings.length_target, settings.length_coefficient)
    scores = centred(scores, settings.responses_per_prompt)
    own = distributed.local_indices(n)
    with torch.no_grad():
        reference, old, entropy, old_values = (torch.zeros_like(mask) for _ in range(4))
        parts = rollouts.parts(own, TOKENS_AT_ONCE)
        for part, _ in distributed.synchronised_steps(parts, parts[0] if parts else [], distributed.is_sharded()):
            with policy.disable_adapter():
                reference[part] = rollouts.passed(policy, part, settings.temperature)[0]
            old[part], entropy[part], states = rollouts.passed(policy, part, settings.temperature, entropy=True)
            old_values[part] = rollouts.spread(values(states.float()).squeeze(-1), part)
        for x in (reference, old, entropy, old_values):
            distributed.all_reduce(x)  # each process had its own rollouts, and zeros elsewhere
        kl_nats = (kl_estimate(old, reference) * mask).sum(-1).mean().item()
        penalty = kl_estimate(old, reference, settings.kl_estimator)
        rewards = token_rewards(scores, penalty, mask, state.kl.coefficient)
        if settings.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)  # Huang et al. 2024, detail 5: the mean means something
        advantages, returns = advantages_and_returns(rewards, old_values, mask, settings.gamma, settings.lam)
        foretold = explained_variance(old_values, returns, mask)
        advantages = whiten(advantages, mask)
    trained = [p for group in state.optimiser.param_groups for p in group["params"]]
    steps: list[dict[str, float]] = []
    for rows in _minibatches(n, settings, rng):
        state.optimiser.zero_grad()
        step = dict.fromkeys(("policy_loss", "value_loss", "clip_fraction", "approx_kl", "ratio"), 0.0)
        # In parts, so that memory does not grow with the minibatch; each weighs as many tokens as it holds, so that
        # the gradient is that of the whole.
        parts = rollouts.parts([r for r in rows if r in own], TOKENS_AT_ONCE)
        for part, counts in distributed.synchronised_steps(parts, list(own[:1]), distributed.is_sharded()):
            share = counts * (lengths[part].sum() / lengths[rows].sum()).item()
            new, new_entropy, states = rollouts.passed(
                policy, part, settings.temperature, entropy=settings.entropy_bonus > 0
            )
            # Cut off from the trunk: learning values cannot move the policy.
            new_values = rollouts.spread(values(states.detach().float()).squeeze(-1), part)
            of_policy = policy_loss(new, old[part], advantages[part], mask[part], settings.clip)
            of_values = value_loss(new_values, old_values[part], returns[part], mask[part], settings.value_clip)
            loss = of_policy.loss + settings.value_coefficient * of_values
            if settings.entropy_bonus:
                loss = loss - settings.entropy_bonus * masked_mean(new_entropy, mask[part])
            (share * loss).backward()
            for name, value in (
                ("policy_loss", of_policy.loss.item()),
                ("value_loss", of_values.item()),
                ("clip_fraction", of_policy.clip_fraction),
                ("approx_kl", of_policy.approx_kl),
                ("ratio", of_policy.ratio),
            ):
                step[name] += share * value
        step = {name: distributed.all_reduce_number(value) for name, value in sorted(step.items())}
        distributed.all_reduce_gradients(trained)
        if settings.kl_stop is not None and step["approx_kl"] > settings.kl_stop:
            break  # before the step that would go further
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        if not state.good.check(step["policy_loss"] + step["value_loss"], norm):
            break
        state.optimiser.step()
        steps.append(step)
    if state.good.stopped is None:
        state.good.finish()

    def mean(name: str) -> float:
        return sum(s[name] for s in steps) / len(steps) if steps else 0.0

    coefficient = state.kl.coefficient
    if state.good.stopped is None:
        state.kl.update(kl_nats, n)
    summary = RolloutSummary(
        update=state.update,
        reward=raw.mean().item(),
        kl_nats=kl_nats,
        entropy_nats=masked_mean(entropy, mask).item(),
        response_tokens=lengths.mean().item(),
        clip_fraction=mean("clip_fraction"),
        value_loss=mean("value_loss"),
        policy_loss=mean("policy_loss"),
        kl_coefficient=coefficient,
        ended=ended.float().mean().item(),
        approx_kl=mean("approx_kl"),
        explained_variance=foretold,
        meta={"rollouts": n, "steps": len(steps), "first_ratio": steps[0]["ratio"] if steps else 1.0},
    )
    if state.good.stopped is None:
        return summary
    told = {k: None for k, v in summary.model_dump().items() if isinstance(v, float) and not math.isfinite(v)}
    return summary.model_copy(
        update={**told, "meta": {**summary.meta, "first_ratio": 1.0, "stopped": state.good.stopped}}
    )


def _scored(score: Reward, chats: Sequence[Chat]) -> list[float]:
    """A reward a conversation; of several processes each asks for its part."""
    found = score([chats[i] for i in distributed.local_indices(len(chats))])
    return distributed.all_gather([float(x) for x in found], len(chats))


def _reward_model(where: str, policy: Any, tokenizer: Any, model: str, dtype: str) -> RewardModel:
    return RewardModel.upon(policy, tokenizer, where, model) or RewardModel.load(where, dtype)


def _start(policy: Any, settings: PPOSettings, rewards: RewardModel | None) -> State:
    values = torch.nn.Linear(policy.config.get_text_config().hidden_size, 1, device=policy.device)
    torch.nn.init.zeros_(values.weight)
    torch.nn.init.zeros_(values.bias)
    if settings.value_start == "reward-model":
        if rewards is None:
            raise InputError("ppo.value_start: reward-model needs a reward model; the reward is another here")
        part = rewards.members[0]
        if part.head.weight.shape != values.weight.shape:
            raise InputError("ppo.value_start: the reward model is of another width than the policy; set it to zero")
        with torch.no_grad():
            values.weight.copy_(part.head.weight / part.std)
            values.bias.fill_(-part.mean / part.std)
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in policy.parameters() if p.requires_grad], "lr": settings.learning_rate},
            {"params": values.parameters(), "lr": settings.value_learning_rate},
        ],
        weight_decay=0.0,
        eps=1e-5,  # Huang et al. 2024, detail 9
    )
    horizon = 8 * settings.rollouts
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    kl = AdaptiveKL(settings.kl_coefficient, settings.kl_target, horizon)
    return State(policy, values, optimiser, kl, LastGood(trained))


def _draw(prompts: Sequence[Prompt], n: int, update: int, seed: int) -> list[Prompt]:
    """n prompts: the whole set is gone through before one comes again."""
    drawn = []
    for k in range(update * n, (update + 1) * n):
        lap, place = divmod(k, len(prompts))
        order = list(range(len(prompts)))
        random.Random(_number(seed, "lap", lap)).shuffle(order)
        drawn.append(prompts[order[place]])
    return drawn


def _number(*key: Any) -> int:
    return int(fingerprint("ppo", *key), 16) % (2**63)
