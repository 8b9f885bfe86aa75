"""The settings that every training has, and the types of the callbacks that follow a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import Field

from solon.settings import Epochs, LearningRate, Settings

Progress = Callable[[int, int, dict[str, float]], None]  # steps done, steps in all, numbers to show by name
Log = Callable[[Mapping[str, float], int], None]  # numbers by name, and the step


class TrainSettings(Settings):
    epochs: Epochs = 2
    """How often the training goes over its data."""
    batch_size: int = Field(8, ge=1)
    """Examples per optimiser step."""
    learning_rate: LearningRate = 2e-4
    """The highest learning rate. The rate rises to it in a short warm-up, then falls to zero along a cosine."""
    max_length: int = Field(512, ge=16, le=1_000_000)
    """Tokens of an example at most. Longer examples are left out, and counted."""
