"""Choices: where SL-CAI learns the better of two, the judge chooses between each last revision and its response."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from solon.records import Comparison
from solon.runs.common import Common
from solon.stages.artifacts import CHAINS, CHOICES, JUDGE
from solon.stages.base import Stage
from solon.stages.judging import judge_of

if TYPE_CHECKING:
    from solon.runs.run import Run
    from solon.stages.plan import Plan


class Choices(Stage):
    name = "choices"
    needs, makes = (CHAINS, JUDGE), (CHOICES,)

    def runs(self, recipe: Common) -> bool:
        from solon.stages.sl_cai import SLCAISettings

        part = recipe.find(SLCAISettings)
        return part is not None and part.sft_on == "best"

    def estimate(self, plan: Plan) -> None:
        from solon.stages.feedback_model import judge_spec
        from solon.stages.plan import FILLED
        from solon.stages.revisions import RevisionSettings

        n, text = len(plan.data.prompts), plan.recipe.of(RevisionSettings).sampling.max_tokens * FILLED
        plan.add(self.name, n, questions=[plan.comparing(judge_spec(plan.recipe), n, text, principles=1)])

    def run(self, run: Run) -> None:
        from solon.supervised.dataset import contests

        chains = run.get(CHAINS)
        known = {p.id: p for p in run.constitution.principles}
        asked = {c.id: [known[c.steps[-1].principle]] for c in chains}  # the principle it was last revised by
        with run.engine(run.get(JUDGE)) as engine:
            make = partial(judge_of(run, engine).compare, asked=asked, failed=run.fail)
            found = run.records(self.name, contests(chains), make, Comparison, engines=(engine,), noun="choices")
        run.put(CHOICES, found)
