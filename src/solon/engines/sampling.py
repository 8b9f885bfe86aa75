"""How text is sampled, as a recipe sets it."""

from __future__ import annotations

from pydantic import Field

from solon.engines.base import Sampling
from solon.settings import Settings, Tokens


class SamplingSettings(Settings):
    max_tokens: Tokens = 80
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)

    def sampling(self) -> Sampling:
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.repetition_penalty)
