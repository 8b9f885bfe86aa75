"""A blind sample of the judge's comparisons for people to check: validation/sample.jsonl."""

from __future__ import annotations

from typing import TYPE_CHECKING

from solon.human.validation import draw_validation_sample
from solon.runs.common import Common
from solon.stages.artifacts import COMPARISONS
from solon.stages.base import Stage

if TYPE_CHECKING:
    from solon.runs.run import Run


class Validation(Stage):
    name = "validation"
    uses = (COMPARISONS,)

    def runs(self, recipe: Common) -> bool:
        return recipe.human.validation_sample > 0

    def run(self, run: Run) -> None:
        n, seed = run.recipe.human.validation_sample, run.recipe.seed
        draw_validation_sample(run.dir / self.name, run.find(COMPARISONS) or [], n, seed)
