"""RLOO, GRPO and DPO by TRL's trainers, to compare with Solon's PPO on the same data and the same reward.

DPO samples no responses and uses no reward: it learns the side that each label prefers, and treats every label as certain.
These algorithms lack four parts of Solon's PPO: the penalty for a response that is cut short, soft labels, checkpoints during
training, and checks by a judge. TRL tokenises conversations, so the name of a control token in a prompt becomes that token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from solon.errors import InputError
from solon.models.chat.encode import chat_ids
from solon.models.chat.limits import Limit, context_limit
from solon.models.chat.reasoning import without_reasoning
from solon.models.chat.template import as_messages
from solon.models.loading import load_checked
from solon.models.lora import exact_names, lora_config
from solon.models.settings import AdapterSettings
from solon.models.weights import check_vocabulary, device, directory_of, load_tokenizer, resolve_dtype
from solon.records import Chat, Comparison, Prompt, RolloutSummary, assistant
from solon.reinforcement.reward import RewardFunction
from solon.reinforcement.settings import DPOSettings, OnlineSettings
from solon.training.loop import encode_all
from solon.training.saving import save_merged
from solon.training.settings import Log, Progress
from solon.training.trl_trainers import run_trainer, trainer_config


def train_online(
    algorithm: str,
    prompts: Sequence[Prompt],
    model: str,
    reward: RewardFunction,
    out: Path,
    *,
    settings: OnlineSettings,
    adapter: AdapterSettings,
    system: str | None,
    seed: int = 0,
    dtype: str = "auto",
    log: Log | None = None,
    progress: Progress | None = None,
) -> list[RolloutSummary]:
    """Train `model` by "grpo" or "rloo" and write it to `out`; one summary per batch of sampled responses.

    reward: takes conversations, as in PPO. A number that TRL does not report is None in the summary.
    """
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # type: ignore[attr-defined]

    lm, tokenizer = _load(model, dtype, seed)
    limit = context_limit(lm.config, tokenizer).less(settings.max_completion_length, "the response")

    def encode(numbered: tuple[int, Prompt]) -> dict[str, Any]:
        number, p = numbered
        chat_ids(tokenizer, p.prompt, system=system, limit=limit)
        return {"prompt": as_messages(tokenizer, p.prompt, system=system), "number": number}

    rows, left_out = encode_all("prompt", enumerate(prompts), encode)
    # TRL leaves out an incomplete batch of prompts: from fewer prompts than one batch nothing would be learned.
    rows *= math.ceil(settings.generation_batch_size / settings.num_generations / len(rows))

    def rewards(completions: Sequence[Any], number: Sequence[int], **_: Any) -> list[float]:
        texts = [without_reasoning(str(c[-1]["content"])).strip() for c in completions]
        return list(reward([(*prompts[n].prompt, assistant(t)) for n, t in zip(number, texts, strict=True)]))

    kinds: dict[str, tuple[Any, Any]] = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
    config_kind, trainer_kind = kinds[algorithm]
    meta = {"algorithm": algorithm, "rollouts": settings.generation_batch_size, "left_out": left_out}
    report = _Report(settings.steps_per_batch, settings.beta, meta, log, progress)
    config = trainer_config(config_kind, out, seed, lr_scheduler_type="constant", **settings.model_dump())
    return _train(trainer_kind, config, lm, tokenizer, rows, adapter, report, model, out, reward_funcs=rewards)


def train_dpo(
    comparisons: Sequence[Comparison],
    model: str,
    out: Path,
    *,
    settings: DPOSettings,
    adapter: AdapterSettings,
    system: str | None,
    seed: int = 0,
    dtype: str = "auto",
    log: Log | None = None,
    progress: Progress | None = None,
) -> list[RolloutSummary]:
    """Train `model` on comparisons by DPO and write it to `out`; one summary per tenth of the optimiser steps."""
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    lm, tokenizer = _load(model, dtype, seed)
    rows, left_out = _dpo_rows(comparisons, tokenizer, system, context_limit(lm.config, tokenizer))
    steps = math.ceil(len(rows) / settings.per_device_train_batch_size) * settings.num_train_epochs
    meta = {"algorithm": "dpo", "rollouts": 0, "left_out": left_out}
    report = _Report(max(1, steps // 10), settings.beta, meta, log, progress)
    options = {"lr_scheduler_type": "constant", "max_length": None, **settings.model_dump()}
    config = trainer_config(DPOConfig, out, seed, **options)
    return _train(DPOTrainer, config, lm, tokenizer, rows, adapter, report, model, out)


def _load(model: str, dtype: str, seed: int) -> tuple[Any, Any]:
    """The causal language model and its tokenizer."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers import AutoModelForCausalLM

    where = directory_of(model)
    tokenizer = load_tokenizer(where)
    lm: Any = load_checked(AutoModelForCausalLM, where, dtype=resolve_dtype(dtype, where, "training"))
    check_vocabulary(lm, tokenizer)
    lm.to(device())
    torch.manual_seed(seed)
    return lm, tokenizer


def _train(
    trainer_kind: Any, config: Any, lm: Any, tokenizer: Any, rows: list[dict[str, Any]], adapter: AdapterSettings,
    report: _Report, model: str, out: Path, **options: Any,
) -> list[RolloutSummary]:  # fmt: skip
    """Train adapters on `lm` with a TRL trainer, and write the model to `out`."""
    from datasets import Dataset

    with exact_names():
        trainer = trainer_kind(
            model=lm, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=lora_config(lm, adapter, "CAUSAL_LM"), callbacks=[report], **options,
        )  # fmt: skip
    summaries = report.finish(run_trainer(trainer))
    save_merged(trainer.accelerator.unwrap_model(trainer.model), tokenizer, out, base=directory_of(model))
    return summaries


def _dpo_rows(
    comparisons: Sequence[Comparison], tokenizer: Any, system: str | None, limit: Limit
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows in TRL's format, and for each reason how many comparisons were left out."""
    decided = [c for c in comparisons if c.label not in (None, 0.5)]
    if not decided:
        raise InputError("algorithm: dpo learns from comparisons, and none of these prefers a side")

    def encode(c: Comparison) -> dict[str, Any]:
        sides: tuple[Chat, Chat] = (c.chosen, c.rejected) if float(c.label or 0) > 0.5 else (c.rejected, c.chosen)
        for side in sides:
            chat_ids(tokenizer, (*c.prompt, *side), system=system, generate=False, limit=limit)
        better, worse = ([{"role": m.role, "content": without_reasoning(m.content)} for m in side] for side in sides)
        return {"prompt": as_messages(tokenizer, c.prompt, system=system), "chosen": better, "rejected": worse}

    return encode_all("comparison", decided, encode)


class _Report(TrainerCallback):
    """Makes summaries from the numbers that a TRL trainer logs at each step."""

    def __init__(
        self, steps: int, beta: float, meta: dict[str, Any], log: Log | None, progress: Progress | None
    ) -> None:
        """steps: optimiser steps per summary."""
        self.steps, self.beta, self.meta, self.log, self.progress = steps, beta, meta, log, progress
        self.logged: list[dict[str, float]] = []  # since the last summary
        self.summaries: list[RolloutSummary] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        numbers = {str(k): v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
        if "loss" in numbers:
            self.logged.append(numbers)
            if len(self.logged) == self.steps:
                self._summarise()
        if self.progress:
            shown: dict[str, float] = {k: float(numbers[k]) for k in ("reward", "kl") if k in numbers}
            self.progress(state.global_step, state.max_steps, shown)

    def _summarise(self) -> None:
        """Make a summary of the means since the last summary."""
        means: dict[str, float] = {}
        for name in {name for numbers in self.logged for name in numbers}:
            values = [numbers[name] for numbers in self.logged if name in numbers]
            means[name] = sum(values) / len(values)
        tokens, kl, cut = (means.get(name) for name in ("completions/mean_length", "kl", "completions/clipped_ratio"))
        preferences = {name: means[name] for name in ("rewards/margins", "rewards/accuracies") if name in means}
        summary = RolloutSummary(
            update=len(self.summaries),
            reward=means.get("reward"),
            kl_nats=None if kl is None or tokens is None else kl * tokens,  # TRL's KL is a mean over tokens
            entropy_nats=means.get("entropy"),
            response_tokens=tokens,
            clip_fraction=means.get("clip_ratio/region_mean"),
            policy_loss=means.get("loss"),
            kl_coefficient=self.beta,
            ended=None if cut is None else 1 - cut,
            meta={**self.meta, "prompt_tokens": 0, **preferences},
        )
        self.summaries.append(summary)
        self.logged = []
        if self.log:
            self.log(summary.numbers(), len(self.summaries))

    def finish(self, stopped: str | None) -> list[RolloutSummary]:
        """All summaries. stopped: why the training ended early."""
        if self.logged:
            self._summarise()
        if stopped and self.summaries:
            last = self.summaries[-1]
            self.summaries[-1] = last.model_copy(update={"meta": {**last.meta, "stopped": stopped}})
        return self.summaries
