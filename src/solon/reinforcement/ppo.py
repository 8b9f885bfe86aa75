"""Proximal policy optimisation for language models: reward, advantage, loss and KL control as functions of tensors.

Schulman et al. 2017 (arXiv 1707.06347) as used by Stiennon et al. 2020 (arXiv 2009.01325), InstructGPT (arXiv 2203.02155)
and Bai et al. 2022. The implementation details are those of Huang et al. 2024 (arXiv 2403.17031); each is named where it
acts. Values of tokens have shape (batch, response), padded on the right; `mask` is 1 on the tokens of a response, including
its end-of-turn token. `update.py` and `trainer.py` apply these functions to models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over mask. x, mask: same shape. Returns a scalar."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Unit variance over mask, and zero mean if shift_mean. x, mask: (batch, response)."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    out = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (out if shift_mean else out + mean) * mask


def kl_estimate(logprobs: Tensor, reference: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) from the sampled tokens, nats. (batch, response).

    k1 = log p - log q, unbiased; k3 = q/p - 1 - log(q/p), unbiased and never negative
    (Schulman 2020, "Approximating KL divergence").
    """
    ratio = reference - logprobs
    return -ratio if kind == "k1" else torch.expm1(ratio) - ratio


def baseline(score: Tensor, group: int) -> Tensor:
    """For each response, the mean score of the others to the same prompt, (rollouts,) → (rollouts,). See `centred`."""
    if group == 1:
        return score.mean().expand(len(score))
    total = score.view(-1, group).sum(-1, keepdim=True).expand(-1, group).flatten()
    return (total - score) / (group - 1)


def values_of_beginnings(beginnings: Tensor, base: Tensor, mask: Tensor) -> Tensor:
    """Values before each token from the reward model's scores of beginnings. beginnings, mask: (batch, response).

    beginnings: the score of the response up to and with each token. base: the `baseline` of the whole responses' scores, (batch,). The
    value before a token is the score of what stands before it, minus the baseline; before the first token it is 0. So a token's
    advantage is how much it changes the score: the potential-based shaping of Ng et al. 1999, which changes no optimum.
    """
    values = torch.zeros_like(beginnings)
    values[:, 1:] = beginnings[:, :-1] - base.unsqueeze(-1)
    return values * mask


def centred(score: Tensor, group: int) -> Tensor:
    """Scores minus a baseline, (rollouts,) → (rollouts,).

    group: how many neighbours answer the same prompt. The baseline is the mean score of the other responses to the prompt
    (Ahmadian et al. 2024, arXiv 2402.14740), so an easy prompt gives no advantage. With a group of 1, the baseline is the
    mean of all scores. A constant per response changes no gradient in expectation. Without a baseline, the value head would
    have to learn the constant first, and until then late tokens would look better than early ones.
    """
    return score - baseline(score, group)


def held_to_length(score: Tensor, lengths: Tensor, target: int | None, coefficient: float) -> Tensor:
    """The score minus coefficient · |length / target - 1|. score, lengths: (rollouts,). target None changes nothing.

    Rewards that were learned from comparisons follow length (Singhal et al. 2023, arXiv 2310.03716).
    """
    return score if target is None else score - coefficient * (lengths / target - 1).abs()


def token_rewards(score: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Per-token reward: minus the KL penalty, plus the response's score on its last token.

    score: (batch,); kl, mask: (batch, response). Returns (batch, response).
    """
    rewards = -kl_coefficient * kl * mask
    last = mask.sum(-1).long().clamp(min=1) - 1
    rewards[torch.arange(len(score), device=score.device), last] += score
    return rewards


def advantages_and_returns(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438). All (batch, response).

    values: V of the state before each token. The state after the last token has value 0.
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(running)
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


@dataclass(frozen=True)
class PolicyLoss:
    loss: Tensor  # scalar
    clip_fraction: float  # share of tokens whose ratio was clipped
    approx_kl: float  # nats per token, new policy against the one that sampled (k3)
    ratio: float  # mean probability ratio


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> PolicyLoss:
    """Clipped surrogate objective (Schulman et al. 2017, eq. 7). new, old: log-probabilities, (batch, response)."""
    difference = (new - old) * mask
    ratio = difference.exp()
    surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    with torch.no_grad():
        clipped = masked_mean(((ratio - 1).abs() > clip).float(), mask).item()
        kl = masked_mean(ratio - 1 - difference, mask).item()
    return PolicyLoss(masked_mean(surrogate, mask), clipped, kl, masked_mean(ratio.detach(), mask).item())


def value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """Half the squared error, clipped around the values before the update (Huang et al. 2024, detail 8). Returns a scalar."""
    near = old + (new - old).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((new - returns) ** 2, (near - returns) ** 2), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Share of the returns' variance that the values predict: 1 all, 0 none, below 0 worse than the mean return."""
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    residual = returns - values
    return (1 - masked_mean((residual - masked_mean(residual, mask)) ** 2, mask) / variance.clamp(min=1e-8)).item()


@dataclass
class AdaptiveKL:
    """The KL coefficient, moved so that a response's KL approaches `target` nats (Ziegler et al. 2019, section 2.2)."""

    coefficient: float = 0.05
    target: float | None = 6.0  # nats per response; None: the coefficient stays as it is
    horizon: int = 256  # responses over which the largest error that counts, 20 %, moves the coefficient by about 20 %

    def update(self, kl_nats: float, responses: int) -> None:
        """kl_nats: per response, the mean of the last update. responses: their number."""
        if self.target is None:
            return
        error = min(max(kl_nats / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * responses / self.horizon
