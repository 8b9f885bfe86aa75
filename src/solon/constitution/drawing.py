"""Principles drawn by weight, the same for the same key."""

from __future__ import annotations

import random
from typing import Any

from solon.constitution.model import Constitution, Principle
from solon.records import fingerprint


def draw_principles(constitution: Constitution, n: int, *key: Any) -> list[Principle]:
    """n principles drawn by weight, none twice until all were drawn. The same key draws the same."""
    rng = random.Random(fingerprint("principles", *key))
    drawn: list[Principle] = []
    while len(drawn) < n:
        left = [p for p in constitution.principles if p not in drawn[-(len(drawn) % len(constitution.principles)) :]]
        left = left or list(constitution.principles)
        drawn.append(rng.choices(left, [p.weight for p in left])[0])
    return drawn
