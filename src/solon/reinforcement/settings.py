"""The settings of the reward model and of each reinforcement algorithm."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from solon.records import Labeler
from solon.settings import Epochs, LearningRate, Passes, Settings, Tokens
from solon.training.settings import TrainSettings

KL_BOUND = 25.0  # nats per response; a policy beyond it is too far from its reference


class RewardSettings(TrainSettings):
    epochs: Passes = 1
    """How often the training goes over its comparisons; 0.5: over half of them. A second time over-fits (Stiennon et al. 2020, appendix B.2)."""
    margin: float = Field(0.0, ge=0)
    """Margin, in nats, by which the chosen score must exceed the rejected score for a label of 1. A tie has no margin."""
    beginnings: float = Field(0.0, ge=0, le=1)
    """Share of the loss that compares the beginnings of the two responses, after each token; the rest compares whole responses.
    A reward model that has learned beginnings can tell PPO which token earned the reward (`ppo.value_start: beginnings`)."""
    ties: Literal["equal", "skip"] = "equal"
    """Labels of 0.5: `equal` pulls the two scores together, `skip` leaves the comparison out."""
    weights: dict[Labeler, float] = Field(default_factory=dict)
    """Weight of a comparison in the loss by its labeler, as in {human: 2}. A labeler that is not named has weight 1."""
    members: int = Field(1, ge=1, le=16)
    """Members of the ensemble: adapters on the same weights, trained from different seeds."""
    uncertainty_penalty: float = Field(0.0, ge=0)
    """How many standard deviations between the members are subtracted from the score (Coste et al. 2024)."""

    @model_validator(mode="after")
    def _consistent(self) -> RewardSettings:
        if any(not 0 <= w < math.inf for w in self.weights.values()):
            raise ValueError("weights: a weight is a finite number, 0 or more")
        if self.uncertainty_penalty and self.members == 1:
            raise ValueError("uncertainty_penalty: one member cannot disagree with itself; set members to 3 or more")
        return self


class PPOSettings(Settings):
    """Proximal policy optimisation, Solon's own."""

    updates: int = Field(8, ge=1)
    """Updates of the policy. A finished `solon ppo` continues where this number is raised."""
    rollouts: int = Field(32, ge=2)
    """Responses sampled for one update."""
    responses_per_prompt: int = Field(1, ge=1)
    """Responses to the same prompt. With several, the baseline of each is the mean reward of the others."""
    epochs: Epochs = 4
    """How often an update goes over its responses."""
    minibatch: int = Field(8, ge=1)
    """Responses per optimiser step."""
    learning_rate: LearningRate = 1e-4
    """Learning rate of the policy's adapters."""
    value_learning_rate: LearningRate = 1e-3
    """Learning rate of the value head."""
    schedule: Literal["constant", "linear"] = "constant"
    """Both learning rates over the training: `constant`; `linear`, they fall to zero with the updates (Huang et al. 2022, The 37
    Implementation Details of PPO, detail 4). A training whose rates fall has one end, so its `updates` cannot be raised later."""
    max_tokens: int = Field(64, ge=4, le=1_000_000)
    """Tokens of a response at most."""
    temperature: float = Field(0.7, gt=0)
    """Temperature of sampling, and of the log-probabilities in the loss."""
    clip: float = Field(0.2, gt=0)
    """Clip range of the probability ratio."""
    value_clip: float = Field(0.2, gt=0)
    """Clip range of the values around the values before the update."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of later rewards."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    value_coefficient: float = Field(0.5, ge=0)
    """Weight of the value loss."""
    value_start: Literal["zero", "reward-model", "beginnings"] = "zero"
    """What a value is before the value head learns: `zero`; `reward-model`, the head of the reward model on the policy's states;
    `beginnings`, the reward model's score of the response so far, compared with the other responses to the prompt."""
    entropy_bonus: float = Field(0.0, ge=0)
    """Bonus in the loss for a token's entropy, per nat."""
    whiten_rewards: bool = False
    """Scale the rewards of tokens to variance 1. The advantages always get mean 0 and variance 1."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Estimator of the KL penalty (Schulman 2020). The reported KL is always by k1."""
    kl_coefficient: float = Field(0.05, ge=0)
    """Weight of the KL penalty at the start: sd of reward per nat."""
    kl_target: float | None = Field(6.0, gt=0)
    """KL to the reference, in nats per response, that the coefficient steers towards. null: the coefficient stays."""
    kl_bound: float = Field(KL_BOUND, gt=0)
    """KL to the reference, in nats per response, beyond which training stops."""
    kl_stop: float | None = Field(None, gt=0)
    """KL to the policy that sampled, in nats per token, beyond which an update ends. null: it never ends early."""
    missing_end_penalty: float = Field(1.0, ge=0)
    """Subtracted from the score of a response that was cut at max_tokens, sd."""
    length_target: int | None = Field(None, ge=1)
    """Tokens that a response should have: longer and shorter ones are punished, as `length_coefficient` says. null: the length does
    not count."""
    length_coefficient: float = Field(1.0, ge=0)
    """Penalty for the length, sd: this number times |tokens - length_target| / length_target is subtracted."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm that gradients are clipped to."""
    checkpoint_every: int = Field(1, ge=1)
    """Updates between two checkpoints."""
    check_every: int = Field(0, ge=0)
    """Updates between two checks with the probe prompts. 0: no checks."""
    stop_when_gamed: bool = False
    """End the training where a check finds that the reward is being gamed, or that the answers have lost their sense."""

    @model_validator(mode="after")
    def _consistent(self) -> PPOSettings:
        if self.value_start == "beginnings" and self.whiten_rewards:
            raise ValueError("value_start: beginnings are scores that are not whitened; set whiten_rewards to false")
        if self.stop_when_gamed and not self.check_every:
            raise ValueError("stop_when_gamed: no check is made; set check_every, for example to 10")
        if self.rollouts % self.responses_per_prompt:
            raise ValueError(
                f"rollouts: {self.rollouts} is not a multiple of responses_per_prompt: {self.responses_per_prompt}"
            )
        return self

    def share_of_rate(self, update: int) -> float:
        """The share (0..1) of the learning rates that update number `update`, counted from 0, uses."""
        return 1 - update / self.updates if self.schedule == "linear" else 1.0

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the path of a training; the others may change when it continues from a checkpoint."""
        free = {"checkpoint_every", "kl_bound"} | ({"updates"} if self.schedule == "constant" else set())
        return self.model_dump(exclude=free)


class OnlineSettings(Settings):
    """The settings that GRPO and RLOO share. The names are those of TRL's GRPOConfig and RLOOConfig."""

    max_steps: int = Field(64, ge=1)
    """Optimiser steps."""
    learning_rate: LearningRate = 1e-4
    """Learning rate of the adapters."""
    per_device_train_batch_size: int = Field(8, ge=1)
    """Responses per optimiser step."""
    generation_batch_size: int = Field(32, ge=2)
    """Responses that are sampled together, and then learned from."""
    num_generations: int = Field(4, ge=2)
    """Responses to the same prompt. Their rewards are compared with each other."""
    num_iterations: int = Field(2, ge=1)
    """How often each batch of responses is learned from."""
    max_completion_length: Tokens = 64
    """Tokens of a response at most."""
    temperature: float = Field(0.7, gt=0)
    """Temperature of sampling."""
    epsilon: float = Field(0.2, gt=0)
    """Clip range of the probability ratio."""
    beta: float = Field(0.05, ge=0)
    """Weight of the KL penalty: sd of reward per nat."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm that gradients are clipped to."""

    @model_validator(mode="after")
    def _whole_batches(self) -> OnlineSettings:
        batch = self.generation_batch_size
        for name in ("per_device_train_batch_size", "num_generations"):
            if batch % getattr(self, name):
                raise ValueError(f"generation_batch_size: {batch} is not a multiple of {name}: {getattr(self, name)}")
        return self

    @property
    def steps_per_batch(self) -> int:
        """Optimiser steps between two samplings."""
        return self.num_iterations * self.generation_batch_size // self.per_device_train_batch_size


class GRPOSettings(OnlineSettings):
    """Group relative policy optimisation (Shao et al. 2024), by TRL's trainer."""


class RLOOSettings(OnlineSettings):
    """REINFORCE leave-one-out (Ahmadian et al. 2024), by TRL's trainer."""


class DPOSettings(Settings):
    """Direct preference optimisation (Rafailov et al. 2023), by TRL's trainer. The names are those of DPOConfig."""

    num_train_epochs: Epochs = 1
    """How often the training goes over the comparisons."""
    learning_rate: LearningRate = 1e-4
    """Learning rate of the adapters."""
    per_device_train_batch_size: int = Field(8, ge=1)
    """Comparisons per optimiser step."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to its reference."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm that gradients are clipped to."""
