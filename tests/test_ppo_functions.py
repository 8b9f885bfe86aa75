"""The pure functions of PPO, against laws and against numbers worked by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from solon.models.head import logprobs_and_entropy
from solon.reinforcement.ppo import (
    AdaptiveKL,
    advantages_and_returns,
    centred,
    kl_estimate,
    masked_mean,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)


def test_advantages_worked_by_hand() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0, 9.0]])
    values = torch.tensor([[0.5, 0.25, 0.75, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma=1.0, lam=0.5)
    # deltas: .25-.5=-.25, .75-.25=.5, 1-.75=.25; back to front: .25, .5+.5*.25=.625, -.25+.5*.625=.0625
    assert torch.allclose(advantages, torch.tensor([[0.0625, 0.625, 0.25, 0.0]]))
    assert torch.allclose(returns, torch.tensor([[0.5625, 0.875, 1.0, 0.0]]))


def test_advantages_do_not_depend_on_padding() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    mask = torch.ones(3, 5)
    short, _ = advantages_and_returns(rewards, values, mask)
    pad = torch.nn.functional.pad
    long, _ = advantages_and_returns(
        pad(rewards, (0, 4), value=7.0), pad(values, (0, 4), value=-3.0), pad(mask, (0, 4))
    )
    assert torch.allclose(short, long[:, :5])
    assert long[:, 5:].abs().max() == 0


def test_whitening_sees_valid_tokens_only() -> None:
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, -99.0, 99.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    out = whiten(x, mask)
    assert masked_mean(out, mask).abs() < 1e-6
    assert abs(masked_mean(out**2, mask).item() - 1) < 1e-4
    assert (out * (1 - mask)).abs().max() == 0
    assert abs(masked_mean(whiten(x, mask, shift_mean=False), mask).item() - 3) < 1e-5


def test_score_lands_on_the_last_valid_token() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), torch.full((2, 3), 0.5), mask, kl_coefficient=0.1)
    assert torch.allclose(rewards, torch.tensor([[-0.05, 1.95, 0.0], [-0.05, -0.05, -1.05]]))


def test_no_change_means_ratio_one_and_the_plain_gradient() -> None:
    torch.manual_seed(0)
    old = torch.randn(2, 4)
    new = old.clone().requires_grad_()
    advantages, mask = torch.randn(2, 4), torch.tensor([[1.0, 1, 1, 0], [1.0, 1, 0, 0]])
    step = policy_loss(new, old, advantages, mask)
    assert step.ratio == 1.0 and step.clip_fraction == 0.0 and step.approx_kl == 0.0
    step.loss.backward()
    assert torch.allclose(new.grad, -advantages * mask / mask.sum(), atol=1e-6)


def test_clipping_stops_the_gradient_on_the_gaining_side_only() -> None:
    old = torch.zeros(1, 2)
    new = torch.tensor([[0.5, 0.5]], requires_grad=True)  # ratio 1.65, beyond 1.2
    policy_loss(new, old, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)).loss.backward()
    assert new.grad[0, 0] == 0  # gaining: clipped
    assert new.grad[0, 1] > 0  # losing: still pulled back


def test_padding_changes_no_loss() -> None:
    torch.manual_seed(0)
    new, old, advantages = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    mask = torch.tensor([[1.0, 1, 1], [1.0, 1, 0]])

    def pad(x: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 5), value=value)

    plain = policy_loss(new, old, advantages, mask).loss
    padded = policy_loss(pad(new, 3), pad(old, -3), pad(advantages, 100), pad(mask, 0)).loss
    assert torch.allclose(plain, padded)
    plain = value_loss(new, old, advantages, mask)
    assert torch.allclose(plain, value_loss(pad(new, 3), pad(old, -3), pad(advantages, 100), pad(mask, 0)))


def test_kl_estimates_agree_with_the_true_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
    true = (p * (p / q).log()).sum().item()
    tokens = torch.multinomial(p, 200_000, replacement=True, generator=generator)
    for kind in ("k1", "k3"):
        estimate = kl_estimate(p.log()[tokens], q.log()[tokens], kind)
        # five standard errors of the mean of 200,000 draws
        assert abs(estimate.mean().item() - true) < 5 * estimate.std().item() / math.sqrt(200_000)
    assert kl_estimate(p.log()[tokens], q.log()[tokens], "k3").min() >= -1e-6


@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize("entropy", [True, False])
def test_log_probs_and_entropies_and_their_gradients_are_the_textbook_s(chunk: int, entropy: bool) -> None:
    torch.manual_seed(0)
    head, tokens = torch.nn.Linear(8, 20, bias=False), torch.randint(0, 20, (11,))
    states, toward = torch.randn(11, 8) * 3, torch.randn(2, 11)

    def plain(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        distribution = torch.log_softmax(head(hidden) / 0.7, -1)
        return distribution[range(11), tokens], -(distribution.exp() * distribution).sum(-1) * entropy

    def ours(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logprobs_and_entropy(hidden, head, tokens, temperature=0.7, chunk=chunk, entropy=entropy)

    for frozen in (True, False):  # a head that learns goes another way
        head.requires_grad_(not frozen)
        found = []
        for function in (plain, ours):
            hidden = states.clone().requires_grad_()
            logprobs, entropies = function(hidden)
            (logprobs @ toward[0] + entropies @ toward[1]).backward()
            found.append((logprobs.detach(), entropies.detach(), hidden.grad))
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("lead", [3.0, 5.0, 7.0])
def test_the_numbers_of_a_sure_token_survive_bfloat16(lead: float) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 500, bias=False).requires_grad_(False)
    tokens = torch.arange(8)
    rest = torch.randn(8, 64)
    states = rest + head.weight[tokens] * (lead + 6) / head.weight[tokens].square().sum(-1, keepdim=True)
    found = []
    for weight in (head.weight.to(torch.bfloat16).float(), head.weight.to(torch.bfloat16)):
        head.weight = torch.nn.Parameter(weight, requires_grad=False)
        hidden = states.to(torch.bfloat16).float().requires_grad_()
        logprobs, _ = logprobs_and_entropy(hidden, head, tokens, temperature=1.0, entropy=False)
        logprobs.sum().backward()
        found.append((logprobs.detach(), hidden.grad))
    (exact, exact_grad), (narrow, narrow_grad) = found
    assert (exact - narrow).abs().max() < 1e-5  # the product itself is not rounded
    assert (exact_grad - narrow_grad).norm() < 0.05 * exact_grad.norm()  # what is multiplied back is, to 1 in 256


def test_a_token_of_no_probability_makes_no_nan() -> None:
    head = torch.nn.Linear(2, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[1e4, 0.0], [0.0, 0.0], [-1e4, 0.0]]))
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    logprobs, entropies = logprobs_and_entropy(hidden, head, torch.tensor([0]), temperature=1.0)
    (logprobs + entropies).sum().backward()
    assert (logprobs.item(), entropies.item()) == (0.0, 0.0) and hidden.grad.isfinite().all()


@pytest.mark.parametrize(("kl", "up"), [(60.0, True), (0.1, False)])
def test_kl_control_steers_towards_its_target(kl: float, up: bool) -> None:
    control = AdaptiveKL(coefficient=0.1, target=6.0, horizon=256)
    control.update(kl, responses=32)
    assert (control.coefficient > 0.1) == up
    fixed = AdaptiveKL(coefficient=0.1, target=None)
    fixed.update(kl, responses=32)
    assert fixed.coefficient == 0.1


def test_an_easy_prompt_earns_nothing() -> None:
    score = torch.tensor([1.0, 3.0, 2.0, 6.0])
    by_prompt = centred(score, 2)
    assert torch.allclose(by_prompt, torch.tensor([-2.0, 2.0, -4.0, 4.0]))  # each less the other of its prompt
    easier = score + torch.tensor([10.0, 10.0, 0.0, 0.0])
    assert torch.allclose(centred(easier, 2), by_prompt)
    assert torch.allclose(centred(score, 1), score - 3.0)


@pytest.mark.parametrize(("red_team", "helpful", "n"), [(6, 12, 3), (5, 7, 4), (0, 9, 4), (20, 1, 7), (30, 60, 20)])
def test_every_prompt_is_drawn_once_a_lap_and_updates_have_the_same_share_of_both_kinds(
    red_team: int, helpful: int, n: int
) -> None:
    from solon.records import Prompt, user
    from solon.reinforcement.trainer import draw_prompts

    kinds = ["red_team"] * red_team + ["helpful"] * helpful
    prompts = [Prompt(id=str(i), prompt=(user(str(i)),), source=kind) for i, kind in enumerate(kinds)]
    updates = [draw_prompts(prompts, n, update, seed=1) for update in range(2 * len(prompts))]
    drawn = [p.id for update in updates for p in update]
    for start in range(0, len(drawn), len(prompts)):
        assert len(set(drawn[start : start + len(prompts)])) == len(drawn[start : start + len(prompts)])
    assert drawn[: len(prompts)] != drawn[len(prompts) : 2 * len(prompts)]
    shares = [sum(p.source == "red_team" for p in update) for update in updates]
    assert all(abs(share - n * red_team / len(prompts)) < 2 for share in shares)
    assert [draw_prompts(prompts, n, 3, seed=1)] == updates[3:4] and draw_prompts(prompts, n, 3, seed=2) != updates[3]


@pytest.mark.parametrize(("group", "minibatch"), [(4, 8), (4, 6), (1, 5), (3, 24)])
def test_minibatches_hold_each_rollout_once_an_epoch_and_the_responses_to_a_prompt_together(
    group: int, minibatch: int
) -> None:
    from solon.reinforcement.settings import PPOSettings
    from solon.reinforcement.update import _minibatches

    settings = PPOSettings(rollouts=24, responses_per_prompt=group, minibatch=minibatch, epochs=2)
    order = [i for indices in _minibatches(24, settings, random.Random(0)) for i in indices]
    assert sorted(order) == sorted([*range(24)] * 2) and order[:24] != order[24:]
    for start in range(0, 48, group):
        assert len({i // group for i in order[start : start + group]}) == 1
