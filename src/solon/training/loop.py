"""The optimisation loop of the feedback model and the reward model, and the encoding of training data."""

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


def encode_all(kind: str, items: Iterable[T], encode: Callable[[T], R]) -> tuple[list[R], dict[str, int]]:
    """The encoded items, and for each reason how many items were left out: those for which `encode` raises Unfit.

    kind: the noun for one item in the error message. Raises InputError where every item is left out.
    """
    encoded: list[R] = []
    left_out: Counter[str] = Counter()
    first: Unfit | None = None
    for item in items:
        try:
            encoded.append(encode(item))
        except Unfit as error:
            first = first or error
            left_out[error.reason] += 1
    if not encoded:
        reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "there was none"
        raise InputError(f"no {kind} is left to learn from: {reasons}" + (f"; the first: {first}" if first else ""))
    return encoded, dict(left_out)


@dataclass(frozen=True)
class Losses:
    """The losses of a training, one per optimiser step."""

    values: list[float]
    stopped: str | None = None  # why training ended before its last step
    opening: Losses | None = None  # of the training on the first tokens, where there was one

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        return len(self.values) + (self.opening.steps if self.opening else 0)

    def to_json(self) -> dict[str, Any]:
        """Mean loss of the first tenth and of the last tenth of the steps, and why training ended early, if it did."""
        tenth = max(1, len(self.values) // 10)
        means = {"loss_first": sum(self.values[:tenth]) / tenth, "loss_last": sum(self.values[-tenth:]) / tenth}
        opening = {"opening": self.opening.to_json()} if self.opening else {}
        return {**means, **opening, **({"stopped": self.stopped} if self.stopped else {})}


def in_whole_epochs(rows: Sequence[R], settings: TrainSettings, seed: int) -> tuple[list[R], TrainSettings]:
    """The rows to go over, and the settings with a whole number of epochs: for 0.5 epochs a random half of the rows, once."""
    whole = int(settings.epochs)
    if whole == settings.epochs:
        return list(rows), settings
    part = random.Random(seed).sample(range(len(rows)), max(1, round((settings.epochs - whole) * len(rows))))
    return [*rows] * whole + [rows[i] for i in sorted(part)], settings.model_copy(update={"epochs": 1})


def all_passes(rows: Sequence[R], settings: TrainSettings, seed: int) -> list[R]:
    """The rows of all epochs, each row as often as the training meets it whole."""
    drawn, whole = in_whole_epochs(rows, settings, seed)
    return drawn * int(whole.epochs)


def learned_rows(
    rows: Sequence[R], settings: TrainSettings, seed: int, opens: Callable[[R], bool] = lambda _: True
) -> list[R]:
    """The rows that the training meets at all, whole or as first tokens, each once. opens: whether a row's first tokens are learned."""
    if settings.epochs >= 1:
        return list(rows)
    whole = {id(row) for row in in_whole_epochs(rows, settings, seed)[0]}
    return [row for row in rows if id(row) in whole or (settings.opening_tokens and opens(row))]


def steps_of(settings: TrainSettings, rows: Sequence[Any]) -> int:
    """Optimiser steps of a training on these rows."""
    drawn, settings = in_whole_epochs(rows, settings, seed=0)
    return math.ceil(len(drawn) / settings.batch_size) * int(settings.epochs)


def from_step(progress: Progress | None, done: int, more: int) -> Progress | None:
    """A progress that counts `done` steps before its own and `more` after them; None where there is none to show."""
    return progress and (lambda step, total, shown: progress(done + step, done + total + more, shown))


def fit_in_parts(
    rows: Sequence[R],
    cut: Callable[[R], R],
    loss: Callable[[Sequence[R]], Tensor],
    parameters: Callable[[], list[dict[str, Any]]],
    *,
    settings: TrainSettings,
    progress: Progress | None,
    **options: Any,
) -> Losses:
    """`fit` on the openings of the rows, where the settings ask for it, and then on the rows. cut: makes a row's opening."""
    opening = settings.opening
    if opening is None:
        return fit(rows, loss, parameters(), settings=settings, progress=progress, **options)
    done, more = steps_of(opening, rows), steps_of(settings, rows)
    shown = from_step(progress, 0, more)
    first = fit([cut(row) for row in rows], loss, parameters(), settings=opening, progress=shown, **options)
    if first.stopped:
        return Losses(first.values, first.stopped)
    whole = fit(rows, loss, parameters(), settings=settings, progress=from_step(progress, done, 0), **options)
    return Losses(whole.values, whole.stopped, first)


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
) -> Losses:
    """Train the parameters: AdamW, a short warm-up, a cosine to zero, gradients clipped to norm 1.

    loss: the mean over the rows that it gets, each with its weight. parameters: AdamW's parameter groups. tokens: how many
    tokens a row adds to a forward pass. A batch holds rows of similar length, and the seed draws the order. A batch goes
    through the model in parts, so that memory does not grow with the batch size. Raises Diverged where the first loss or
    gradient is not finite.
    """
    rows, settings = in_whole_epochs(rows, settings, seed)
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    trained = [p for group in parameters for p in group["params"]]
    total = steps_of(settings, rows)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (0.1 * total), 0.5 * (1 + math.cos(math.pi * step / total)))
    )
    sizes = [tokens(r) for r in rows]
    losses: list[float] = []
    good = LastGood(trained)
    for batch in _batches(sizes, settings, seed):
        optimiser.zero_grad()
        batch_loss, batch_weight = 0.0, sum(weight(rows[i]) for i in batch)
        local = [batch[i] for i in distributed.local_indices(len(batch))]
        parts = [[rows[local[i]] for i in part] for part in split_by_size([sizes[i] for i in local], TOKENS_AT_ONCE)]
        for part, counts in distributed.synchronised_steps(parts, [rows[batch[0]]], distributed.is_sharded()):
            part_loss = loss(part) * (counts * sum(map(weight, part)) / batch_weight)
            part_loss.backward()  # type: ignore[no-untyped-call]
            batch_loss += part_loss.item()
        distributed.all_reduce_gradients(trained)
        batch_loss = distributed.all_reduce_number(batch_loss)
        if not good.check(batch_loss, torch.nn.utils.clip_grad_norm_(trained, 1.0)):
            break
        optimiser.step()
        schedule.step()
        losses.append(batch_loss)
        if progress:
            progress(len(losses), total, {"loss": batch_loss})
    else:
        good.finish()
    return Losses(losses, good.stopped)


def _batches(sizes: Sequence[int], settings: TrainSettings, seed: int) -> Iterator[list[int]]:
    """Indices of rows, batch by batch. Every epoch holds each row once; rows of similar size share a batch."""
    rng = random.Random(seed)
    for _ in range(int(settings.epochs)):
        order = sorted(range(len(sizes)), key=lambda i: sizes[i] * rng.uniform(0.8, 1.25))
        batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
        rng.shuffle(batches)
        yield from batches
