"""The settings of a judge, and of the training of a feedback model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from solon.engines.sampling import SamplingSettings
from solon.settings import LearningRate, Passes, Settings
from solon.training.settings import TrainSettings

Scale = Literal["levels", "broken"]
Ask = Literal["pair", "each"]


class JudgeSettings(Settings):
    """How the judge is asked."""

    question: str | None = None
    """One question in place of all comparison questions of the constitution; null: the constitution's questions."""
    principles_per_pair: int | None = Field(1, ge=1)
    """Number of principles that each pair is judged under, drawn by the seed and their weights; null: all principles."""
    ask: Ask = "pair"
    """`pair` shows the judge both responses, in both orders. `each` asks of each response by itself whether it is good, and the
    label is the difference of the two log-odds: for a small model, which can hardly compare two texts."""
    together: bool = False
    """Ask one question that holds all principles of a pair; false: ask one question per principle."""
    soft_labels: bool = True
    """Labels are the judge's probabilities; false: labels are 1 or 0, and 0.5 if the two orders contradict each other."""
    rationales: int = Field(0, ge=0)
    """Number of rationales (chains of thought) per order. Their probabilities are averaged; 0: answer without a rationale."""
    # Bai et al. 2022, section 4.1, found 40 to 60 % best: after a chain of thought the probability is near 0 or 1.
    clamp: tuple[float, float] = (0.4, 0.6)
    """Lowest and highest probability after a rationale; a probability outside becomes the bound."""
    rationale_sampling: SamplingSettings = SamplingSettings(max_tokens=160)
    """How rationales are sampled."""
    few_shot: int = Field(0, ge=0)
    """Number of labelled comparisons that the judge sees as examples before each question; 0: none."""
    scale: Scale = "levels"
    """How single responses are rated: `levels` asks for 1 to 10, `broken` asks if the response breaks the principle."""

    @model_validator(mode="after")
    def _each_is_plain(self) -> JudgeSettings:
        for name in ("rationales", "few_shot"):
            if self.ask == "each" and getattr(self, name):
                raise ValueError(f"ask: each asks without {name}; set {name} to 0, or ask to pair")
        return self

    @model_validator(mode="after")
    def _clamp_holds_a_half(self) -> JudgeSettings:
        low, high = self.clamp
        if not 0 <= low <= 0.5 <= high <= 1:
            raise ValueError(f"clamp: {low:g} to {high:g} must hold 0.5 between 0 and 1, as [0.4, 0.6] does")
        return self


class FeedbackTrainSettings(TrainSettings):
    """How a small model is trained to judge."""

    epochs: Passes = 1
    """Number of passes over the comparisons; 0.5: over half of them, drawn by the seed."""
    batch_size: int = Field(4, ge=1)
    """Comparisons per optimiser step. Each comparison is learned in both orders."""
    learning_rate: LearningRate = 5e-4
    """The highest learning rate. The rate rises to it in a short warm-up, then falls to zero along a cosine."""
    max_length: int = Field(640, ge=16, le=1_000_000)
    """Tokens of a question at most. A comparison with a longer question is left out and counted."""
    agreement: float = Field(0.2, ge=0)
    """Weight of the part of the loss that asks the two orders of a comparison to agree. 0: a preference for a position costs
    nothing. A judge that is asked of each response (`ask: each`) has no order."""
