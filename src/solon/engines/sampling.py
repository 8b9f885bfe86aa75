"""The sampling settings of a recipe."""

from __future__ import annotations

from pydantic import Field

from solon.engines.base import Sampling
from solon.settings import Settings, Tokens


class SamplingSettings(Settings):
    max_tokens: Tokens = 80
    """Tokens of a text at most."""
    temperature: float = Field(0.7, ge=0)
    """Temperature of sampling; 0 takes the most probable token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the most probable tokens that together hold this probability."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1, a small model repeats itself and its prompt less (Keskar et al. 2019)."""

    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.repetition_penalty)
