"""The KL of the written policy to the model that its training started from, on the held-out prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from solon.runs.common import Common
from solon.stages.artifacts import BASE_MODEL, DATA, KL, POLICY, START_MODEL
from solon.stages.base import Stage
from solon.stages.plan import FILLED, Plan
from solon.stages.reinforcement import Reinforcement
from solon.tables import Section
from solon.training.settings import Progress

if TYPE_CHECKING:
    from solon.runs.run import Run


def algorithm_of(recipe: Common) -> Reinforcement:
    """The stage of the recipe's algorithm."""
    from solon.stages import all_stages  # imports every stage, so only when a stage is asked

    return next(s for s in all_stages() if isinstance(s, Reinforcement) and s.name == recipe.algorithm)


class KLStage(Stage):
    name = "kl"
    needs, uses, makes = (DATA, POLICY, START_MODEL), BASE_MODEL, (KL,)

    def estimate(self, plan: Plan) -> None:
        n, response = len(plan.data.heldout), algorithm_of(plan.recipe).sampling(plan.recipe)[1] * FILLED
        read = 3 * n * plan.prompt + 2 * n * response  # responses are sampled once and read by two models
        plan.add(self.name, n, read=read, written=n * response)

    def run(self, run: Run) -> None:
        from solon.analysis.kl import kl_of_written
        from solon.engines.identity import of_model

        policy, reference, heldout = run.get(POLICY), run.get(*BASE_MODEL), run.get(DATA).heldout
        temperature, max_tokens = algorithm_of(run.recipe).sampling(run.recipe)

        def work(step: Progress) -> dict[str, Any]:
            return kl_of_written(
                policy, reference, heldout, system=run.recipe.system, temperature=temperature, max_tokens=max_tokens,
                seed=run.recipe.seed, dtype=run.recipe.dtype, progress=step,
            )  # fmt: skip

        made_from = {"policy": of_model(policy), "reference": of_model(reference)}
        run.put(KL, run.once(self.name, work, total=2 * len(heldout), noun="responses read", made_from=made_from))

    def gather(self, run: Run) -> dict[str, Any]:
        return {"kl": {k: v for k, v in run.get(KL).items() if k != "by_prompt"}}

    def sections(self, data: dict[str, Any]) -> list[Section]:
        from solon.stages.show_reinforcement import kl

        return [kl(data)]

    def checks(self, run: Run, data: dict[str, Any]) -> list[dict[str, Any]]:
        from solon.analysis.checks import of_kl
        from solon.reinforcement.settings import KL_BOUND, PPOSettings

        bound = run.recipe.of(PPOSettings).kl_bound if run.recipe.algorithm == "ppo" else KL_BOUND
        return [of_kl(data["kl"], bound)]
