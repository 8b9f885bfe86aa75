"""Supervised fine-tuning with TRL's SFTTrainer and PEFT LoRA, or of all weights.

Solon gives the trainer token ids and labels. The loss falls on the assistant's turns only, with the end-of-turn token. The
labels are masked by position and never by the padding id: where the padding token is the end-of-turn token, a mask by id would
hide the end of the turn. Text that people or models wrote cannot become a control token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solon import distributed
from solon.errors import InputError, Unfit
from solon.models.chat.encode import chat_ids_and_turns, end_ids
from solon.models.chat.limits import UNLIMITED, Limit, context_limit
from solon.models.chat.reasoning import without_reasoning
from solon.models.head import head_of, logprobs_and_entropy
from solon.models.lora import add_adapters
from solon.models.passes import lay_out, stored_lower_blocks
from solon.models.settings import AdapterSettings
from solon.models.weights import load_causal_lm, resolve
from solon.records import CUT_TO_SENTENCE, SFTExample
from solon.training.loop import Losses, encode_all, from_step, in_whole_epochs, learned_rows, steps_of
from solon.training.saving import save_merged
from solon.training.settings import Progress, TrainSettings
from solon.training.trl_trainers import run_trainer, trainer_config

IGNORE = -100  # torch's and transformers' label for "no loss here"


def encode(
    tokenizer: Any, example: SFTExample, *, system: str | None, limit: Limit = UNLIMITED
) -> dict[str, list[int]]:
    """input_ids and labels of one example, up to the last learned token. Later tokens would teach nothing.

    The end of an answer that was cut (`CUT_TO_SENTENCE` in its meta) is not learned: the model would learn to stop there.
    Raises Unfit where a learned answer would end beyond the limit (a cut answer would teach the model not to stop),
    where there is no answer, and where the chat template cannot render the conversation.
    """
    ids, spans = chat_ids_and_turns(tokenizer, example.messages, system=system, limit=limit)
    turns = example.train_turns
    if turns is None:
        turns = tuple(i for i, m in enumerate(example.messages) if m.role == "assistant")[-1:]
    labels = [IGNORE] * len(ids)
    last = 0
    for turn in turns:
        if without_reasoning(example.messages[turn].content).strip():
            start, stop = spans[turn]
            if example.meta.get(CUT_TO_SENTENCE) and ids[stop - 1] in end_ids(tokenizer):
                stop -= 1
            labels[start:stop] = ids[start:stop]
            last = max(last, stop)
    if not last:
        raise Unfit("no assistant's turn says anything to learn", "no answer to learn")
    limit.check(last)
    return {"input_ids": ids[:last], "labels": labels[:last]}


def openings(rows: Sequence[dict[str, list[int]]], n: int) -> list[dict[str, list[int]]]:
    """The rows up to the first n tokens of their first learned turn.

    Whether an answer declines is decided in its first tokens (Qi et al. 2025, arXiv 2406.05946). In a mean over whole answers
    these are a few tokens among many, and a small model learns the manner of declining long before the cases to decline.
    """
    return [{name: values[: _start(row) + n] for name, values in row.items()} for row in rows]


def _opens(encoded: tuple[SFTExample, dict[str, list[int]]]) -> bool:
    """Whether the first tokens of the example are learned by themselves: several turns, as critique and revision, decline nothing."""
    turns = encoded[0].train_turns
    return turns is None or len(turns) == 1


def _start(row: dict[str, list[int]]) -> int:
    """The index of the first learned token."""
    return next(i for i, label in enumerate(row["labels"]) if label != IGNORE)


def answer_loss(model: Any, inputs: dict[str, Tensor], lower: Any = None) -> Tensor:
    """Mean cross-entropy of the learned tokens, nats. inputs: input_ids, attention_mask, labels, (batch, length).

    lower: lower blocks that keep the rows (`passes.stored_lower_blocks`); None: all blocks are computed.
    With several processes, each process gives its part of the mean over the tokens of all processes.
    """
    rows, labels = [], []
    for row_ids, mask, row_labels in zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True):
        rows.append(row_ids[mask.bool()].tolist())
        labels.append(row_labels[mask.bool()][1:])
    layout = lay_out(model, rows, pad=0)
    states = lower.hidden_states(layout, rows) if lower else layout.hidden_states(model)
    hidden = layout.gather(states, [range(len(row) - 1) for row in rows])
    targets = torch.cat(labels)
    learned = targets != IGNORE
    head = head_of(model)
    logprobs, _ = logprobs_and_entropy(hidden[learned], head, targets[learned], temperature=1.0, entropy=False)
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
    learned: Callable[[list[SFTExample]], None] | None = None,
    opening_examples: Sequence[SFTExample] = (),
) -> dict[str, Any]:
    """Fine-tune `model` (a value of --model that runs in this process) on `examples`; write a complete model to `out`.

    adapter: None trains all weights. progress: called with (step, steps, {"loss": nats per token}). learned: called
    before the training with the examples that it learns, which are the examples without those left out. opening_examples: more
    examples, of which the first tokens alone are learned, as `settings.opening` says.
    Returns counts, tokens and the mean loss of the first and last tenth of the steps. Raises InputError where no example
    is left, or where the processes cannot share the batch.
    """
    lm, tokenizer = load_causal_lm(model, dtype=dtype if adapter else "float32", learns=adapter is not None)
    limit = context_limit(lm.config, tokenizer).at_most(settings.max_length, "max_length")
    everything = [*examples, *opening_examples] if settings.opening else examples
    found, left_out = encode_all("example", everything, lambda e: (e, encode(tokenizer, e, system=system, limit=limit)))
    alone = {id(e) for e in opening_examples}
    encoded = [pair for pair in found if id(pair[0]) not in alone]
    only_opened = [pair for pair in found if id(pair[0]) in alone]
    if not encoded:
        raise InputError("no example is left to learn whole: each was left out")
    drawn, whole = in_whole_epochs(encoded, settings, seed)
    torch.manual_seed(seed)
    if adapter:
        lm = add_adapters(lm, adapter)
    if distributed.is_sharded():  # DistributedDataParallel takes no shards; `training_step` sums the gradients
        lm._is_accelerate_prepared = True
    opening = settings.opening
    opened = [row for _, row in [*filter(_opens, encoded), *only_opened]] if opening else []
    parts = [(opening, openings(opened, settings.opening_tokens))] if opening and opened else []
    parts += [(whole, [row for _, row in drawn])]
    taught = [example for example, _ in [*learned_rows(encoded, settings, seed, _opens), *only_opened]]
    processes = distributed.world_size()
    for part, _ in parts:
        if part.batch_size % processes:
            raise InputError(f"--batch-size {part.batch_size} cannot be shared by {processes} processes")
    if learned:
        learned(taught)
    lower = stored_lower_blocks(
        lm, sum(len(row["input_ids"]) for _, part in parts for row in part), tokenizer.pad_token_id
    )
    steps = [steps_of(part, part_rows) for part, part_rows in parts]
    first: Losses | None = None
    for n, (part, part_rows) in enumerate(parts):
        losses: list[float] = []
        shown = from_step(progress, sum(steps[:n]), sum(steps[n + 1 :]))
        trainer = _trainer(lm, tokenizer, part_rows, out, part, seed, losses, shown, lower)
        result = Losses(losses, run_trainer(trainer), first)
        lm = trainer.model
        if result.stopped:
            break
        first = result
    save_merged(lm, tokenizer, out, base=resolve(model) if adapter else None)
    return {
        "examples": len(taught),
        "left_out": left_out,
        "steps": result.steps,
        "tokens": sum(int(part.epochs) * sum(len(r["input_ids"]) for r in part_rows) for part, part_rows in parts),
        "learned_tokens": sum(int(part.epochs) * sum(map(_learned, part_rows)) for part, part_rows in parts),
        **result.to_json(),
    }


def _learned(row: dict[str, list[int]]) -> int:
    """The number of learned tokens."""
    return sum(label != IGNORE for label in row["labels"])


def _trainer(
    lm: Any,
    tokenizer: Any,
    rows: list[dict[str, list[int]]],
    out: Path,
    settings: TrainSettings,
    seed: int,
    losses: list[float],
    progress: Progress | None,
    lower: Any,
) -> Any:
    """TRL's trainer with Solon's loss. The trainer appends the finite losses of its steps to `losses`."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    class AnswerTrainer(SFTTrainer):
        """SFTTrainer whose loss computes scores over the vocabulary for the learned tokens alone.

        The mean cross-entropy is the same. TRL computes tiles of scores in float32, which is slow on a CPU.
        """

        def compute_loss(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
            # The trainer sets training mode before each step. Dropout would train another model than the sampled one.
            return answer_loss(self.accelerator.unwrap_model(model).eval(), inputs, lower)

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            """The loss does not pass through DistributedDataParallel, so the gradients are summed here."""
            loss = super().training_step(model, *args, **kwargs)  # type: ignore[no-untyped-call]
            distributed.all_reduce_gradients(model.parameters())
            return loss * distributed.world_size()  # the trainer logs the mean over processes; the losses are parts

    class Report(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs and math.isfinite(float(logs["loss"])):
                losses.append(float(logs["loss"]))
                if progress:
                    progress(state.global_step, state.max_steps, {"loss": losses[-1]})

    steps = steps_of(settings, rows)
    config = trainer_config(
        SFTConfig,
        out,
        seed,
        per_device_train_batch_size=settings.batch_size // distributed.world_size(),
        num_train_epochs=int(settings.epochs),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.05 * steps),  # the learning rate of the first warm-up step is 0, so short runs have none
        max_length=None,
        train_sampling_strategy="group_by_length",
    )
    return AnswerTrainer(
        model=lm, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Report()]
    )
