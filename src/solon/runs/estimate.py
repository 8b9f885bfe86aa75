"""`--dry-run`: what a recipe will do, before it is done."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from solon.constitution import load_constitution
from solon.engines import is_remote
from solon.runs.data import Data
from solon.runs.pipeline import reinforced_name
from solon.runs.recipe import Recipe

WORDS_TO_TOKENS = 1.4  # English in today's vocabularies; an estimate needs no tokenizer


def estimate(recipe: Recipe) -> list[dict[str, Any]]:
    """One row a stage: records, tokens read, written and trained on, and seconds on this machine.

    Seconds come from this machine's rate of matrix products and the model's size; where the size is not known
    (a server, a hub id that is not here), seconds are None. Good to about a factor of two.
    """
    data, rules = Data(recipe), load_constitution(recipe.constitution)
    part, feedback, ppo = recipe.supervised, recipe.feedback, recipe.ppo
    prompt = _mean(sum(len(m.content.split()) for m in p.prompt) for p in data.prompts) + 20
    request = _mean(len((p.critique + p.revision).split()) * WORDS_TO_TOKENS / 2 for p in rules.principles) + 8
    n, held = len(data.prompts), len(data.heldout)
    rows: list[dict[str, Any]] = []

    def row(
        name: str,
        records: int,
        read: float = 0,
        written: float = 0,
        trained: float = 0,
        here: float | None = None,
        asked: Iterable[str | None] = (),
    ) -> None:
        """here: tokens read that a model in this process computes, where requests share most of theirs. asked: judges."""
        rows.append(
            {
                "name": name,
                "records": records,
                "prompt_tokens": round(read),
                "completion_tokens": round(written),
                "trained_tokens": round(trained),
                "here": round(read if here is None else here),
                "known": not any(is_remote(judge) for judge in asked if judge),
            }
        )

    def compared(pairs: int, said: float, principles: int) -> tuple[float, float]:
        """Tokens sent to a judge that compares in both orders, and those that are distinct."""
        return pairs * principles * 2 * (prompt + 2 * said + 50), pairs * (prompt + 2 * (2 * said + principles * 50))

    def rated(responses: int, said: float, principles: int) -> tuple[float, float]:
        return responses * principles * (prompt + said + 50), responses * (prompt + said + principles * 50)

    judge = (feedback.judge,)
    if recipe.warmup:
        answers = sum(sum(len(m.content.split()) for m in d.messages) + 20 for d in data.demonstrations)
        chains = sum(
            (len(c.response.split()) + sum(len((s.critique + s.revision).split()) for s in c.steps)) * WORDS_TO_TOKENS
            + prompt + 2 * request
            for c in data.revision_demonstrations
        )  # fmt: skip
        count = len(data.demonstrations) + len(data.revision_demonstrations)
        row("warmup", count, trained=recipe.warmup.train.epochs * (answers * WORDS_TO_TOKENS + chains))
    if feedback.warmup and feedback.labels != "human":
        m = 2 * len(data.comparisons)
        row("feedback-model", m, trained=feedback.warmup.epochs * m * (prompt + 130))
    if part:
        said = part.sampling.max_tokens * 0.75
        turns = 1 + part.revisions * (2 if part.critique else 1)
        read = n * (prompt + part.revisions * (prompt + said + request + (prompt + 2 * said + 2 * request)))
        row("revisions", n, read, n * turns * said)
        if part.sft_on == "best":  # both orders
            sent, here = compared(n, said, 1)
            row("choices", n, sent, here=here, asked=judge)
        kept = n * (part.revisions if part.sft_on == "all" else 1) / (1 - part.demonstration_share)
        row("sl-cai", round(kept), trained=part.train.epochs * kept * (prompt + said))
    asked = min(n, feedback.n_prompts or n)
    said = feedback.sampling.max_tokens * 0.75
    of_pair = 1 if feedback.question else feedback.principles_per_pair or len(rules.principles)
    if feedback.labels != "human":
        known = len(data.heldout_comparisons)
        sent, here = compared(known, said, 1)
        row("judge-heldout", known, sent, here=here, asked=judge)
        row("pairs", asked, 2 * asked * prompt, 2 * asked * said)
        if not feedback.direct:
            sent, here = compared(asked, said, of_pair)
            row("comparisons", asked, sent, here=here, asked=judge)
    labelled = (asked if feedback.labels != "human" else 0) + (len(data.comparisons) if feedback.labels != "ai" else 0)
    if feedback.direct:
        references = min(128, 2 * asked)
        sent, here = rated(references, said, of_pair)
        row("judge-reward", references, sent, here=here, asked=judge)
    else:
        learner = recipe.reward_model.train
        row("reward-model", labelled, trained=learner.members * learner.epochs * labelled * 2 * (prompt + said))
    answer = ppo.max_tokens * 0.75
    if recipe.algorithm == "dpo":
        row("dpo", labelled, trained=ppo.epochs * labelled * 2 * (prompt + said))
    else:
        rollouts = ppo.updates * ppo.rollouts
        checks = math.ceil(ppo.updates / ppo.check_every) if ppo.check_every else 0
        probes = (checks + bool(checks)) * recipe.gold.probes  # the start answers as well, and is compared with nothing
        gold = recipe.gold.judge or (feedback.judge if feedback.labels != "human" else None)
        by_gold = compared(checks * recipe.gold.probes if gold else 0, answer, of_pair)
        by_judge = rated(rollouts if feedback.direct else 0, answer, of_pair)
        sampled = (rollouts + probes) * prompt
        row(
            recipe.algorithm,
            ppo.updates,
            sampled + by_gold[0] + by_judge[0],
            (rollouts + probes) * answer,
            ppo.epochs * rollouts * (prompt + answer),
            here=sampled + by_gold[1] + by_judge[1],
            asked=[gold if checks else None, *(judge if feedback.direct else ())],
        )
    models, answer = 2 + bool(recipe.warmup or part), recipe.evaluation.sampling.max_tokens * 0.75
    sent, here = rated(models * held if feedback.direct else 0, answer, of_pair)
    answers = models * held
    row(
        "evaluation",
        answers,
        answers * prompt + sent,
        answers * answer,
        here=answers * prompt + here,
        asked=judge if feedback.direct else (),
    )
    if feedback.labels != "human" and (each := min(held, recipe.evaluation.judge_comparisons)):
        sent, here = compared((models - 1) * each, answer, 1)
        row("judging", (models - 1) * each, sent, here=here, asked=judge)
    speed = _rates(recipe)
    for r in rows:
        here, known = r.pop("here"), r.pop("known")
        computed = {**r, "prompt_tokens": here}
        r["seconds"] = round(sum(computed[k] / speed[k] for k in speed)) if speed and known else None
    return rows


def estimate_table(recipe: Recipe, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{recipe.name}: what would run ({reinforced_name(recipe)})")
    for name in ("stage", "records", "tokens read", "written", "trained on", "time"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for r in rows:
        seconds = "unknown" if r["seconds"] is None else _clock(r["seconds"])
        table.add_row(
            r["name"], f"{r['records']:,}", *(f"{r[k]:,}" for k in ("prompt_tokens", "completion_tokens", "trained_tokens")),
            seconds,
        )  # fmt: skip
    known = [r["seconds"] for r in rows if r["seconds"] is not None]
    asked = (recipe.model, recipe.feedback.judge, recipe.gold.judge if recipe.ppo.check_every else None)
    paid = any(is_remote(spec) for spec in asked if spec)
    table.caption = f"about {_clock(sum(known))} here (±2×); cost: " + (
        "the server's price for the tokens above" if paid else "none, all models run here"
    )
    return table


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _mean(values: Any) -> float:
    found = [float(v) for v in values]
    return sum(found) / len(found) if found else 0.0


def _rates(recipe: Recipe) -> dict[str, float] | None:
    """Tokens a second read, written and trained on, from the model's size and a measured matrix product."""
    import torch

    from solon.engines.weights import resolve, resolve_dtype
    from solon.errors import InputError

    if is_remote(recipe.model):
        return None
    parameters = 3e4
    if recipe.model != "tiny-random":
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(resolve(recipe.model), local_files_only=True).get_text_config()
        except (InputError, OSError):
            return None
        layer = 4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
        parameters = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    a = torch.ones(768, 768, dtype=resolve_dtype(recipe.dtype))
    a @ a
    began = time.perf_counter()
    for _ in range(10):
        a @ a
    flops = 10 * 2 * 768**3 / (time.perf_counter() - began)
    forward = 0.6 * flops / (2 * parameters)  # 60 % of the peak is what the stages were seen to reach
    return {"prompt_tokens": forward, "completion_tokens": 0.35 * forward, "trained_tokens": 0.4 * forward}
