"""The settings that every training has, and the types of the callbacks that follow a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import Field

from solon.settings import Epochs, LearningRate, Passes, Settings

Progress = Callable[[int, int, dict[str, float]], None]  # steps done, steps in all, numbers to show by name
Log = Callable[[Mapping[str, float], int], None]  # numbers by name, and the step


class TrainSettings(Settings):
    epochs: Passes = 2
    """How often the training goes over its data; 0.5: over half of the data, drawn by the seed."""
    batch_size: int = Field(8, ge=1)
    """Examples per optimiser step."""
    learning_rate: LearningRate = 2e-4
    """The highest learning rate. The rate rises to it in a short warm-up, then falls to zero along a cosine."""
    max_length: int = Field(512, ge=16, le=1_000_000)
    """Tokens of an example at most. Longer examples are left out, and counted."""
    opening_tokens: int = Field(0, ge=0, le=1_000_000)
    """Before whole answers, train on the first tokens of each answer alone, this many; 0: do not. The first tokens decide
    whether a request is declined. Among all tokens of whole answers they are learned slowly. Examples that teach several turns, as
    critique and revision do, are learned whole only."""
    opening_epochs: Epochs = 3
    """How often the training goes over the first tokens."""
    opening_batch_size: int | None = Field(None, ge=1)
    """Examples per optimiser step while the first tokens are learned; null: batch_size."""

    @property
    def opening(self) -> TrainSettings | None:
        """The settings of the training on the first tokens; None where there is no such training."""
        if not self.opening_tokens:
            return None
        size = self.opening_batch_size or self.batch_size
        return self.model_copy(update={"epochs": self.opening_epochs, "batch_size": size, "opening_tokens": 0})
