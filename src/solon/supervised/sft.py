"""Supervised fine-tuning with TRL's SFTTrainer and PEFT LoRA (or all weights, by a switch).

The trainer is given token ids and labels that Solon made: the loss falls on the assistant's turns only, their
end-of-turn token included, masked by position and never by pad id (pad = eos would mask the stop token), and text
that people or models wrote cannot turn into control tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solon import distributed
from solon.errors import InputError, Unfit
from solon.models.chat.encode import chat_ids_and_turns
from solon.models.chat.limits import UNLIMITED, Limit, context_limit
from solon.models.chat.reasoning import without_reasoning
from solon.models.head import head_of, logprobs_and_entropy
from solon.models.lora import add_adapters
from solon.models.passes import lay_out
from solon.models.settings import AdapterSettings
from solon.models.weights import load_causal_lm, resolve
from solon.records import SFTExample
from solon.training.loop import Losses, encode_all
from solon.training.saving import save_merged
from solon.training.settings import Progress, TrainSettings
from solon.training.trl_trainers import run_trainer, trainer_config

IGNORE = -100  # torch's and transformers' label for "no loss here"


def encode(
    tokenizer: Any, example: SFTExample, *, system: str | None, limit: Limit = UNLIMITED
) -> dict[str, list[int]]:
    """input_ids and labels of one example, up to the last learned token: what follows it teaches nothing.

    Raises Unfit where a learned answer would end beyond the limit (cut, it would teach not to stop), where there is no
    answer, or where the chat template cannot render the conversation.
    """
    ids, spans = chat_ids_and_turns(tokenizer, example.messages, system=system, limit=limit)
    turns = example.train_turns
    if turns is None:
        turns = tuple(i for i, m in enumerate(example.messages) if m.role == "assistant")[-1:]
    labels = [IGNORE] * len(ids)
    last = 0
    for turn in turns:
        if not without_reasoning(example.messages[turn].content).strip():
            continue
        start, stop = spans[turn]
        labels[start:stop] = ids[start:stop]
        last = max(last, stop)
    if not last:
        raise Unfit("no assistant's turn says anything to learn", "no answer to learn")
    limit.check(last)
    return {"input_ids": ids[:last], "labels": labels[:last]}


def answer_loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the learned tokens, nats. inputs: input_ids, attention_mask, labels, (batch, length).

    Of several processes each gives its part of the mean over all of their tokens.
    """
    rows, target = [], []
    for ids, mask, labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
        rows.append(ids[mask.bool()].tolist())
        target.append(labels[mask.bool()][1:])
    layout = lay_out(model, rows, pad=0)
    hidden, wanted = (
        layout.gather(layout.hidden_states(model), [range(len(row) - 1) for row in rows]),
        torch.cat(target),
    )
    learned = wanted != IGNORE
    head = head_of(model)
    logprobs, _ = logprobs_and_entropy(hidden[learned], head, wanted[learned], temperature=1.0, entropy=False)
    return -logprobs.sum() / distributed.all_reduce_number(float(learned.sum()))


def sft(
    examples: Sequence[SFTExample],
    model: str,
    out: Path,
    *,
    settings: TrainSettings,
    adapter: AdapterSettings | None,
    system: str | None,
    seed: int = 0,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fine-tune `model` (anything --model takes, less servers) on `examples`; write a complete model to `out`.

    adapter: None trains all weights. progress(step, steps, {"loss": nats per token}).
    Returns counts, tokens and the mean loss of the first and last tenth of the steps.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class AnswerTrainer(SFTTrainer):  # type: ignore[misc]
        """SFTTrainer whose loss computes scores over the vocabulary for the learned tokens alone.

        The same mean cross-entropy; TRL's own tiles are float32, which on a CPU took half of the time of a step.
        """

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            # The trainer sets training mode before each step; dropout would make the model that learns another one.
            return answer_loss(self.accelerator.unwrap_model(model).eval(), inputs)

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            """The loss goes past DistributedDataParallel, which then sums nothing; so it is done here."""
            loss = super().training_step(model, *args, **kwargs)
            distributed.all_reduce_gradients(model.parameters())
            return (
                loss * distributed.world_size()
            )  # the trainer logs the mean over processes, and these are parts of a sum

    lm, tokenizer = load_causal_lm(model, dtype=dtype if adapter else "float32", learns=adapter is not None)
    limit = context_limit(lm.config, tokenizer).at_most(settings.max_length, "max_length")
    rows, left_out = encode_all("example", examples, lambda e: encode(tokenizer, e, system=system, limit=limit))
    torch.manual_seed(seed)
    if adapter:
        lm = add_adapters(lm, adapter)
    if distributed.is_sharded():  # DistributedDataParallel takes no shares; what it would do, training_step does
        lm._is_accelerate_prepared = True
    losses: list[float] = []

    class Report(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs and math.isfinite(float(logs["loss"])):
                losses.append(float(logs["loss"]))
                if progress:
                    progress(state.global_step, state.max_steps, {"loss": losses[-1]})

    if settings.batch_size % distributed.world_size():
        raise InputError(f"--batch-size {settings.batch_size} cannot be shared by {distributed.world_size()} processes")
    steps = math.ceil(len(rows) / settings.batch_size) * settings.epochs
    config = trainer_config(
        SFTConfig,
        out,
        seed,
        per_device_train_batch_size=settings.batch_size // distributed.world_size(),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.05 * steps),  # of a single step it would make a learning rate of 0
        max_length=None,
        train_sampling_strategy="group_by_length",
    )
    trainer = AnswerTrainer(
        model=lm,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Report()],
    )
    stopped = run_trainer(trainer)
    save_merged(trainer.model, tokenizer, out, base=resolve(model) if adapter else None)
    return {
        "examples": len(rows),
        "left_out": left_out,
        "steps": len(losses),
        "tokens": settings.epochs * sum(len(r["input_ids"]) for r in rows),
        "learned_tokens": settings.epochs * sum(sum(x != IGNORE for x in r["labels"]) for r in rows),
        **Losses(losses, stopped).to_json(),
    }
