"""RLOO, GRPO and DPO on the same data and the same reward, by TRL's trainers, so that one can compare.

Solon's own are the prompts, the comparisons, the reward, the adapters and the evaluation. DPO samples nothing and uses no
reward: it learns the side that each label favours. Ties and abstentions are left out, and how sure a label is cannot be used.

Left out against Solon's PPO: the penalty for an answer that is cut short, soft labels, checkpoints in the middle, and checks.
TRL renders and tokenises conversations itself, so a control token that stands in a prompt is one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

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
from solon.reinforcement.settings import DPOSettings, OnlineSettings
from solon.reinforcement.trainer import Reward
from solon.training.loop import fitting
from solon.training.saving import save_merged
from solon.training.settings import Log, Progress
from solon.training.trl_trainers import watching, without_printers


def train_online(
    algorithm: str,
    prompts: Sequence[Prompt],
    model: str,
    reward: Reward,
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
    """GRPO or RLOO: train `model`, write it to `out`, give one summary a batch of responses.

    reward: called with conversations, as PPO calls it. What TRL does not measure is None in a summary.
    """
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    lm, tokenizer, where = _loaded(model, dtype, seed)
    limit = context_limit(lm.config, tokenizer).less(settings.max_completion_length, "the response")

    def row(numbered: tuple[int, Prompt]) -> dict[str, Any]:
        n, p = numbered
        chat_ids(tokenizer, p.prompt, system=system, limit=limit)
        return {"prompt": as_messages(tokenizer, p.prompt, system=system), "number": n}

    rows, left_out = fitting("prompt", enumerate(prompts), row)
    # TRL leaves an incomplete batch of prompts out; a set smaller than one would teach nothing.
    rows *= math.ceil(settings.generation_batch_size / settings.num_generations / len(rows))

    def rewards(completions: Sequence[Any], number: Sequence[int], **_: Any) -> list[float]:
        texts = [without_reasoning(str(c[-1]["content"])).strip() for c in completions]
        return list(reward([(*prompts[n].prompt, assistant(t)) for n, t in zip(number, texts, strict=True)]))

    kinds: dict[str, tuple[Any, Any]] = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
    config_of, trainer_of = kinds[algorithm]
    config = config_of(**settings.model_dump(), **_common(out, seed))
    meta = {"algorithm": algorithm, "rollouts": settings.generation_batch_size, "left_out": left_out}
    report = _Report(settings.steps_per_batch, settings.beta, meta, log, progress)
    with exact_names():
        trainer = trainer_of(
            model=lm, reward_funcs=rewards, args=config, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=lora_config(lm, adapter, "CAUSAL_LM"), callbacks=[report.callback()],
        )  # fmt: skip
    return _run(trainer, report, tokenizer, out, where)


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
    """Train `model` on comparisons, write it to `out`, give one summary a tenth of the steps."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    lm, tokenizer, where = _loaded(model, dtype, seed)
    rows, left_out = _dpo_rows(comparisons, tokenizer, system, context_limit(lm.config, tokenizer))
    steps = math.ceil(len(rows) / settings.per_device_train_batch_size) * settings.num_train_epochs
    config = DPOConfig(**settings.model_dump(), **_common(out, seed), max_length=None)
    meta = {"algorithm": "dpo", "rollouts": 0, "left_out": left_out}
    report = _Report(max(1, steps // 10), settings.beta, meta, log, progress)
    with exact_names():
        trainer = DPOTrainer(
            model=lm, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            peft_config=lora_config(lm, adapter, "CAUSAL_LM"), callbacks=[report.callback()],
        )  # fmt: skip
    return _run(trainer, report, tokenizer, out, where)


def _loaded(model: str, dtype: str, seed: int) -> tuple[Any, Any, str]:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers import AutoModelForCausalLM

    where = directory_of(model)
    tokenizer = load_tokenizer(where)
    lm: Any = load_checked(AutoModelForCausalLM, where, dtype=resolve_dtype(dtype, where, "training"))
    check_vocabulary(lm, tokenizer)
    lm.to(device())
    torch.manual_seed(seed)
    return lm, tokenizer, where


def _common(out: Path, seed: int) -> dict[str, Any]:
    """The arguments that all of TRL's trainers get."""
    return {
        "output_dir": str(out.parent / f".{out.name}.trainer"),
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _run(trainer: Any, report: _Report, tokenizer: Any, out: Path, base: str) -> list[RolloutSummary]:
    good = watching(without_printers(trainer))
    trainer.train()
    good.finish()
    found = report.finish(good.stopped)
    save_merged(trainer.accelerator.unwrap_model(trainer.model), tokenizer, out, base=base)
    return found


def _dpo_rows(
    comparisons: Sequence[Comparison], tokenizer: Any, system: str | None, limit: Limit
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows as TRL takes them, and how many comparisons were left out, by the reason."""
    decided = [c for c in comparisons if c.label not in (None, 0.5)]
    if not decided:
        raise InputError("algorithm: dpo learns from comparisons, and none of these prefers a side")

    def row(c: Comparison) -> dict[str, Any]:
        sides: tuple[Chat, Chat] = (c.chosen, c.rejected) if float(c.label or 0) > 0.5 else (c.rejected, c.chosen)
        for side in sides:
            chat_ids(tokenizer, (*c.prompt, *side), system=system, generate=False, limit=limit)
        better, worse = ([{"role": m.role, "content": without_reasoning(m.content)} for m in side] for side in sides)
        return {"prompt": as_messages(tokenizer, c.prompt, system=system), "chosen": better, "rejected": worse}

    return fitting("comparison", decided, row)


class _Report:
    """Summaries out of what a TRL trainer logs at each step."""

    def __init__(
        self, steps: int, beta: float, meta: dict[str, Any], log: Log | None, progress: Progress | None
    ) -> None:
        """steps: optimiser steps a summary."""
        self.steps, self.beta, self.meta, self.log, self.progress = steps, beta, meta, log, progress
        self.seen: list[dict[str, float]] = []
        self.found: list[RolloutSummary] = []

    def callback(self) -> Any:
        from transformers import TrainerCallback

        report = self

        class Report(TrainerCallback):  # type: ignore[misc]
            def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
                given = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
                if "loss" in given:
                    report.seen.append(given)
                    if len(report.seen) == report.steps:
                        report.close()
                if report.progress:
                    shown = {str(k): float(given[k]) for k in ("reward", "kl") if k in given}
                    report.progress(state.global_step, state.max_steps, shown)

        return Report()

    def close(self) -> None:
        """Make a summary of the steps since the last one."""
        self.found.append(_summary(len(self.found), self.seen, self.beta, self.meta))
        self.seen = []
        if self.log:
            self.log(self.found[-1].numbers(), len(self.found))

    def finish(self, stopped: str | None) -> list[RolloutSummary]:
        """All summaries. stopped: why the training ended early."""
        if self.seen:
            self.close()
        if stopped and self.found:
            self.found[-1] = self.found[-1].model_copy(update={"meta": {**self.found[-1].meta, "stopped": stopped}})
        return self.found


def _summary(update: int, logs: Sequence[Mapping[str, float]], beta: float, meta: dict[str, Any]) -> RolloutSummary:
    def mean(name: str) -> float | None:
        given = [entry[name] for entry in logs if name in entry]
        return sum(given) / len(given) if given else None

    tokens, kl = mean("completions/mean_length"), mean("kl")
    cut = mean("completions/clipped_ratio")
    return RolloutSummary(
        update=update,
        reward=mean("reward"),
        kl_nats=None if kl is None or tokens is None else kl * tokens,  # TRL's is a mean over tokens
        entropy_nats=mean("entropy"),
        response_tokens=tokens,
        clip_fraction=mean("clip_ratio/region_mean"),
        policy_loss=mean("loss"),
        kl_coefficient=beta,
        ended=None if cut is None else 1 - cut,
        meta={
            **meta,
            "prompt_tokens": 0,
            **{name: mean(name) for name in ("rewards/margins", "rewards/accuracies") if mean(name) is not None},
        },
    )
