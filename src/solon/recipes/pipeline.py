"""A run: the stages of its recipe, one after the other. Which stages there are, is theirs to say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from solon.engines import scheme_of
from solon.engines.identity import of_model
from solon.models.dtype import Work, decide
from solon.models.weights import resolve
from solon.recipes.recipe import Recipe, RecipeBase, load_recipe
from solon.runs.run import Run
from solon.stages import in_order
from solon.stages.artifacts import DATA, START_MODEL
from solon.stages.data import Data


def run_stages(run: Run, asked_dtype: str | None = None) -> None:
    """Run every stage of the run's recipe, or what is left of them. asked_dtype: as `chosen` takes it."""
    recipe, data = run.recipe, Data(run.recipe)
    assert isinstance(recipe, RecipeBase)
    run.claim("inputs.json", json.dumps(data.inputs(), indent=1) + "\n")
    for line in chosen(recipe, data, asked_dtype):
        run.say(line)
    start = start_model(run)
    run.claim("models.json", json.dumps(models_used(recipe, start), indent=1) + "\n")
    run.put(DATA, data)
    run.put(START_MODEL, start)
    for stage in in_order(recipe):
        stage.run(run)


def chosen(recipe: Recipe, data: Data, asked_dtype: str | None = None) -> Iterator[str]:
    """What this run takes where the recipe leaves it open, and what it holds out: a few lines for a person.

    asked_dtype: the dtype before it was decided, where that was done.
    """
    measured = " (auto: the faster one here)" if asked_dtype == "auto" else ""
    yield f"model {recipe.model}, dtype {recipe.dtype}{measured}, seed {recipe.seed}"
    for stage in in_order(recipe):
        yield from stage.describe(recipe)
    yield from data.describe()


def models_used(recipe: Recipe, start: str) -> dict[str, str]:
    """The fingerprint of each model that the recipe names: a resumed run must have the same weights."""
    named = {**recipe.models(), "model": start}
    return {role: of_model(spec)["fingerprint"] for role, spec in named.items()}


def resolved(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with each `auto` dtype decided once for the whole run, however often it is resumed."""
    wanted: dict[str, str] = {"dtype": recipe.dtype, "training_dtype": recipe.training_dtype or recipe.dtype}
    works: dict[str, Work] = {"dtype": "generation", "training_dtype": "training"}
    kept = out / "recipe.yaml"
    before = load_recipe(str(kept)).model_dump() if kept.is_file() else {}
    for name, work in works.items():
        if wanted[name] == "auto":
            wanted[name] = before.get(name) or decided(recipe.model, work)
    return recipe.model_copy(update=wanted)


def decided(model: str, work: Work) -> str:
    """The dtype for this work with the run's own model; float32 where the model is not in this process."""
    return "float32" if scheme_of(model) else decide(resolve(model), work)


def start_model(run: Run) -> str:
    """The recipe's model; `tiny-random` is made on the spot (for tests: it knows nothing)."""
    if run.recipe.model != "tiny-random":
        return run.recipe.model
    from solon.models.tiny import make_tiny_model

    return str(make_tiny_model(run.model("start"), seed=run.recipe.seed))
