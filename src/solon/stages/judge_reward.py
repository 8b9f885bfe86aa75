"""Direct RLAIF: the reward is the judge's rating, in standard deviations of its ratings of the sampled pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from solon.errors import InputError
from solon.feedback.settings import JudgeSettings
from solon.identity import of_chats
from solon.records import assistant
from solon.runs.common import Common
from solon.stages.artifacts import JUDGE, PAIRS, REWARD
from solon.stages.base import Stage
from solon.stages.feedback_model import LabelSettings, judge_spec
from solon.stages.judging import judge_of
from solon.stages.pairs import asked_prompts, response_tokens
from solon.stages.plan import Plan
from solon.training.settings import Progress

if TYPE_CHECKING:
    from solon.runs.run import Run

REFERENCE = 128  # number of responses that the reward is normalised on


class JudgeRewardStage(Stage):
    name = "judge-reward"
    part, settings = "feedback", LabelSettings
    needs, makes = (PAIRS, JUDGE), (REWARD,)

    def runs(self, recipe: Common) -> bool:
        return recipe.of(LabelSettings).direct

    def check(self, recipe: Common) -> None:
        from solon.feedback.judges import check_rates

        if self.runs(recipe):
            try:
                check_rates(judge_spec(recipe))
            except InputError as error:
                raise ValueError(f"feedback.direct: {error}") from None

    def estimate(self, plan: Plan) -> None:
        n = min(REFERENCE, 2 * len(asked_prompts(plan.recipe, plan.data.prompts)))
        plan.add(self.name, n, questions=[plan.rating(judge_spec(plan.recipe), n, response_tokens(plan.recipe))])

    def run(self, run: Run) -> None:
        from solon.engines.identity import of_model
        from solon.feedback.rating import JudgeReward
        from solon.reinforcement.reward import Reward

        spec = run.get(JUDGE)
        engine = run.engine(spec)
        rewards = JudgeReward(judge_of(run, engine))
        reference = [(*p.prompt, assistant(r)) for p in run.get(PAIRS) for r in p.responses][:REFERENCE]
        advice = "; try feedback.scale: broken" if run.recipe.of(JudgeSettings).scale == "levels" else ""

        def work(step: Progress) -> dict[str, Any]:
            rewards.normalise(reference)
            if rewards.abstained == rewards.rated:
                raise InputError(
                    f"feedback.direct: {spec} rated none of {rewards.rated} responses: {rewards.why}{advice}"
                )
            n, abstained = len(reference), rewards.abstained
            return {"examples": n, "abstained": abstained, "mean": rewards.mean, "std": rewards.std}

        made_from = {"judge": of_model(spec), "reference": of_chats(reference)}
        result = run.once(self.name, work, engines=(engine,), made_from=made_from)
        rewards.mean, rewards.std = result["mean"], result["std"]
        run.put(REWARD, Reward.of_judge(rewards))

    def gather(self, run: Run) -> dict[str, Any]:
        none = "none was trained: the judge's rating is the reward (feedback.direct)"
        return {"reward_model": {"by_source": [], "none": none}}
