"""Which adapters a model in training gets."""

from __future__ import annotations

from pydantic import Field

from solon.settings import Settings


class AdapterSettings(Settings):
    """LoRA adapters (Hu et al. 2021) on every linear layer of the top `layers` blocks."""

    rank: int = Field(16, ge=1, le=4096)
    """Rank of the two matrices of an adapter."""
    alpha: int = Field(32, ge=1, le=65536)
    """An adapter's output is scaled by alpha / rank."""
    layers: int | None = Field(None, ge=1)
    """Number of blocks with adapters, counted from the top; null: all blocks. Fewer blocks train faster."""
