"""PPO: Solon beside the last TRL that has it (1.12), on the same prompts, reward, rollouts, epochs and threads.

    python -m benchmarks.ppo [--updates 20] [--only solon-top trl-top …]

Five learners take turns, an update each, the order turned round every time: Solon with adapters on the top 12 of 30
blocks (its recipes' setting) and on all, TRL with the same two, and TRL with all weights learning. Afterwards each
policy answers the prompts that were kept away, and Solon's reader scores all of them alike. The reward is one reward
model, trained here from the shipped comparisons and given to all in standard deviations. What each learned is drawn as
reward against KL (results/NAME.svg). TRL holds 9 to 15 GB a learner: on a machine of 24 GB ask for one of its at a time
(`--only`), as the Makefile does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.peers import Trl
from benchmarks.timing import keep, median_ratio, product_rate, said
from solon.analysis.kl import at_same_kl as along
from solon.data import read_comparisons, read_prompts
from solon.measures.statistics import difference, mean
from solon.models.batching import distinct_tokens
from solon.models.chat.encode import chat_ids, end_ids
from solon.models.passes import TOKENS_AT_ONCE
from solon.models.settings import AdapterSettings
from solon.models.weights import load_causal_lm, load_tokenizer, resolve
from solon.reinforcement.reward_members import NORMALISATION
from solon.reinforcement.reward_model import RewardModel
from solon.reinforcement.reward_training import train_reward_model
from solon.reinforcement.rollout import Rollouts, sample
from solon.reinforcement.settings import PPOSettings, RewardSettings
from solon.reinforcement.trainer import draw_prompts, ppo
from solon.settings import DEFAULT_SYSTEM

ROLLOUTS, TOKENS, EPOCHS, RANK, TOP = 16, 48, 4, 16, 12
SETTINGS = PPOSettings(
    updates=1000, rollouts=ROLLOUTS, minibatch=ROLLOUTS, epochs=EPOCHS, max_tokens=TOKENS, learning_rate=2e-4,
    temperature=0.7, kl_coefficient=0.05, kl_target=None, kl_bound=1e9, missing_end_penalty=1.0, lam=0.95,
)  # fmt: skip
NAMES = {
    "solon-top": "Solon, adapters on the top 12 blocks", "solon-all": "Solon, adapters on all blocks",
    "trl-top": "TRL 1.12, the same adapters (top 12)", "trl-all": "TRL 1.12, the same adapters (all)",
    "trl-full": "TRL 1.12, all weights",
}  # fmt: skip
FULL_RATE = 1e-5  # of TRL with all weights learning: the adapters' rate would break the model


def reward_model(out: Path) -> dict[str, float]:
    rows = [c for name in ("harmless", "helpful") for c in read_comparisons(f"solon:comparisons-{name}")]
    train_reward_model(
        rows, "smollm2", out, settings=RewardSettings(learning_rate=5e-4), system=DEFAULT_SYSTEM, dtype="float32",
        adapter=AdapterSettings(rank=RANK, alpha=2 * RANK, layers=TOP),
        reference=[(*c.prompt, *side) for c in rows[:64] for side in (c.chosen, c.rejected)],
    )  # fmt: skip
    return json.loads((out / NORMALISATION).read_text())


class Solon:
    """In a process of its own, so that its memory is its own."""

    def __init__(self, layers: int | None, reward: Path, aside: Path, updates: int) -> None:
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._policy = aside / f"solon-{layers}"
        arguments = (theirs, layers, str(reward), str(self._policy), updates, torch.get_num_threads())
        self._process = context.Process(target=_learn, args=arguments, daemon=True)
        self._process.start()
        self._ours.recv()

    def __call__(self) -> dict[str, float]:
        self._ours.send("go")
        return self._ours.recv()

    def policy(self) -> Path:
        """Where it is written, once all updates are done."""
        self()
        return self._policy

    def close(self) -> None:
        self._process.kill()


def _learn(pipe: Any, layers: int | None, reward: str, out: str, updates: int, threads: int) -> None:
    from benchmarks.timing import peak_mb

    torch.set_num_threads(threads)
    steps: Iterator[Any] = ppo(
        prompts(), "smollm2", reward, Path(out), settings=SETTINGS.model_copy(update={"updates": updates}),
        system=DEFAULT_SYSTEM, adapter=AdapterSettings(rank=RANK, alpha=2 * RANK, layers=layers), dtype="float32",
    )  # fmt: skip
    pipe.send("ready")
    while pipe.recv():
        started = time.perf_counter()
        made = next(steps, None)
        if made is None:
            pipe.send({})
            continue
        pipe.send({
            "seconds": time.perf_counter() - started, "kl": made.kl_nats, "peak_mb": peak_mb(),
            "reward": made.reward - SETTINGS.missing_end_penalty * (1 - made.ended),
            "response_tokens": made.response_tokens,
        })  # fmt: skip


def prompts(kept_away: bool = False) -> list[Any]:
    part = slice(96, None) if kept_away else slice(96)
    return [p for name in ("helpful", "red-team") for p in read_prompts(f"solon:{name}")[part]]


class Trls:
    def __init__(self, kind: str, reward: Path, known: dict[str, float], updates: int) -> None:
        where = resolve("smollm2")
        tokenizer = load_tokenizer(where)
        blocks = "|".join(map(str, range(30 - TOP, 30)))
        job = {
            "model": where, "reward": str(reward), "mean": known["mean"], "std": known["std"], "rollouts": ROLLOUTS,
            "micro": ROLLOUTS, "epochs": EPOCHS, "updates": updates, "tokens": TOKENS, "rank": RANK, "seed": 0,
            "temperature": SETTINGS.temperature, "kl": SETTINGS.kl_coefficient, "lam": SETTINGS.lam,
            "missing_end": SETTINGS.missing_end_penalty, "threads": torch.get_num_threads(), "lora": kind != "full",
            "rate": FULL_RATE if kind == "full" else SETTINGS.learning_rate,
            "target_modules": "all-linear" if kind == "all" else rf".*layers\.({blocks})\..*_proj",
            "rows": [{"input_ids": chat_ids(tokenizer, p.prompt, system=DEFAULT_SYSTEM)} for p in prompts()],
        }  # fmt: skip
        self._trl, self._rewards = Trl("ppo", job), RewardModel.load(str(reward), "float32")

    def __call__(self) -> dict[str, float]:
        found = self._trl.part()
        return {
            "seconds": found["seconds"], "reward": statistics.fmean(scored(found["rollouts"], self._rewards)),
            "kl": found["logs"].get("objective/kl", float("nan")), "peak_mb": found["peak_mb"],
        }  # fmt: skip

    def policy(self) -> Path:
        return Path(self._trl.part()["policy"])

    def close(self) -> None:
        self._trl.close()


def scored(rows: list[list[int]], rewards: RewardModel) -> list[float]:
    """Rewards of conversations in tokens, read behind the end of the turn; less the penalty where that was missing."""
    end = rewards.tokenizer.eos_token_id
    [member] = rewards.members
    raw = rewards.raw_scores([row if row[-1] == end else [*row, end] for row in rows])
    return [
        (x - member.mean) / member.std - SETTINGS.missing_end_penalty * (row[-1] != end)
        for x, row in zip(raw, rows, strict=True)
    ]


def judged(policies: dict[str, str], reward: Path, samples: int = 2) -> dict[str, Any]:
    """Of each policy: reward and KL from the start (nats a response) on the prompts kept away, and the gain over the start."""
    rewards, start = RewardModel.load(str(reward), "float32"), load_causal_lm("smollm2", dtype="float32")[0].eval()
    pad = rewards.tokenizer.pad_token_id
    contexts = [chat_ids(rewards.tokenizer, p.prompt, system=DEFAULT_SYSTEM) for p in prompts(kept_away=True)] * samples
    found, scores = {}, {}

    def by_prompt(values: list[float]) -> list[float]:
        """Of each prompt the mean: what is drawn again for an interval are prompts."""
        return [statistics.fmean(values[i :: len(contexts) // samples]) for i in range(len(contexts) // samples)]

    for kind, where in policies.items():
        policy = load_causal_lm(where, dtype="float32")[0].eval()
        made = sample(
            policy, contexts, seed=1, max_tokens=TOKENS, temperature=SETTINGS.temperature, pad=pad,
            ends=end_ids(rewards.tokenizer),
        )  # fmt: skip
        said = [m.ids + ([] if m.end is None else [m.end]) for m in made]
        rollouts = Rollouts(contexts, said, pad, start.device)
        with torch.no_grad():
            parts = rollouts.parts(range(len(said)), TOKENS_AT_ONCE)
            at_start = {
                i: row.sum().item()
                for part in parts
                for i, row in zip(part, rollouts.forward(start, part, SETTINGS.temperature)[0], strict=True)
            }
        scores[kind] = by_prompt(scored([c + s for c, s in zip(contexts, said, strict=True)], rewards))
        found[kind] = {
            "reward": mean(scores[kind]).to_json(),
            "kl": mean(by_prompt([sum(m.logprobs) - at_start[i] for i, m in enumerate(made)])).to_json(),
        }
    for kind in policies:
        for other in policies:
            if kind != other:
                found[kind][f"over {other}"] = difference(scores[kind], scores[other]).to_json()
    return found


def at_same_kl(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Mean rewards of both sides' updates where each first reached so many nats, at the levels that both reached.

    Successive updates are one path, not independent samples, so there is no interval: whether the two policies differ is
    measured on prompts kept away (`judged`).
    """
    paths = [
        {
            r["kl_nats"]: r["reward"]
            for r in along([{**p, "kl_nats": p["kl"], "update": i} for i, p in enumerate(points)])
        }
        for points in (ours, theirs)
    ]
    return [{"kl_nats": level, "reward": [p[level] for p in paths]} for level in paths[0] if level in paths[1]]


def least_flops(model: Any, contexts: list[list[int]], response_tokens: float, layers: int | None) -> float:
    """FLOPs of the matrix products that any PPO must do for one such update, weights alone, each distinct token once.

    Sampling passes all blocks; reference, reward and epochs those with adapters (what lies below is shared; the reward
    model's are on the top ones). Two a weight and token, and twice that where gradients come back through it, but not to
    what enters the lowest block. Of a context's tokens the last block gives keys and values only; a response's last token
    passes nothing. The output head: of response tokens only.
    """
    block = model.model.layers[-1]
    size, qkv = (sum(p.numel() for n, p in block.named_parameters() if part in n) for part in ("_proj", "self_attn"))
    qkv -= block.self_attn.o_proj.weight.numel()
    unseen = size - block.self_attn.k_proj.weight.numel() - block.self_attn.v_proj.weight.numel()
    every, learned = len(model.model.layers), layers or len(model.model.layers)
    context = distinct_tokens(contexts)
    tokens = context + response_tokens - len(contexts)
    passes = 2 * every + 2 * learned + 2 * TOP + EPOCHS * 4 * learned
    spared = (2 + 2 + EPOCHS * 4) * unseen * context + EPOCHS * 2 * qkv * tokens
    spared += 2 * unseen * tokens  # the reward is read at a response's end alone
    head = (2 + 2 + EPOCHS * 4) * model.lm_head.weight.numel()
    return passes * size * tokens - spared + head * response_tokens


def of_limit(history: list[dict[str, float]], rates: list[float], layers: int | None) -> list[float]:
    """The share of the machine's product rate that each update of Solon's reached; its first one loads the model."""
    model, tokenizer = load_causal_lm("smollm2", dtype="float32")
    asked, found = prompts(), []
    for update, (made, rate) in enumerate(zip(history, rates, strict=True)):
        contexts = [
            chat_ids(tokenizer, p.prompt, system=DEFAULT_SYSTEM) for p in draw_prompts(asked, ROLLOUTS, update, seed=0)
        ]
        least = least_flops(model, contexts, ROLLOUTS * made["response_tokens"], layers)
        found.append(least / rate / made["seconds"])
    return found[1:]


def plot(history: dict[str, list[dict[str, float]]], after: dict[str, Any], path: Path) -> None:
    """Reward against KL: an update a point, the mean of five as a line; the policies at the end with their intervals."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "solon"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (kind, points), colour in zip(
        history.items(), ("#3b82c4", "#c46a3b", "#5b9a4c", "#8a5bb0", "#777777"), strict=False
    ):
        kl, reward = ([p[key] for p in points] for key in ("kl", "reward"))
        axes.plot(kl, reward, "o", color=colour, markersize=4, alpha=0.45)
        smooth = [(statistics.fmean(kl[i : i + 5]), statistics.fmean(reward[i : i + 5])) for i in range(len(kl) - 4)]
        axes.plot(*zip(*smooth, strict=True), color=colour, linewidth=2, label=NAMES[kind])
        ends = after[kind]
        reach = [[ends["reward"]["value"] - ends["reward"]["low"]], [ends["reward"]["high"] - ends["reward"]["value"]]]
        axes.errorbar(ends["kl"]["value"], ends["reward"]["value"], yerr=reach, fmt="D", color=colour, capsize=4)
    axes.set(xlabel="KL from the start, nats a response", ylabel="score, standard deviations")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=["solon-top", "solon-all", "trl-top", "trl-all", "trl-full"])
    parser.add_argument("--name", default="ppo", help="of the file in results/")
    given = parser.parse_args()
    with TemporaryDirectory() as name:
        aside = Path(name)
        known = reward_model(aside / "reward")
        made: dict[str, Callable[[], Any]] = {
            "solon-top": lambda: Solon(TOP, aside / "reward", aside, given.updates),
            "solon-all": lambda: Solon(None, aside / "reward", aside, given.updates),
            "trl-top": lambda: Trls("top", aside / "reward", known, given.updates),
            "trl-all": lambda: Trls("all", aside / "reward", known, given.updates),
            "trl-full": lambda: Trls("full", aside / "reward", known, given.updates),
        }
        learners = {kind: made[kind]() for kind in given.only}
        history: dict[str, list[dict[str, float]]] = {kind: [] for kind in learners}
        rates = []
        for update in range(given.updates):
            order = list(learners) if update % 2 == 0 else list(learners)[::-1]
            for kind in order:
                history[kind].append(learners[kind]())
                print(update, kind, {k: round(v, 2) for k, v in history[kind][-1].items()}, flush=True)
            rates.append(product_rate(torch.float32, "cpu", 0.5))
        policies = {kind: str(learner.policy()) for kind, learner in learners.items()}
        after = judged({"start": "smollm2", **policies}, aside / "reward")
        for learner in learners.values():
            learner.close()
    ratios: dict[str, Any] = {}
    shares = {
        kind: median_ratio(of_limit(history[kind], rates, layers))
        for kind, layers in (("solon-top", TOP), ("solon-all", None))
        if given.updates > 1 and kind in history
    }
    for ours in ("solon-top", "solon-all"):
        for theirs in ("trl-top", "trl-all", "trl-full"):
            if given.updates > 1 and ours in history and theirs in history:
                both = list(zip(history[ours], history[theirs], strict=False))[1:]  # Solon's first one loads the model
                ratios[f"{ours} / {theirs}"] = {
                    "speed": median_ratio([t["seconds"] / s["seconds"] for s, t in both]),
                    "memory": history[ours][-1]["peak_mb"] / history[theirs][-1]["peak_mb"],
                    "at_same_kl": at_same_kl(history[ours], history[theirs]),
                }
    path = keep(
        given.name,
        {"rollouts": ROLLOUTS, "tokens": TOKENS, "epochs": EPOCHS, "rank": RANK, "top": TOP, "dtype": "float32",
         "product_gflops": max(rates) / 1e9, "ratios": ratios, "of_limit": shares, "after": after, "history": history},
    )  # fmt: skip
    plot(history, after, path.with_suffix(".svg"))
    for kind, policy in after.items():
        print(kind, {name: f"{x['value']:.2f} [{x['low']:.2f}, {x['high']:.2f}]" for name, x in policy.items()})
    for name, found in shares.items():
        print(f"{name}: {said(found, 'of the limit')}")
    for name, found in ratios.items():
        print(f"{name}: {said(found['speed'])}; memory {found['memory']:.2f}")
        for level in found["at_same_kl"]:
            a, b = level["reward"]
            print(f"  reward where {level['kl_nats']:g} nats were first reached: {a:.2f}, theirs {b:.2f}")
    print(path)


if __name__ == "__main__":
    main()
