"""The run directory: resume, provenance and the ledger, the same way for every stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Artifact(Generic[T_co]):
    """The name of a value that one stage makes and another stage needs or uses."""

    name: str
