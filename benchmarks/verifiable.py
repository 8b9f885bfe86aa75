"""Is learning real? PPO on SmolLM2 with a reward that needs no model: how far is an answer from 3 to 20 words?

    python -m benchmarks.verifiable [--updates 40]

Three runs from the same seed: the reward, its negative, and a constant. What is reported is the share of answers of such a
length. A line an update; the whole goes to results/. (With that share itself for a reward, 0 or 1, nothing is learned in
30 updates: at first almost no answer earns anything.)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.timing import keep
from solon.data import read_prompts
from solon.measures.statistics import mean, share
from solon.measures.texts import words
from solon.models.settings import AdapterSettings
from solon.records import Chat
from solon.reinforcement.settings import PPOSettings
from solon.reinforcement.trainer import ppo
from solon.settings import DEFAULT_SYSTEM

LEAST, MOST = 3, 20  # words
ROLLOUTS = 48


def away(chats: Sequence[Chat]) -> list[int]:
    """Words too many or too few."""
    return [max(0, LEAST - n, n - MOST) for n in (words(c[-1].content) for c in chats)]


def run(updates: int, sign: float, dtype: str) -> list[dict[str, Any]]:
    settings = PPOSettings(
        updates=updates, rollouts=ROLLOUTS, responses_per_prompt=4, epochs=2, minibatch=12, max_tokens=40,
        learning_rate=7e-4, lam=1.0, kl_coefficient=0.02, kl_target=None, kl_bound=25.0, missing_end_penalty=0.0,
    )  # fmt: skip
    seen: list[list[int]] = []

    def reward(chats: Sequence[Chat]) -> list[float]:
        seen.append(away(chats))
        return [-sign * n / 5 for n in seen[-1]]

    found = []
    prompts = read_prompts("solon:helpful")[:96]
    with TemporaryDirectory() as aside:
        steps = ppo(
            prompts, "smollm2", reward, Path(aside) / "m", settings=settings, system=DEFAULT_SYSTEM, dtype=dtype,
            adapter=AdapterSettings(layers=12),
        )  # fmt: skip
        for made in steps:
            asked = [i // settings.responses_per_prompt for i in range(len(seen[-1]))]  # four answers a prompt
            fits = share([float(n == 0) for n in seen[-1]], asked).to_json()
            off = mean([float(n) for n in seen[-1]], asked).to_json()
            found.append({
                "update": made.update, "fits": fits, "away": off, "kl": made.kl_nats, "tokens": made.response_tokens
            })  # fmt: skip
            print(f"{sign:+.0f} update {made.update}: fits {fits['value']:.0%}, KL {made.kl_nats:.2f} nats", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    short = min(8, given.updates)  # what goes nowhere, or down, shows it sooner
    runs = {"reward": run(given.updates, 1.0, given.dtype)}
    runs |= {"negative": run(short, -1.0, given.dtype), "constant": run(short, 0.0, given.dtype)}
    ends = {}
    for name, found in runs.items():
        for where, part in (("first", found[:3]), ("last", found[-3:])):
            # The mean of a curve at its ends: successive updates are one path, so it has no interval.
            fits, off = (fmean(f[key]["value"] for f in part) for key in ("fits", "away"))
            ends[f"{name}, {where} three"] = {"fits": fits, "words_away": off, "kl": part[-1]["kl"]}
            print(f"{name}, {where} three updates: fits {fits:.0%}, {off:.1f} words away, KL {part[-1]['kl']:.1f}")
    result = {
        "words": [LEAST, MOST],
        "rollouts": ROLLOUTS,
        "dtype": given.dtype,
        "ends": ends,
        "runs": runs,
    }
    print(keep("verifiable", result))


if __name__ == "__main__":
    main()
