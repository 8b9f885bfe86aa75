"""A blind sample of the AI's comparisons for people to check: validation/sample.jsonl."""

from __future__ import annotations

from solon.stages.artifacts import COMPARISONS
from solon.stages.base import Context, Stage
from solon.stages.common import Common


class Validation(Stage):
    name = "validation"
    uses = (COMPARISONS,)

    def runs(self, recipe: Common) -> bool:
        return recipe.human.validation_sample > 0

    def run(self, run: Context) -> None:
        from solon.human.validation import draw_validation_sample

        n, seed = run.recipe.human.validation_sample, run.recipe.seed
        draw_validation_sample(run.dir / self.name, run.find(COMPARISONS) or [], n, seed)
