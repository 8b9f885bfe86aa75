"""What a run will cost, stage by stage, before it is run; and what it says that it chose."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from solon.engines.endpoint import price_usd
from solon.recipes.estimate import estimate, estimate_table
from solon.recipes.pipeline import chosen
from solon.recipes.recipe import load_recipe
from solon.runs.ledger import cost, total_cost
from solon.stages.data import Data

PRICED, UNPRICED = "server:gpt-4o-mini@https://api.openai.com/v1", "server:mine@http://127.0.0.1:9/v1"


def rows_of(**more: object) -> dict[str, dict]:
    return {r["name"]: r for r in estimate(load_recipe("rlaif", {"model": "tiny-random", "dtype": "float32", **more}))}


def test_a_priced_judge_is_charged_in_the_stages_that_ask_it_and_in_no_other() -> None:
    rows = rows_of(**{"feedback.judge": PRICED})
    assert {name for name, r in rows.items() if r["cost_usd"]} == {"comparisons", "judging"}
    asked = rows["comparisons"]
    expected = price_usd("gpt-4o-mini", "https://api.openai.com/v1", asked["prompt_tokens"], asked["completion_tokens"])
    assert asked["cost_usd"] == pytest.approx(expected, rel=1e-3) and asked["seconds"] is None
    assert rows["ppo"]["cost_usd"] == 0 and rows["ppo"]["seconds"] is not None
    assert cost(rows["ppo"]) == "$0.00, runs here" and cost(asked).endswith(", gpt-4o-mini")


def test_direct_rlaif_pays_for_every_rating() -> None:
    rows = rows_of(**{"feedback.judge": PRICED, "feedback.direct": True, "feedback.scale": "broken"})
    assert {name for name, r in rows.items() if r["cost_usd"]} == {"judge-reward", "ppo", "evaluation", "judging"}


def test_thinking_costs_more_than_answering_at_once() -> None:
    quick, slow = (rows_of(**{"feedback.judge": PRICED, "feedback.rationales": n}) for n in (0, 2))
    assert slow["comparisons"]["completion_tokens"] > 100 * quick["comparisons"]["completion_tokens"]
    assert slow["comparisons"]["cost_usd"] > 5 * quick["comparisons"]["cost_usd"]


def test_a_price_that_is_not_known_names_the_model_and_is_not_zero() -> None:
    recipe = load_recipe("rlaif", {"model": "tiny-random", "dtype": "float32", "feedback.judge": UNPRICED})
    rows = estimate(recipe)
    assert {r["name"] for r in rows if r["cost_usd"] is None} == {"comparisons", "judging"} and total_cost(rows) is None
    out = io.StringIO()
    Console(file=out, width=160).print(estimate_table(recipe, rows))
    assert "price of mine not known" in out.getvalue() and "there is no price for mine" in out.getvalue()
    local = estimate(load_recipe("tiny"))
    assert total_cost(local) == 0 and all(r["cost_usd"] == 0 for r in local)


def test_a_run_says_what_it_chose(tmp_path: Path) -> None:
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(f'{{"id": "{i}", "prompt": "How do I cook dish number {i}?"}}\n' for i in range(10)))
    recipe = load_recipe("rlaif", {"prompts.helpful": str(mine), "dtype": "bfloat16", "feedback.judge": PRICED})
    said = "\n".join(chosen(recipe, Data(recipe), "auto"))
    for part in ("model smollm2", "bfloat16 (decided by auto)", "RLAIF by ppo", PRICED, "helpful 2 of 10 in"):
        assert part in said, part
