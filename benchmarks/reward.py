"""Training a reward model: Solon beside TRL's RewardTrainer, on the same pairs, LoRA, batch and threads.

    python -m benchmarks.reward [--pairs 800] [--test 200] [--steps 10]

The two take turns: each trains so many steps, then the other does.
That the tree's numbers are the padded batch's is a test.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.peers import Trl
from benchmarks.timing import keep, median_ratio, peak_mb, product_rate, reference_data, said
from solon.data import read_comparisons
from solon.measures.statistics import wilson
from solon.models.batching import distinct_tokens
from solon.models.settings import AdapterSettings
from solon.models.weights import load_causal_lm, resolve
from solon.records import Comparison
from solon.reinforcement.reward_members import Member
from solon.reinforcement.reward_model import RewardModel
from solon.reinforcement.reward_training import train_reward_model
from solon.reinforcement.settings import RewardSettings
from solon.settings import DEFAULT_SYSTEM

RANK, BATCH, RATE, LENGTH = 16, 8, 2e-4, 512


def pairs(n: int) -> list[tuple[Comparison, list[int], list[int]]]:
    """Comparisons whose two conversations hold LENGTH tokens at most, with their tokens."""
    model, tokenizer = load_causal_lm("smollm2", dtype="float32")
    encode = RewardModel(model, tokenizer, DEFAULT_SYSTEM, [Member(None)]).ids
    rows = read_comparisons(str(reference_data() / "hh-harmless-dev.jsonl.gz"))
    random.Random(0).shuffle(rows)
    found = []
    for c in rows:
        a, b = (encode((*c.prompt, *side), 10**6) for side in (c.chosen, c.rejected))
        if max(len(a), len(b)) <= LENGTH:
            found.append((c, a, b))
    if len(found) < n:
        raise SystemExit(f"{n} pairs wanted, {len(found)} are short enough")
    return found[:n]


def messages(c: Comparison, side: Any) -> list[dict[str, str]]:
    return [{"role": "system", "content": DEFAULT_SYSTEM}, *(m.model_dump() for m in (*c.prompt, *side))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=800)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    every = pairs(given.pairs + given.test)
    train, test = every[: given.pairs], every[given.pairs :]
    model = resolve("smollm2")
    rows = [{side: messages(c, getattr(c, side)) for side in ("chosen", "rejected")} for c, _, _ in every]
    trl = Trl(
        "reward",
        {
            "model": model, "rows": rows[: given.pairs], "test": rows[given.pairs :], "rank": RANK, "batch": BATCH,
            "rate": RATE, "max_length": LENGTH, "steps": given.steps, "threads": torch.get_num_threads(),
            "target_modules": "all-linear",
        },
    )  # fmt: skip
    parts = given.pairs // BATCH // given.steps
    solon: list[float] = []
    theirs: list[float] = []
    rates: list[float] = []
    started = time.perf_counter()

    def step(at: int, of: int, shown: dict[str, float]) -> None:
        """After each part of Solon's, TRL takes its turns: A BB AA BB …"""
        nonlocal started
        if at % given.steps:
            return
        solon.append(time.perf_counter() - started)
        rates.append(product_rate(torch.float32, "cpu", 0.5))
        if len(solon) % 2:
            for _ in range(min(2, parts - len(theirs))):
                theirs.append(trl.part()["seconds"])
        done = min(len(solon), len(theirs))
        print(f"{at}/{of}: solon {solon[-1]:.1f} s, trl {theirs[done - 1]:.1f} s, loss {shown['loss']:.3f}", flush=True)
        started = time.perf_counter()

    with TemporaryDirectory() as aside:
        out = Path(aside) / "model"
        trained = train_reward_model(
            [c for c, _, _ in train], "smollm2", out, adapter=AdapterSettings(rank=RANK, alpha=2 * RANK),
            settings=RewardSettings(epochs=1, batch_size=BATCH, learning_rate=RATE, max_length=LENGTH),
            system=DEFAULT_SYSTEM, reference=[], dtype="float32", progress=step,
        )  # fmt: skip
        ours_mb = peak_mb()
        probabilities = RewardModel.load(str(out), "float32").probabilities([c for c, _, _ in test])
    last = trl.part()
    trl.close()
    right = sum(1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0 for p in probabilities)
    weights = sum(
        p.numel() for n, p in load_causal_lm("smollm2", dtype="float32")[0].named_parameters() if ".layers." in n
    )
    # Each distinct token meets the blocks' weights once forward and once backward (frozen: no gradient of their own).
    least = 4 * weights * sum(distinct_tokens([a, b]) for _, a, b in train) / max(rates)
    ratio = median_ratio([t / s for s, t in zip(solon, theirs, strict=True)])
    result = {
        "pairs": given.pairs, "batch": BATCH, "rank": RANK, "dtype": "float32", "steps_a_part": given.steps,
        "ratio": ratio, "of_whole": sum(theirs) / sum(solon), "pairs_per_second": given.pairs / sum(solon),
        "trl_pairs_per_second": given.pairs / sum(theirs), "of_limit_weights_only": least / sum(solon),
        "product_gflops": max(rates) / 1e9, "peak_mb": ours_mb, "trl_peak_mb": last["peak_training_mb"],
        "memory_ratio": ours_mb / last["peak_training_mb"], "loss_last": trained["loss_last"],
        "right": wilson(right, len(test)).to_json(), "trl_right": wilson(last["right"], last["n"]).to_json(),
        "tokens_distinct": sum(distinct_tokens([a, b]) for _, a, b in train),
        "tokens": sum(len(a) + len(b) for _, a, b in train),
    }  # fmt: skip
    path = keep("reward", result)
    a, b = result["right"], result["trl_right"]
    print(f"times as fast as TRL's RewardTrainer: {said(ratio)}; over the whole {result['of_whole']:.2f} ×")
    print(
        f"held-out right: {a['value']:.1%} [{a['low']:.1%}, {a['high']:.1%}], TRL's {b['value']:.1%} [{b['low']:.1%}, {b['high']:.1%}]"
    )
    print(f"memory {result['memory_ratio']:.2f} of TRL's; {result['of_limit_weights_only']:.0%} of the limit; {path}")


if __name__ == "__main__":
    main()
