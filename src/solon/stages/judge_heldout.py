"""The judge on human comparisons that nothing was trained on, asked as the recipe asks it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from solon.records import Comparison
from solon.runs.common import Common
from solon.stages.artifacts import DATA, HELDOUT_JUDGED, JUDGE
from solon.stages.base import Stage
from solon.stages.feedback_model import asks_judge, judge_spec
from solon.stages.judging import judge_of, trust_in
from solon.tables import Section
from solon.terminal import note

if TYPE_CHECKING:
    from solon.runs.run import Run
    from solon.stages.plan import Plan


class JudgeHeldout(Stage):
    name = "judge-heldout"
    needs, makes = (DATA, JUDGE), (HELDOUT_JUDGED,)

    def runs(self, recipe: Common) -> bool:
        return asks_judge(recipe)

    def estimate(self, plan: Plan) -> None:
        from solon.stages.pairs import response_tokens

        n, response = len(plan.data.heldout_comparisons), response_tokens(plan.recipe)
        plan.add(self.name, n, questions=[plan.comparing(judge_spec(plan.recipe), n, response, principles=1)])

    def run(self, run: Run) -> None:
        from solon.feedback.labels import as_pairs
        from solon.feedback.principles import own_principles

        human = run.get(DATA).heldout_comparisons
        with run.engine(run.get(JUDGE)) as engine:
            judge = judge_of(run, engine)
            # Each under its own principle where the run's constitution has that, else as any pair of this run.
            drawn = judge.settings.principles_per_pair
            asked, others = own_principles(human, judge.constitution, principles=drawn, seed=run.recipe.seed)
            if others:
                note(
                    f"{others} of {len(human)} held-out human comparisons were made under no principle of this run's "
                    "constitution; they are judged under its own"
                )
            make = partial(judge.compare, asked=asked, failed=run.fail)
            pairs = as_pairs(human, run.recipe.seed)
            found = run.records(self.name, pairs, make, Comparison, engines=(engine,), noun="comparisons")
        run.put(HELDOUT_JUDGED, found)

    def gather(self, run: Run) -> dict[str, Any]:
        judged = run.get(HELDOUT_JUDGED)
        return {"trust": {"heldout": trust_in(judged, run.get(JUDGE))}} if judged else {}

    def sections(self, data: dict[str, Any]) -> list[Section]:
        from solon.stages import show_judge

        return [*show_judge.judge(data), *show_judge.trust(data)]
