"""The judge compares held-out human comparisons, which no model was trained on, asked as the recipe asks it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from solon.feedback.principles import own_principles
from solon.feedback.settings import JudgeSettings
from solon.runs.common import Common
from solon.stages.artifacts import DATA, HELDOUT_JUDGED, JUDGE
from solon.stages.base import Stage
from solon.stages.feedback_model import asks_judge, judge_spec
from solon.stages.judging import judge_pairs, trust_in
from solon.stages.pairs import response_tokens
from solon.stages.plan import Plan
from solon.tables import Section
from solon.terminal import note

if TYPE_CHECKING:
    from solon.runs.run import Run


class JudgeHeldout(Stage):
    name = "judge-heldout"
    needs, makes = (DATA, JUDGE), (HELDOUT_JUDGED,)

    def runs(self, recipe: Common) -> bool:
        return asks_judge(recipe)

    def estimate(self, plan: Plan) -> None:
        n, response = len(plan.data.heldout_comparisons), response_tokens(plan.recipe)
        plan.add(self.name, n, questions=[plan.comparing(judge_spec(plan.recipe), n, response, principles=1)])

    def run(self, run: Run) -> None:
        from solon.feedback.judge import asked_constitution
        from solon.feedback.labels import as_pairs

        human, settings, seed = run.get(DATA).heldout_comparisons, run.recipe.of(JudgeSettings), run.recipe.seed
        # A comparison is judged under its own principle where this run's constitution has it, else as any pair of this run.
        constitution = asked_constitution(run.constitution, settings)
        asked, others = own_principles(human, constitution, principles=settings.principles_per_pair, seed=seed)
        if others:
            note(
                f"{others} of {len(human)} held-out human comparisons were made under no principle of this run's "
                "constitution; they are judged under its own"
            )
        run.put(HELDOUT_JUDGED, judge_pairs(run, run.get(JUDGE), self.name, as_pairs(human, seed), asked=asked))

    def gather(self, run: Run) -> dict[str, Any]:
        judged = run.get(HELDOUT_JUDGED)
        return {"trust": {"heldout": trust_in(judged, run.get(JUDGE))}} if judged else {}

    def sections(self, data: dict[str, Any]) -> list[Section]:
        from solon.stages import show_judge

        return [*show_judge.judge(data), *show_judge.trust(data)]
