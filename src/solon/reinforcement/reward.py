"""The reward that a policy is trained to earn: a reward model, a judge's ratings, or any function of conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

from solon.engines import Engine
from solon.engines.identity import of_model
from solon.feedback.judge import ModelJudge
from solon.feedback.rating import JudgeReward
from solon.records import Chat, fingerprint
from solon.reinforcement.reward_model import RewardModel
from solon.training.saving import give_memory_back

RewardFunction = Callable[[Sequence[Chat]], Sequence[float]]
"""Takes conversations that end in a response, and gives one number per conversation, with a standard deviation of about 1."""


@dataclass(frozen=True)
class Reward:
    """A reward, and all that a run has to know of it."""

    identity: dict[str, str]
    """Name and fingerprint of the model, judge or function behind the reward."""
    score: RewardFunction
    """The reward in training."""
    measure: Callable[[Sequence[Chat]], Sequence[float | None]]
    """The reward in the evaluation; None where a conversation cannot be scored."""
    directory: str | None = None
    """The directory of a reward model. PPO puts that model on the policy's own weights where it can."""
    engines: tuple[Engine, ...] = ()
    """The engines that are asked for each score."""
    release: Callable[[], None] = lambda: None
    """Frees the memory of the reward model. The next score loads the model again."""

    @classmethod
    def of_model(cls, directory: str, dtype: str, training_dtype: str | None = None) -> Reward:
        """A reward model. It is loaded when it is first asked. training_dtype: that of `score`; None: as `dtype`, of `measure`."""
        load = cache(partial(RewardModel.load, directory))

        def measure(chats: Sequence[Chat]) -> list[float | None]:
            model = load(dtype)
            readable = [model.unfit(c) is None for c in chats]
            scores = iter(model.score([c for c, fits in zip(chats, readable, strict=True) if fits]))
            return [next(scores) if fits else None for fits in readable]

        def score(chats: Sequence[Chat]) -> list[float]:
            return load(training_dtype or dtype).score(chats)

        def release() -> None:
            load.cache_clear()
            give_memory_back()

        return cls(of_model(directory), score, measure, directory, release=release)

    @classmethod
    def of_judge(cls, rewards: JudgeReward) -> Reward:
        """A judge's ratings. A response that the judge does not rate gets the mean in training, and None in the evaluation."""
        judge, engine = rewards.judge, of_model(rewards.judge.name)
        scale = (judge.settings.scale, rewards.mean, rewards.std) if isinstance(judge, ModelJudge) else ()
        identity = {"name": engine["name"], "fingerprint": fingerprint("judge's reward", engine["fingerprint"], scale)}
        engines = (judge.engine,) if isinstance(judge, ModelJudge) else ()
        return cls(identity, rewards.score, rewards.rated_scores, engines=engines)

    @classmethod
    def of_function(cls, name: str, score: RewardFunction) -> Reward:
        """A function of yours. A run recognises the function by `name`: change the name where you change the function."""
        return cls({"name": name, "fingerprint": fingerprint("function", name)}, score, score)
