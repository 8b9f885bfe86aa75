"""What stages give each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Artifact(Generic[T_co]):
    """Something that a run has from a stage or from the recipe's files, by name."""

    name: str
