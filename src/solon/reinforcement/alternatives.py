"""RLOO, GRPO and DPO on the same data and the same reward, by TRL's trainers, so that one can compare.

A recipe's `algorithm:` chooses. What is Solon's own stays as it is (prompts, comparisons, reward, adapters, evaluation);
what PPO's settings mean here: `updates` batches of `rollouts` responses, `responses_per_prompt` of them to a prompt (a
group), `epochs` passes, `minibatch` responses a step, `kl_coefficient` as TRL's beta. DPO samples nothing and uses no reward: it
goes over the comparisons `epochs` times, on the side that the label favours; ties and abstentions are left out, and how
sure a label is it cannot use.

Left out against Solon's PPO: the penalty for an answer cut short, soft labels, checkpoints in the middle, and checks; the
settings for KL targets, bounds and stops, for length, entropy, values and whitening mean nothing here. TRL renders and
tokenises conversations by itself, so a control token that stands in a prompt is one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from solon.errors import InputError
from solon.models.chat.encode import chat_ids
from solon.models.chat.limits import Limit, context_limit
from solon.models.chat.reasoning import without_reasoning
from solon.models.chat.template import as_messages
from solon.models.loading import load_checked
from solon.models.lora import AdapterSettings, exact_names, lora_config
from solon.models.weights import check_vocabulary, device, directory_of, load_tokenizer, resolve_dtype
from solon.records import Chat, Comparison, Prompt, RolloutSummary, assistant
from solon.reinforcement.trainer import PPOSettings, Reward
from solon.training.loop import Progress, fitting
from solon.training.saving import save_merged
from solon.training.trl_trainers import watching, without_printers

Algorithm = Literal["ppo", "rloo", "grpo", "dpo"]
Log = Callable[[Mapping[str, float], int], None]


def check_settings(algorithm: Algorithm, settings: PPOSettings) -> None:
    """Raises InputError where the settings do not fit the algorithm."""
    if algorithm in ("rloo", "grpo") and settings.responses_per_prompt < 2:
        raise InputError(
            f"algorithm: {algorithm} compares responses to one prompt; set ppo.responses_per_prompt to 2 or more"
        )
    if algorithm in ("rloo", "grpo") and settings.rollouts % settings.minibatch:
        raise InputError(
            f"algorithm: {algorithm} steps on whole minibatches; ppo.rollouts: {settings.rollouts} is not a multiple of "
            f"ppo.minibatch: {settings.minibatch}"
        )
    if algorithm == "dpo" and not settings.kl_coefficient:
        raise InputError("algorithm: dpo has no gradient without a KL penalty; set ppo.kl_coefficient, to 0.1 say")
    if algorithm != "ppo" and settings.check_every:
        raise InputError(
            f"algorithm: {algorithm} is TRL's trainer and is not checked while it runs; set ppo.check_every to 0"
        )


def train_otherwise(
    algorithm: Algorithm,
    prompts: Sequence[Prompt],
    comparisons: Sequence[Comparison],
    model: str,
    reward: Reward,
    out: Path,
    *,
    settings: PPOSettings,
    adapter: AdapterSettings,
    system: str | None,
    seed: int = 0,
    dtype: str = "auto",
    log: Log | None = None,
    progress: Progress | None = None,
) -> list[RolloutSummary]:
    """Train `model`, write it to `out`, give one summary an update (DPO: a tenth of the steps). What TRL does not measure is None."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers import AutoModelForCausalLM, TrainerCallback

    check_settings(algorithm, settings)
    where = directory_of(model)
    tokenizer = load_tokenizer(where)
    lm: Any = load_checked(AutoModelForCausalLM, where, dtype=resolve_dtype(dtype, where, "training"))
    check_vocabulary(lm, tokenizer)
    lm.to(device())
    torch.manual_seed(seed)
    seen: list[dict[str, float]] = []
    found: list[RolloutSummary] = []

    class Report(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            given = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
            if "loss" in given:
                seen.append(given)
                if len(seen) == each:
                    found.append(_summary(algorithm, len(found), seen, settings, left_out))
                    seen.clear()
                    if log:
                        log(found[-1].numbers(), len(found))
            if progress:
                progress(state.global_step, state.max_steps, {k: given[k] for k in ("reward", "kl") if k in given})

    common: dict[str, Any] = {
        "output_dir": str(out.parent / f".{out.name}.trainer"),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": settings.max_grad_norm,
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
        "beta": settings.kl_coefficient,
    }
    peft = lora_config(lm, adapter, "CAUSAL_LM")
    if algorithm == "dpo":
        rows, left_out = _dpo_rows(comparisons, tokenizer, system, context_limit(lm.config, tokenizer))
        steps = math.ceil(len(rows) / settings.minibatch) * settings.epochs
        each = max(1, steps // 10)
        trainer = _dpo(lm, tokenizer, rows, common, peft, settings, Report())
    else:
        each = settings.epochs * (settings.rollouts // settings.minibatch)
        limit = context_limit(lm.config, tokenizer).less(settings.max_tokens, "the response")

        def row(numbered: tuple[int, Prompt]) -> dict[str, Any]:
            n, p = numbered
            chat_ids(tokenizer, p.prompt, system=system, limit=limit)
            return {"prompt": as_messages(tokenizer, p.prompt, system=system), "number": n}

        rows, left_out = fitting("prompt", enumerate(prompts), row)
        # TRL leaves an incomplete batch of prompts out; a set smaller than one would teach nothing.
        rows *= math.ceil(settings.rollouts / settings.responses_per_prompt / len(rows))
        asked = [p.prompt for p in prompts]
        trainer = _grouped(algorithm, lm, tokenizer, rows, common, peft, settings, asked, reward, each, Report())
    good = watching(trainer)
    trainer.train()
    good.finish()
    if seen:
        found.append(_summary(algorithm, len(found), seen, settings, left_out))
        if log:
            log(found[-1].numbers(), len(found))
    if good.stopped and found:
        found[-1] = found[-1].model_copy(update={"meta": {**found[-1].meta, "stopped": good.stopped}})
    save_merged(trainer.accelerator.unwrap_model(trainer.model), tokenizer, out, base=where)
    return found


def _dpo_rows(
    comparisons: Sequence[Comparison], tokenizer: Any, system: str | None, limit: Limit
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows as TRL takes them, and how many comparisons were left out, by the reason."""
    decided = [c for c in comparisons if c.label not in (None, 0.5)]
    if not decided:
        raise InputError("algorithm: dpo learns from comparisons, and none of these prefers a side")

    def row(c: Comparison) -> dict[str, Any]:
        sides = (c.chosen, c.rejected) if float(c.label or 0) > 0.5 else (c.rejected, c.chosen)
        for side in sides:
            chat_ids(tokenizer, (*c.prompt, *side), system=system, generate=False, limit=limit)
        better, worse = ([{"role": m.role, "content": without_reasoning(m.content)} for m in side] for side in sides)
        return {"prompt": as_messages(tokenizer, c.prompt, system=system), "chosen": better, "rejected": worse}

    return fitting("comparison", decided, row)


def _dpo(
    lm: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    common: dict[str, Any],
    peft: Any,
    settings: PPOSettings,
    report: Any,
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        **common, num_train_epochs=settings.epochs, per_device_train_batch_size=settings.minibatch, max_length=None
    )
    with exact_names():
        trainer = DPOTrainer(
            model=lm, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=peft,
            callbacks=[report],
        )  # fmt: skip
    return without_printers(trainer)


def _grouped(
    algorithm: Algorithm,
    lm: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    common: dict[str, Any],
    peft: Any,
    settings: PPOSettings,
    asked: Sequence[Chat],
    reward: Reward,
    steps_an_update: int,
    report: Any,
) -> Any:
    """asked: the prompts that the rows number. reward: called with conversations, as PPO calls it."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    def of_completions(completions: Sequence[Any], number: Sequence[int], **_: Any) -> list[float]:
        said = [without_reasoning(str(c[-1]["content"])).strip() for c in completions]
        return list(reward([(*asked[n], assistant(text)) for n, text in zip(number, said, strict=True)]))

    kinds: dict[str, tuple[Any, Any]] = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
    config_of, trainer_of = kinds[algorithm]
    config = config_of(
        **common,
        max_steps=settings.updates * steps_an_update,
        per_device_train_batch_size=settings.minibatch,
        generation_batch_size=settings.rollouts,
        num_generations=settings.responses_per_prompt,
        num_iterations=settings.epochs,
        max_completion_length=settings.max_tokens,
        temperature=settings.temperature,
        epsilon=settings.clip,
    )
    with exact_names():
        trainer = trainer_of(
            model=lm, reward_funcs=of_completions, args=config, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, peft_config=peft, callbacks=[report],
        )  # fmt: skip
    return without_printers(trainer)


def _summary(
    algorithm: Algorithm,
    update: int,
    logs: Sequence[Mapping[str, float]],
    settings: PPOSettings,
    left_out: dict[str, int],
) -> RolloutSummary:
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
        kl_coefficient=settings.kl_coefficient,
        ended=None if cut is None else 1 - cut,
        meta={
            "algorithm": algorithm,
            "rollouts": 0 if algorithm == "dpo" else settings.rollouts,
            "prompt_tokens": 0,
            "left_out": left_out,
            **{name: mean(name) for name in ("rewards/margins", "rewards/accuracies") if mean(name) is not None},
        },
    )
