"""The PPO loop: wires the functions of `ppo.py` to models.

Policy and reference are one trunk: the reference is the policy with its adapters switched off. The value head is
a linear map of the policy's states, starting at zero and cut off from the trunk's gradient, so that learning
values cannot move the policy. The reward is any function of conversations: a reward model, or a check.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from solon.engines.chat import chat_ids, end_ids
from solon.engines.decoding import decode
from solon.engines.weights import load_causal_lm, resolve
from solon.records import Chat, Prompt, RolloutSummary, assistant, fingerprint
from solon.reinforcement.frozen import lowest_trained_block, starting_at, states_entering
from solon.reinforcement.ppo import (
    AdaptiveKL,
    advantages_and_returns,
    centred,
    kl_estimate,
    logprobs_and_entropy,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from solon.training import AdapterSettings, add_adapters, base_of, give_memory_back, hidden_states, save_merged

Reward = Callable[[Sequence[Chat]], Sequence[float]]


class PPOSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    updates: int = Field(8, ge=1)
    rollouts: int = Field(32, ge=2)  # responses per update
    responses_per_prompt: int = Field(1, ge=1)  # of those; several are each other's baseline
    epochs: int = Field(4, ge=1)  # passes over them
    minibatch: int = Field(8, ge=1)  # responses per optimiser step
    learning_rate: float = Field(1e-4, gt=0)
    value_learning_rate: float = Field(1e-3, gt=0)
    max_tokens: int = Field(64, ge=4)  # a response's limit
    temperature: float = Field(0.7, gt=0)
    clip: float = Field(0.2, gt=0)
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    value_coefficient: float = Field(0.5, ge=0)
    kl_coefficient: float = Field(0.05, ge=0)
    kl_target: float | None = Field(6.0, gt=0)  # nats per response; null keeps the coefficient fixed
    kl_bound: float = Field(25.0, gt=0)  # nats per response; training stops above it
    missing_end_penalty: float = Field(1.0, ge=0)  # taken off the score of a response cut at max_tokens
    max_grad_norm: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _whole_groups(self) -> PPOSettings:
        if self.rollouts % self.responses_per_prompt:
            raise ValueError(
                f"rollouts: {self.rollouts} is not a multiple of responses_per_prompt: {self.responses_per_prompt}"
            )
        return self


class Batch:
    """One update's rollouts. Everything (rollouts, response) unless said otherwise."""

    def __init__(self, contexts: list[list[int]], responses: list[list[int]], pad: int, device: torch.device) -> None:
        self.context_length = max(map(len, contexts))
        longest = max(map(len, responses))
        n = len(contexts)
        self.ids = torch.full((n, self.context_length + longest), pad)
        attention = torch.zeros_like(self.ids)
        mask = torch.zeros((n, longest))
        for i, (context, response) in enumerate(zip(contexts, responses, strict=True)):
            start = self.context_length - len(context)
            self.ids[i, start : self.context_length] = torch.tensor(context)
            self.ids[i, self.context_length : self.context_length + len(response)] = torch.tensor(response)
            attention[i, start : self.context_length + len(response)] = 1
            mask[i, : len(response)] = 1
        self.ids, self.attention, self.mask = self.ids.to(device), attention.to(device), mask.to(device)
        self.tokens = self.ids[:, self.context_length :]
        self.positions = (self.attention.cumsum(-1) - 1).clamp(min=0)  # from the mask: padding takes no position
        self.block = 0
        self.entering: Tensor | None = None  # the states (rollouts, length, width) that enter this block, where kept

    def keep(self, policy: Any, block: int, entering: Tensor) -> None:
        """Start later passes at `block`, if the model takes it: checked on one rollout, as architectures differ."""
        if block == 0:
            return
        row = torch.zeros(1, dtype=torch.long, device=self.ids.device)
        whole = evaluate_tokens(policy, self, row, 1.0)[0]
        self.block, self.entering = block, entering
        try:
            same = torch.allclose(evaluate_tokens(policy, self, row, 1.0)[0], whole, atol=0.02)
        except (TypeError, ValueError, RuntimeError, IndexError):
            same = False
        if not same:
            self.block, self.entering = 0, None


def evaluate_tokens(
    policy: Any, batch: Batch, rows: Tensor, temperature: float, entropy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies (nats) and hidden states of the response tokens of `rows`.

    Returns (rows, response), (rows, response), (rows, response, width). Scores over the vocabulary are computed
    where the mask is 1 only.
    """
    given = {"attention_mask": batch.attention[rows], "position_ids": batch.positions[rows]}
    if batch.entering is None:
        states = hidden_states(policy, input_ids=batch.ids[rows], **given)
    else:
        with starting_at(policy, batch.block):
            states = hidden_states(policy, inputs_embeds=batch.entering[rows], **given)
    hidden = states[:, batch.context_length - 1 : -1]  # the state before a token predicts it
    mask = batch.mask[rows].bool()
    flat, flat_entropy = logprobs_and_entropy(
        hidden[mask], base_of(policy).get_output_embeddings(), batch.tokens[rows][mask], temperature, entropy=entropy
    )
    logprobs = torch.zeros(mask.shape, device=hidden.device).masked_scatter(mask, flat)
    entropies = torch.zeros(mask.shape, device=hidden.device).masked_scatter(mask, flat_entropy)
    return logprobs, entropies, hidden


def ppo(
    prompts: Sequence[Prompt],
    model: str,
    reward: Reward,
    out: Path,
    *,
    settings: PPOSettings,
    adapter: AdapterSettings,
    system: str | None,
    seed: int = 0,
    dtype: str = "auto",
    checkpoint: Path | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Iterator[RolloutSummary]:
    """Train `model` to earn `reward` while staying near itself; one summary an update, then the model in `out`.

    reward: one score a conversation, in units of about one standard deviation. checkpoint: a directory written
    after each update; where it holds one, training goes on from there, and on a CPU along the same path.
    """
    policy, tokenizer = load_causal_lm(model, dtype=dtype)
    torch.manual_seed(seed)
    policy = add_adapters(policy, adapter).eval()  # eval throughout: no dropout in any role
    device, ends = policy.device, end_ids(tokenizer)
    values = torch.nn.Linear(policy.config.get_text_config().hidden_size, 1, device=device)
    torch.nn.init.zeros_(values.weight)
    torch.nn.init.zeros_(values.bias)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        [
            {"params": trained, "lr": settings.learning_rate},
            {"params": values.parameters(), "lr": settings.value_learning_rate},
        ],
        weight_decay=0.0,
        eps=1e-5,  # Huang et al. 2024, detail 9
    )
    kl_control = AdaptiveKL(settings.kl_coefficient, settings.kl_target, horizon=8 * settings.rollouts)
    first = _restore(checkpoint, policy, values, optimiser, kl_control)
    block = lowest_trained_block(policy)
    contexts = {p.id: chat_ids(tokenizer, p.prompt, system=system) for p in prompts}
    for update in range(first, settings.updates):
        different = _draw(prompts, settings.rollouts // settings.responses_per_prompt, update, seed)
        drawn = [p for p in different for _ in range(settings.responses_per_prompt)]
        uniforms = torch.rand(
            (len(drawn), settings.max_tokens), generator=torch.Generator().manual_seed(_number(seed, update))
        )
        made = decode(
            policy,
            [contexts[p.id] for p in drawn],
            uniforms,
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            end=ends,
            pad=tokenizer.pad_token_id,
        )
        end = tokenizer.eos_token_id
        batch = Batch(
            [contexts[p.id] for p in drawn],
            [m.ids + ([end] if m.ended else []) for m in made],
            tokenizer.pad_token_id,
            device,
        )
        texts = [tokenizer.decode(m.ids, skip_special_tokens=True).strip() for m in made]
        raw = torch.tensor(reward([(*p.prompt, assistant(t)) for p, t in zip(drawn, texts, strict=True)]))
        ended = torch.tensor([m.ended for m in made])
        score = (raw - settings.missing_end_penalty * (~ended)).float().to(device)
        score = centred(score, settings.responses_per_prompt)

        with torch.no_grad():
            everything = torch.arange(len(drawn), device=device)
            with policy.disable_adapter(), states_entering(policy, block) as entering:
                reference = _in_parts(policy, batch, everything, settings)[0]
            batch.keep(policy, block, torch.cat(entering))
            old, entropy, hidden = _in_parts(policy, batch, everything, settings)
            old_values = values(hidden.float()).squeeze(-1) * batch.mask
            kl = kl_estimate(old, reference) * batch.mask
            kl_nats = kl.sum(-1).mean().item()
            rewards = token_rewards(score, kl, batch.mask, kl_control.coefficient)
            advantages, returns = advantages_and_returns(rewards, old_values, batch.mask, settings.gamma, settings.lam)
            advantages = whiten(advantages, batch.mask)
        rng = random.Random(_number(seed, update))
        seen: list[tuple[float, float, float, float]] = []
        for _ in range(settings.epochs):
            order = list(range(len(drawn)))
            rng.shuffle(order)
            for start in range(0, len(order), settings.minibatch):
                rows = torch.tensor(order[start : start + settings.minibatch], device=device)
                new, _, states = evaluate_tokens(policy, batch, rows, settings.temperature)
                mask = batch.mask[rows]
                step = policy_loss(new, old[rows], advantages[rows], mask, settings.clip)
                new_values = values(states.detach().float()).squeeze(-1)
                loss_v = value_loss(new_values, old_values[rows], returns[rows], mask, settings.clip)
                optimiser.zero_grad()
                (step.loss + settings.value_coefficient * loss_v).backward()
                torch.nn.utils.clip_grad_norm_([*trained, *values.parameters()], settings.max_grad_norm)
                optimiser.step()
                seen.append((step.clip_fraction, loss_v.item(), step.loss.item(), step.ratio))
        mean = [sum(column) / len(seen) for column in zip(*seen, strict=True)]
        summary = RolloutSummary(
            update=update,
            reward=raw.float().mean().item(),
            kl_nats=kl_nats,
            entropy_nats=masked_mean(entropy, batch.mask).item(),
            response_tokens=batch.mask.sum(-1).mean().item(),
            clip_fraction=mean[0],
            value_loss=mean[1],
            policy_loss=mean[2],
            kl_coefficient=kl_control.coefficient,
            ended=ended.float().mean().item(),
            meta={
                "rollouts": len(drawn),
                "first_ratio": seen[0][3],
                "prompt_tokens": sum(len(contexts[p.id]) for p in drawn),
            },
        )
        kl_control.update(kl_nats, len(drawn))
        _save(checkpoint, update + 1, policy, values, optimiser, kl_control)
        give_memory_back()
        yield summary
        if progress:
            progress(update + 1, settings.updates, {"reward": summary.reward, "kl": kl_nats})
        if not math.isfinite(kl_nats) or kl_nats > settings.kl_bound:
            break
    save_merged(policy, tokenizer, out, base=resolve(model))


def _in_parts(policy: Any, batch: Batch, rows: Tensor, settings: PPOSettings) -> tuple[Tensor, Tensor, Tensor]:
    parts = [evaluate_tokens(policy, batch, part, settings.temperature, entropy=True) for part in rows.split(16)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))  # type: ignore[return-value]


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


def _save(
    checkpoint: Path | None, update: int, policy: Any, values: Any, optimiser: Any, kl_control: AdaptiveKL
) -> None:
    """All that the next update needs; randomness comes from the seed and the update's number."""
    if checkpoint is None:
        return
    from safetensors.torch import save_file

    checkpoint.mkdir(parents=True, exist_ok=True)
    tensors = {f"policy.{n}": p.detach() for n, p in policy.named_parameters() if p.requires_grad}
    tensors |= {f"values.{n}": p.detach() for n, p in values.named_parameters()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
    state = {"update": update, "kl_coefficient": repr(kl_control.coefficient)}
    aside = checkpoint / ".next.safetensors"
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, aside, metadata={"solon": json.dumps(state)})
    os.replace(aside, checkpoint / "ppo.safetensors")


def _restore(checkpoint: Path | None, policy: Any, values: Any, optimiser: Any, kl_control: AdaptiveKL) -> int:
    """The number of updates already done; 0 where there is no checkpoint."""
    if checkpoint is None or not (checkpoint / "ppo.safetensors").is_file():
        return 0
    from safetensors import safe_open

    with safe_open(checkpoint / "ppo.safetensors", framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        state = json.loads(file.metadata()["solon"])
    with torch.no_grad():
        for prefix, module in (("policy.", policy), ("values.", values)):
            for name, parameter in module.named_parameters():
                if prefix + name in kept:
                    parameter.copy_(kept[prefix + name])
    whole = optimiser.state_dict()
    for key, value in kept.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".", 2)
            whole["state"].setdefault(int(index), {})[name] = value
    optimiser.load_state_dict(whole)
    kl_control.coefficient = float(state["kl_coefficient"])
    return state["update"]
