"""The updates of a training, compared with those of another one."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

KL_LEVELS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # nats a response, at which two runs can be compared


def at_same_kl(updates: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The rollouts' mean reward where training first reached so many nats, between two updates by a straight line.

    A policy gains reward by moving away from its reference, so two runs are compared at the same KL, not only at their ends.
    """
    curve = [
        (float(u["kl_nats"]), float(u["reward"]), u["update"])
        for u in updates
        if all(isinstance(u.get(k), (int, float)) and math.isfinite(u[k]) for k in ("kl_nats", "reward"))
    ]
    found = []
    for level in KL_LEVELS:
        for (kl0, r0, _), (kl1, r1, update) in pairwise(curve):
            if kl0 < level <= kl1:
                found.append(
                    {"kl_nats": level, "reward": r0 + (r1 - r0) * (level - kl0) / (kl1 - kl0), "update": update}
                )
                break
    return found
