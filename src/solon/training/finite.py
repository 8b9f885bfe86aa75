"""A training stops at a loss or gradient that is not finite, and goes back to its last good weights.

Weights are good where their loss and its gradient were finite. After a step that went too far, the last good weights are
written. If the very first loss is not finite, there are no good weights, and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from solon import distributed
from solon.errors import Diverged
from solon.models.loading import not_finite
from solon.terminal import note


class LastGood:
    """The trained parameters, and a copy of the last good ones. Of several processes, all go back where one has to."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.copies: list[Tensor] | None = None
        self.steps = 0  # optimiser steps that started from good weights
        self.stopped: str | None = None  # why training ended early, in one line

    def check(self, loss: float, norm: Any = None) -> bool:
        """Whether the loss and the gradient are finite. If so, the parameters are copied; if not, the copy comes back.

        norm: the norm of the gradient; None: it is computed here. Raises Diverged where there is no copy yet.
        """
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        bad = "loss" if not math.isfinite(loss) else "gradient" if not math.isfinite(norm) else None
        if self._go_back_from(bad, default="loss"):
            return False
        self.keep()
        self.steps += 1
        return True

    def keep(self) -> None:
        """Copy the parameters as they are now."""
        if self.copies is None:
            self.copies = [torch.empty_like(p) for p in self.parameters]
        _copy(self.parameters, self.copies)

    def finish(self) -> bool:
        """After the last step: whether the parameters are finite. If not, the copy comes back."""
        local = (p.to_local() if hasattr(p, "to_local") else p for p in self.parameters)
        bad = not_finite((str(i), p) for i, p in enumerate(local))
        return not self._go_back_from("weight" if bad else None, default="weight")

    def _go_back_from(self, bad: str | None, default: str) -> bool:
        """Go back where any process has a bad number, and say whether one has. bad: its kind; default: another process's."""
        if not distributed.all_reduce_number(float(bad is not None)):
            return False
        bad = bad or default
        if self.copies is None:
            raise Diverged(
                f"the first {bad} of the training is not finite, and nothing is written; check the data, or train in float32"
            )
        self.stopped = (
            f"training stopped after {self.steps} steps because a {bad} is not finite; the weights are those from before "
            "the last of these steps; a lower learning rate may help"
        )
        _copy(self.copies, self.parameters)
        if distributed.is_main():
            note(self.stopped)
        return True


@torch.no_grad()
def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    for old, new in zip(source, target, strict=True):
        new.copy_(old)
