"""What the training stages (SFT, feedback model, reward model, PPO) share: settings, adapters, a loop, saving."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from solon import distributed
from solon.errors import InputError, Unfit
from solon.models.batching import split_by_size
from solon.models.passes import TOKENS_AT_ONCE
from solon.training.finite import LastGood
from solon.training.settings import Progress, TrainSettings

R = TypeVar("R")
T = TypeVar("T")


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
        own = [batch[i] for i in distributed.local_indices(len(batch))]
        parts = [[rows[own[i]] for i in places] for places in split_by_size([sizes[i] for i in own], TOKENS_AT_ONCE)]
        for part, counts in distributed.synchronised_steps(parts, [rows[batch[0]]], distributed.is_sharded()):
            share = loss(part) * (counts * sum(map(weight, part)) / whole)
            share.backward()  # type: ignore[no-untyped-call]
            value += share.item()
        distributed.all_reduce_gradients(every)
        value = distributed.all_reduce_number(value)
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
