"""The settings of a judge, and of the training of a feedback model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from solon.engines.sampling import SamplingSettings
from solon.settings import Epochs, LearningRate, Settings
from solon.training.settings import TrainSettings

Scale = Literal["levels", "broken"]


class JudgeSettings(Settings):
    """How a judge is asked: by every stage of a run, and by `solon label`."""

    question: str | None = None
    """One question instead of the constitution's comparison questions (RLAIF without principles)."""
    principles_per_pair: int | None = Field(1, ge=1)
    """Principles that each pair is judged under, drawn by the seed and their weights; null: all of them."""
    together: bool = False
    """Ask about a pair's principles in one question instead of one question each."""
    soft_labels: bool = True
    """Label with the judge's probability; false: 1 or 0, and 0.5 where the two orders contradict each other."""
    rationales: int = Field(0, ge=0)
    """Chain of thought: how many rationales to sample per order, whose probabilities are averaged; 0 answers at once."""
    # Bai et al. 2022, section 4.1, found 40 to 60 % best: after a chain of thought the probability is near 0 or 1.
    clamp: tuple[float, float] = (0.4, 0.6)
    """Bounds that the probability is held inside after a chain of thought."""
    rationale_sampling: SamplingSettings = SamplingSettings(max_tokens=160)
    """How rationales are sampled."""
    few_shot: int = Field(0, ge=0)
    """How many labelled comparisons to show the judge before each question."""
    scale: Scale = "levels"
    """Ratings of single responses: `levels` is 1 to 10; `broken` asks whether the response breaks the principle."""

    @model_validator(mode="after")
    def _clamp_holds_a_half(self) -> JudgeSettings:
        low, high = self.clamp
        if not 0 <= low <= 0.5 <= high <= 1:
            raise ValueError(f"clamp: {low:g} to {high:g} must hold 0.5 between 0 and 1, as [0.4, 0.6] does")
        return self


class FeedbackTrainSettings(TrainSettings):
    """How a small model is trained to judge."""

    epochs: Epochs = 1
    """How often the training goes over its comparisons."""
    batch_size: int = Field(4, ge=1)
    """Comparisons per optimiser step; each is learned in both orders."""
    learning_rate: LearningRate = 5e-4
    """The highest learning rate; it rises to it in a short warm-up and falls to zero along a cosine."""
    max_length: int = Field(640, ge=16, le=1_000_000)
    """Tokens of a question at most. Longer comparisons are left out, and counted."""
