"""Choices: the judge compares the last revision of each chain with its response, where SL-CAI learns the better of the two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from solon.runs.common import Common
from solon.stages.artifacts import CHAINS, CHOICES, JUDGE
from solon.stages.base import Stage
from solon.stages.feedback_model import judge_spec
from solon.stages.judging import judge_pairs
from solon.stages.plan import FILLED, Plan
from solon.stages.revisions import RevisionSettings
from solon.stages.sl_cai import SLCAISettings

if TYPE_CHECKING:
    from solon.runs.run import Run


class Choices(Stage):
    name = "choices"
    needs, makes = (CHAINS, JUDGE), (CHOICES,)

    def runs(self, recipe: Common) -> bool:
        part = recipe.find(SLCAISettings)
        return part is not None and part.sft_on == "best"

    def estimate(self, plan: Plan) -> None:
        n, tokens = len(plan.data.prompts), plan.recipe.of(RevisionSettings).sampling.max_tokens * FILLED
        plan.add(self.name, n, questions=[plan.comparing(judge_spec(plan.recipe), n, tokens, principles=1)])

    def run(self, run: Run) -> None:
        from solon.supervised.dataset import contests

        chains = [c for c in run.get(CHAINS) if c.steps]
        principles = {p.id: p for p in run.constitution.principles}
        last = {
            c.id: [principles[c.steps[-1].principle]] for c in chains
        }  # each chain's last revision is judged by its principle
        pairs = contests(chains)
        run.put(CHOICES, judge_pairs(run, run.get(JUDGE), self.name, pairs, asked=last, noun="choices"))
