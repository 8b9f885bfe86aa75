"""What a policy is trained to earn: a reward model, a judge's ratings, or any function of conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from solon.engines import Engine
from solon.engines.identity import of_model
from solon.feedback.judge import ModelJudge
from solon.feedback.rating import JudgeReward
from solon.records import Chat, fingerprint
from solon.reinforcement.reward_model import RewardModel

Scores = Sequence[float | None]


@dataclass(frozen=True)
class Reward:
    """score: one number a conversation that ends in a response, in units of about one standard deviation.

    measure: the same for the evaluation; None where a conversation has no score. identity: name and fingerprint of what
    makes the reward. directory: of a reward model, which PPO puts on the policy's own weights where it can. engines: those
    that are asked for each score.
    """

    identity: dict[str, str]
    score: Callable[[Sequence[Chat]], Sequence[float]]
    measure: Callable[[Sequence[Chat]], Scores]
    directory: str | None = None
    engines: tuple[Engine, ...] = ()

    @classmethod
    def of_model(cls, directory: str, dtype: str) -> Reward:
        """A reward model, loaded when it is first asked."""

        @cache
        def model() -> RewardModel:
            return RewardModel.load(directory, dtype)

        def measure(chats: Sequence[Chat]) -> Scores:
            fit = [c for c in chats if model().unfit(c) is None]
            found = iter(model().score(fit))
            read = {id(c) for c in fit}
            return [next(found) if id(c) in read else None for c in chats]

        return cls(of_model(directory), lambda chats: model().score(chats), measure, directory)

    @classmethod
    def of_judge(cls, rewards: JudgeReward) -> Reward:
        """A judge's ratings. What it would not rate counts as the mean in training, and is not measured afterwards."""
        judge, made = rewards.judge, of_model(rewards.judge.name)
        scale = (judge.settings.scale, rewards.mean, rewards.std) if isinstance(judge, ModelJudge) else ()
        identity = {"name": made["name"], "fingerprint": fingerprint("judge's reward", made["fingerprint"], scale)}
        engines = (judge.engine,) if isinstance(judge, ModelJudge) else ()
        return cls(identity, rewards.score, rewards.rated_scores, engines=engines)

    @classmethod
    def of_function(cls, name: str, score: Callable[[Sequence[Chat]], Sequence[float]]) -> Reward:
        """A function of yours. Change its name where you change what it computes: a run tells rewards apart by it."""
        return cls({"name": name, "fingerprint": fingerprint("function", name)}, score, score)
