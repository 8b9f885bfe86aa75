"""RLOO, GRPO and DPO by TRL's trainers, on the same data and the same reward as PPO, for comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from solon.identity import of_inputs
from solon.publishing import Identity
from solon.records import RolloutSummary
from solon.reinforcement.settings import DPOSettings, GRPOSettings, OnlineSettings, RLOOSettings
from solon.runs.common import Common
from solon.stages.artifacts import BASE_MODEL, DATA, LEARNED, REWARD
from solon.stages.feedback_model import LabelSettings, judge_spec
from solon.stages.pairs import PairSettings, response_tokens
from solon.stages.plan import FILLED, Plan
from solon.stages.reinforcement import Reinforcement
from solon.stages.reward_model import labelled
from solon.training.settings import Log, Progress

if TYPE_CHECKING:
    from solon.runs.run import Run


class Online(Reinforcement):
    """An algorithm that samples responses and is rewarded for them (GRPO, RLOO)."""

    def online(self, recipe: Common) -> OnlineSettings:
        section = recipe.of(self.settings or OnlineSettings)
        assert isinstance(section, OnlineSettings)
        return section

    def estimate(self, plan: Plan) -> None:
        part = self.online(plan.recipe)
        response, updates = part.max_completion_length * FILLED, self.updates(plan.recipe)
        sampled = updates * part.generation_batch_size
        direct = plan.recipe.of(LabelSettings).direct
        questions = [plan.rating(judge_spec(plan.recipe), sampled, response)] if direct else []
        plan.add(
            self.name, updates, read=sampled * plan.prompt, written=sampled * response,
            trained=part.num_iterations * sampled * (plan.prompt + response), questions=questions,
        )  # fmt: skip

    def sampling(self, recipe: Common) -> tuple[float, int]:
        return self.online(recipe).temperature, self.online(recipe).max_completion_length

    def updates(self, recipe: Common) -> int:
        part = self.online(recipe)
        return -(-part.max_steps // part.steps_per_batch)

    def train(self, run: Run, log: Log, step: Progress) -> Iterator[RolloutSummary]:
        from solon.reinforcement.trl_algorithms import train_online

        recipe, reward = run.recipe, run.get(REWARD)
        assert recipe.adapter is not None
        yield from train_online(
            self.name, run.get(DATA).rl_prompts, run.get(*BASE_MODEL), reward.score, run.model("rl-cai"),
            settings=self.online(recipe), adapter=recipe.adapter, system=recipe.system, seed=recipe.seed,
            dtype=recipe.learning_dtype, log=log, progress=step,
        )  # fmt: skip

    def summary(self, run: Run, history: Sequence[RolloutSummary]) -> dict[str, Any]:
        summary = super().summary(run, history)
        return {**summary, "tokens": summary["tokens"] * self.online(run.recipe).num_iterations}


class GRPO(Online):
    name = "grpo"
    part, settings = "grpo", GRPOSettings


class RLOO(Online):
    name = "rloo"
    part, settings = "rloo", RLOOSettings


class DPO(Reinforcement):
    name = "dpo"
    part, settings = "dpo", DPOSettings

    def check(self, recipe: Common) -> None:
        super().check(recipe)
        if recipe.algorithm == self.name and recipe.of(LabelSettings).direct:
            raise ValueError("algorithm: dpo learns from comparisons, and feedback.direct makes none")

    def describe(self, recipe: Common) -> Iterable[str]:
        yield from super().describe(recipe)
        if recipe.prompts.rl_red_team or recipe.prompts.rl_helpful:
            yield f"{self.name}: prompts.rl_red_team and prompts.rl_helpful are not read, because it samples no responses"

    def estimate(self, plan: Plan) -> None:
        n, epochs = labelled(plan), plan.recipe.of(DPOSettings).num_train_epochs
        plan.add(self.name, n, trained=epochs * n * 2 * (plan.prompt + response_tokens(plan.recipe)))

    def sampling(self, recipe: Common) -> tuple[float, int]:
        """The sampling of the compared responses; a temperature of 0 counts as 1, because log-probabilities at 0 are not finite."""
        sampling = recipe.of(PairSettings).sampling
        return sampling.temperature or 1.0, sampling.max_tokens

    def made_from(self, run: Run) -> Identity:
        return {**super().made_from(run), "comparisons": of_inputs(run.get(LEARNED))}

    def train(self, run: Run, log: Log, step: Progress) -> Iterator[RolloutSummary]:
        from solon.reinforcement.trl_algorithms import train_dpo

        recipe = run.recipe
        assert recipe.adapter is not None
        yield from train_dpo(
            run.get(LEARNED), run.get(*BASE_MODEL), run.model("rl-cai"), settings=recipe.of(DPOSettings),
            adapter=recipe.adapter, system=recipe.system, seed=recipe.seed, dtype=recipe.learning_dtype, log=log,
            progress=step,
        )  # fmt: skip

    def summary(self, run: Run, history: Sequence[RolloutSummary]) -> dict[str, Any]:
        return {**super().summary(run, history), "left_out_of": len(run.get(LEARNED))}
