"""What the training stages (SFT, feedback model, reward model, PPO) share: settings, adapters, a loop, saving."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from solon import processes
from solon.adapted import in_few_passes
from solon.engines.loading import listed, load_checked, not_finite
from solon.engines.tree import parts_of
from solon.errors import Diverged, InputError, Unfit, printable
from solon.finite import LastGood
from solon.models.lora import check_adapted, exact_names, linear_layers, lora_config
from solon.models.paths import paths_of
from solon.publishing import new_directory, publish
from solon.settings import Epochs, LearningRate, Settings
from solon.sharding import is_shared
from solon.states import base_of

R = TypeVar("R")
T = TypeVar("T")
TOKENS_AT_ONCE = 1280  # distinct tokens of a pass that learns; activations are 1 to 2 MB a token in a model of 135M
Progress = Callable[[int, int, dict[str, float]], None]  # step, steps, what to show


class TrainSettings(Settings):
    epochs: Epochs = 2
    batch_size: int = Field(8, ge=1)
    learning_rate: LearningRate = 2e-4
    max_length: int = Field(512, ge=16, le=1_000_000)  # tokens; longer examples are left out, and counted


class AdapterSettings(Settings):
    """LoRA (Hu et al. 2021) on every linear layer of the top `layers` blocks."""

    rank: int = Field(16, ge=1, le=4096)
    alpha: int = Field(32, ge=1, le=65536)
    layers: int | None = Field(None, ge=1)  # None: all. Fewer train faster: nothing below them needs a gradient


def fitting(kind: str, items: Iterable[T], encode: Callable[[T], R]) -> tuple[list[R], dict[str, int]]:
    """What `encode` makes of the items, and how many were left out, by the reason: those it raises Unfit for.

    kind: what an item is called. Raises InputError where none is left.
    """
    made: list[R] = []
    left_out: Counter[str] = Counter()
    first: Unfit | None = None
    for item in items:
        try:
            made.append(encode(item))
        except Unfit as error:
            first = first or error
            left_out[error.reason] += 1
    if not made:
        told = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "there was none"
        raise InputError(f"no {kind} is left to learn from: {told}" + (f"; the first: {first}" if first else ""))
    return made, dict(left_out)


def add_adapters(model: Any, settings: AdapterSettings, task: str = "CAUSAL_LM") -> Any:
    """The model with trainable adapters (float32, whatever the trunk's dtype); all else is frozen.

    Raises InputError where other layers were adapted than was asked for.
    """
    from peft import get_peft_model

    paths_of(model)  # proved without adapters
    asked = linear_layers(model, settings.layers)
    try:
        with exact_names():
            adapted = get_peft_model(model, lora_config(model, settings, task))
    except ValueError as error:  # PEFT knows layers whose adapters would do nothing
        raise InputError(f"{type(model).__name__}: no adapters can be put on it: {printable(str(error))}") from error
    check_adapted(adapted, asked)
    return in_few_passes(adapted)


@dataclass(frozen=True)
class Fitted:
    losses: list[float]  # of each step
    stopped: str | None = None  # why training ended before its last step

    def to_json(self) -> dict[str, Any]:
        """What a training tells of its losses."""
        return {**first_and_last(self.losses), **({"stopped": self.stopped} if self.stopped else {})}


def fit(
    rows: Sequence[R],
    loss: Callable[[Sequence[R]], Tensor],
    parameters: list[dict[str, Any]],
    *,
    settings: TrainSettings,
    tokens: Callable[[R], int],
    weight: Callable[[R], float] = lambda _: 1.0,
    seed: int,
    progress: Progress | None,
) -> Fitted:
    """The optimisation loop that the reward model and the feedback model share.

    loss: the mean over the rows it is given, by their weight. tokens: what a row brings to a forward pass. Batches hold
    rows of like length in an order drawn by the seed; a batch goes through the model in parts, so that memory does not
    grow with it. AdamW, a short warm-up and a cosine down to zero, gradients clipped to norm 1.
    """
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    every = [p for group in parameters for p in group["params"]]
    total = math.ceil(len(rows) / settings.batch_size) * settings.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (0.1 * total), 0.5 * (1 + math.cos(math.pi * step / total)))
    )
    sizes = [tokens(r) for r in rows]
    losses: list[float] = []
    good = LastGood(every)
    for batch in _batches(sizes, settings, seed):
        optimiser.zero_grad()
        value, whole = 0.0, sum(weight(rows[i]) for i in batch)
        own = [batch[i] for i in processes.mine(len(batch))]
        parts = [[rows[own[i]] for i in places] for places in parts_of([sizes[i] for i in own], TOKENS_AT_ONCE)]
        for part, counts in processes.turns(parts, [rows[batch[0]]], processes.sharded()):
            share = loss(part) * (counts * sum(map(weight, part)) / whole)
            share.backward()  # type: ignore[no-untyped-call]
            value += share.item()
        processes.sum_gradients(every)
        value = processes.total(value)
        if not good.check(value, torch.nn.utils.clip_grad_norm_(every, 1.0)):
            break
        optimiser.step()
        schedule.step()
        losses.append(value)
        if progress:
            progress(len(losses), total, {"loss": losses[-1]})
    else:
        good.finish()
    return Fitted(losses, good.stopped)


def _batches(sizes: Sequence[int], settings: TrainSettings, seed: int) -> Iterator[list[int]]:
    """Indices of rows, of each epoch all: rows of like size together, in an order drawn by the seed."""
    rng = random.Random(seed)
    for _ in range(settings.epochs):
        order = sorted(range(len(sizes)), key=lambda i: sizes[i] * rng.uniform(0.8, 1.25))
        batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
        rng.shuffle(batches)
        yield from batches


def first_and_last(losses: Sequence[float]) -> dict[str, float]:
    """Mean loss of the first and of the last tenth of the steps."""
    tenth = max(1, len(losses) // 10)
    return {"loss_first": sum(losses[:tenth]) / tenth, "loss_last": sum(losses[-tenth:]) / tenth}


def save_merged(
    model: Any, tokenizer: Any, out: Path, base: str | None, also: Callable[[Path], None] | None = None
) -> None:
    """Write a complete model directory; a half-written one is never taken for whole.

    base: where the frozen weights came from. Adapters are merged into them, float32 ones in place (the model is used up),
    others, and where processes share the weights, in a float32 copy: a small change added to bfloat16 weights would be
    rounded away. also: writes what else belongs into the directory. Of several processes the first one writes.
    """
    if processes.is_main():
        _save_merged(model, tokenizer, out, base, also)
    processes.wait()


def _save_merged(model: Any, tokenizer: Any, out: Path, base: str | None, also: Callable[[Path], None] | None) -> None:
    from peft import PeftModel

    aside = new_directory(out)
    try:
        if base is not None and base_of(model).dtype == torch.float32 and not is_shared(model):
            model = model.merge_and_unload()
        elif base is not None:
            model.save_pretrained(aside / "adapter")
            kind = type(model.get_base_model())
            options: dict[str, Any] = {}
            if "SequenceClassification" in kind.__name__:
                options = {"num_labels": 1, "new": ["score.weight"], "extra": ["lm_head."]}
            whole = load_checked(kind, base, dtype=torch.float32, **options)
            whole.config.pad_token_id = tokenizer.pad_token_id
            with exact_names():
                model = PeftModel.from_pretrained(whole, str(aside / "adapter")).merge_and_unload()
            shutil.rmtree(aside / "adapter")
        if bad := not_finite(model.state_dict().items()):
            raise Diverged(f"{out}: not written, since not every number in its weights is finite: {listed(bad)}")
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if also:
            also(aside)
        _published_or_kept(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _published_or_kept(aside: Path, out: Path) -> None:
    """Put the finished model in its place; where that fails, keep it beside `out` and say where."""
    try:
        publish(aside, out)
    except (InputError, OSError) as error:
        if not aside.is_dir():  # it is on its way: the next start ends it
            raise
        kept = Path(tempfile.mkdtemp(prefix=f"{out.name}.finished-", dir=out.parent))
        os.rename(aside, kept)
        told = f"the finished model is kept in {kept}"
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror or error}; {told}", error.filename) from error
        raise InputError(f"{error}; {told}") from error


def give_memory_back(*, cycles: bool = True) -> None:
    """Return freed memory to the system: glibc keeps what one step used and the next adds its own.

    cycles: look for objects that hold each other first, as a trained model's do; that takes tenths of a second.
    """
    if cycles:
        gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
