"""A run: the stages of its recipe, one after the other. This file names no stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from solon.constitution import load_constitution
from solon.engines import scheme_of
from solon.engines.identity import of_model
from solon.errors import InputError
from solon.feedback.checks import require_runnable
from solon.feedback.judge import asked_constitution
from solon.feedback.settings import JudgeSettings
from solon.models.dtype import Work, decide
from solon.models.weights import resolve
from solon.recipes.recipe import Recipe, RecipeBase, load_recipe
from solon.runs.run import Run
from solon.stages import in_order
from solon.stages.artifacts import DATA, START_MODEL
from solon.stages.data import Data
from solon.stages.feedback_model import asks_judge
from solon.stages.ppo import GoldSettings


def run_stages(run: Run, asked_dtype: str | None = None) -> None:
    """Run every stage of the run's recipe that is not finished. asked_dtype: as `chosen` takes it."""
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
    """Lines for the user: the values that this run takes where the recipe leaves them open, and the held-out data.

    asked_dtype: the recipe's dtype before `resolved` decided it.
    """
    measured = " (decided by auto)" if asked_dtype == "auto" else ""
    yield f"model {recipe.model}, dtype {recipe.dtype}{measured}, seed {recipe.seed}"
    for stage in in_order(recipe):
        yield from stage.describe(recipe)
    yield from data.describe()


def models_used(recipe: Recipe, start: str) -> dict[str, str]:
    """The fingerprint of each model that the recipe names, by key. A resumed run must have the same weights."""
    return {key: of_model(spec)["fingerprint"] for key, spec in {**recipe.models(), "model": start}.items()}


def resolved(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with each `auto` dtype decided once for the whole run, also where the run is resumed.

    Raises InputError where a principle that the judge is asked has a check that cannot run here, and where an older Solon began
    the run with the settings of another section. No model is loaded before that.
    """
    judging = recipe.of(JudgeSettings)
    if asks_judge(recipe) or recipe.of(GoldSettings).judge is not None:
        require_runnable(asked_constitution(load_constitution(recipe.constitution), judging).principles)
    dtypes: dict[str, str] = {"dtype": recipe.dtype, "training_dtype": recipe.training_dtype or recipe.dtype}
    works: dict[str, Work] = {"dtype": "generation", "training_dtype": "training"}
    path = out / "recipe.yaml"
    earlier = load_recipe(str(path)) if path.is_file() else None
    if earlier and earlier.algorithm in type(earlier).model_fields.keys() - earlier.model_fields_set:
        raise InputError(
            f"{path}: an older Solon began this run and took the settings of {earlier.algorithm} from the section ppo; "
            "give --out a new directory"
        )
    before = earlier.model_dump() if earlier else {}
    for name, work in works.items():
        if dtypes[name] == "auto":  # a model outside this process has no dtype to measure
            dtypes[name] = before.get(name) or (
                "float32" if scheme_of(recipe.model) else decide(resolve(recipe.model), work)
            )
    return recipe.model_copy(update=dtypes)


def start_model(run: Run) -> str:
    """The recipe's model. `tiny-random`, a model with random weights for tests, is made now."""
    if run.recipe.model != "tiny-random":
        return run.recipe.model
    from solon.models.tiny import make_tiny_model

    return str(make_tiny_model(run.model("start"), seed=run.recipe.seed))
