"""Training stops where a loss or a gradient is no finite number, and goes back to the last weights that were good.

Weights are good where the loss they gave and its gradient were finite. Those of the latest such step are kept beside the
model: after a step too far it is they that are written, and where there are none (the very first loss was not finite)
nothing is written.
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
    """The trained parameters, as they were when a loss and its gradient were last finite."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.kept: list[Tensor] | None = None
        self.steps = 0  # optimiser steps from weights that were good
        self.stopped: str | None = None  # why training ended early, in one line

    def check(self, loss: float, norm: Any = None) -> bool:
        """Whether a step may be made from here. Keeps the parameters where it may; goes back, and says so, where not.

        norm: of the gradient; None: it is computed. Raises Diverged where there is nothing to go back to.
        """
        if norm is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        size = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        what = "loss" if not math.isfinite(loss) else "gradient" if not math.isfinite(size) else None
        if self._somewhere(what is not None):
            self._go_back(what or "loss")
            return False
        self.keep()
        self.steps += 1
        return True

    def keep(self) -> None:
        """Take the parameters for good as they are."""
        if self.kept is None:
            self.kept = [torch.empty_like(p) for p in self.parameters]
        with torch.no_grad():
            for good, p in zip(self.kept, self.parameters, strict=True):
                good.copy_(p)

    def finish(self) -> bool:
        """After steps: whether their weights are finite. Goes back where they are not."""
        bad = not_finite((str(i), _local(p)) for i, p in enumerate(self.parameters))
        if self._somewhere(bool(bad)):
            self._go_back("weight")
            return False
        return True

    def _go_back(self, what: str) -> None:
        self.stopped = (
            f"training stopped after {self.steps} steps: a {what} is no finite number; the weights are those from before the "
            "last of these steps; a lower learning rate may help"
        )
        if self.kept is None:
            raise Diverged(
                f"the first {what} of the training is no finite number; nothing is written; look at the data, or train "
                "in float32"
            )
        with torch.no_grad():
            for p, good in zip(self.parameters, self.kept, strict=True):
                p.copy_(good)
        if distributed.is_main():
            note(self.stopped)

    @staticmethod
    def _somewhere(bad: bool) -> bool:
        """Whether it is so in any of the processes that train together."""
        return distributed.all_reduce_number(float(bad)) > 0


def _local(parameter: Tensor) -> Tensor:
    """This process's share of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
