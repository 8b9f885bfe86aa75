"""`--dry-run`: an estimate of the records, tokens, time and cost of a recipe."""

from __future__ import annotations

import time
from typing import Any

from rich.table import Table
from rich.text import Text

from solon.engines import scheme_of
from solon.recipes.recipe import Recipe
from solon.runs.ledger import cost, total_cost
from solon.stages import in_order
from solon.stages.plan import Plan


def estimate(recipe: Recipe) -> list[dict[str, Any]]:
    """One row per stage: records, tokens read, written and trained on, cost in US dollars, and seconds on this machine.

    Seconds follow from this machine's rate of matrix products and the model's size. They are None where the size is not known (a
    server, a hub id that is not downloaded). The cost is that of the judges behind endpoints, by genai-prices. It is None where the
    price of a judge is not known; `unpriced` names that judge. The estimate is good to about a factor of two.
    """
    plan = Plan(recipe)
    for stage in in_order(recipe):
        stage.estimate(plan)
    speed = _rates(recipe)
    for row in plan.rows:
        computed = {**row, "prompt_tokens": row.pop("here")}
        known = speed and not row["endpoints"]
        row["seconds"] = round(sum(computed[k] / speed[k] for k in speed)) if speed and known else None
    return plan.rows


def estimate_table(recipe: Recipe, rows: list[dict[str, Any]]) -> Table:
    """The rows of `estimate` as a table for the terminal."""
    table = Table(title=Text(f"{recipe.name}: what would run"))
    for name in ("stage", "records", "tokens read", "written", "trained on", "time", "cost"):
        justify = "left" if name in ("stage", "cost") else "right"
        width = 9 if name == "cost" else None
        table.add_column(name, justify=justify, no_wrap=name == "stage", min_width=width)  # type: ignore[arg-type]
    for r in rows:
        seconds = "unknown" if r["seconds"] is None else _clock(r["seconds"])
        tokens = (f"{r[k]:,}" for k in ("prompt_tokens", "completion_tokens", "trained_tokens"))
        table.add_row(
            r["name"], f"{r['records']:,}", *tokens, seconds, Text(cost(r) if r["endpoints"] else "runs here")
        )
    known = [r["seconds"] for r in rows if r["seconds"] is not None]
    unpriced = sorted({name for r in rows for name in r["unpriced"]})
    whole = total_cost(rows)
    if whole is None:
        spent = f"not known: there is no price for {', '.join(unpriced)}; multiply the tokens above by your own"
    elif any(r["endpoints"] for r in rows):
        spent = f"about ${whole:.2f} (±2×, by genai-prices)"
    else:
        spent = "none, all models run here"
    table.caption = Text(f"about {_clock(sum(known))} here (±2×); cost: {spent}")
    return table


def _clock(seconds: float) -> str:
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _rates(recipe: Recipe) -> dict[str, float] | None:
    """Tokens per second read, written and trained on, from the model's size and a measured matrix product."""
    import torch

    from solon.errors import InputError
    from solon.models.weights import resolve, resolve_dtype

    if scheme_of(recipe.model):
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
