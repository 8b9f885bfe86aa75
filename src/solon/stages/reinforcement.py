"""The common part of the stages of all reinforcement algorithms. The recipe's `algorithm` names the one that runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from solon.analysis.kl import at_same_kl
from solon.engines import Engine
from solon.publishing import Identity
from solon.records import RolloutSummary
from solon.runs import Artifact
from solon.runs.common import Common
from solon.stages.artifacts import (
    BASE_MODEL,
    COMPARISONS,
    DATA,
    LEARNED,
    PAIRS,
    POLICY,
    REWARD,
    SENSE_KEPT,
    START_MODEL,
)
from solon.stages.base import Stage
from solon.stages.feedback_model import LabelSettings
from solon.stages.revisions import RevisionSettings
from solon.tables import Section
from solon.training.settings import Log, Progress

if TYPE_CHECKING:
    from solon.runs.run import Run


def policy_name(recipe: Common) -> str:
    """The name of the reinforced model in the report."""
    if recipe.find(RevisionSettings) is not None:
        return "RL-CAI"
    return "RLHF" if recipe.of(LabelSettings).labels == "human" else "RLAIF"


class Reinforcement(Stage):
    """A reinforcement algorithm. A subclass defines `name`, `settings`, `train`, `sampling` and `estimate`."""

    needs: ClassVar[tuple[Artifact[Any], ...]] = (DATA, START_MODEL, REWARD)
    uses: ClassVar[tuple[Artifact[Any], ...]] = (*BASE_MODEL, SENSE_KEPT, LEARNED, PAIRS, COMPARISONS)
    makes: ClassVar[tuple[Artifact[Any], ...]] = (POLICY,)

    @abstractmethod
    def train(self, run: Run, log: Log, step: Progress) -> Iterator[RolloutSummary]:
        """Train the policy and write it to `run.model("rl-cai")`. Yields one summary per update."""

    @abstractmethod
    def sampling(self, recipe: Common) -> tuple[float, int]:
        """Temperature and token limit of the policy's answers, for the measure of its KL to the reference."""

    def summary(self, run: Run, history: Sequence[RolloutSummary]) -> dict[str, Any]:
        """The result of the training in stage.json."""
        return {
            "examples": len(history),
            "left_out": history[-1].meta.get("left_out", {}) if history else {},
            "left_out_of": len(run.get(DATA).rl_prompts),
            "last_rollouts_kl_nats": history[-1].kl_nats
            if history
            else None,  # measured before the last update's steps
            "written_after": len(history),
            "gamed": False,
            **usage(history),
        }

    def made_from(self, run: Run) -> Identity:
        from solon.engines.identity import of_model

        return {"model": of_model(run.get(*BASE_MODEL)), "reward": run.get(REWARD).identity}

    def engines(self, run: Run) -> list[Engine]:
        """The engines that are asked while the policy trains."""
        return list(run.get(REWARD).engines)

    def updates(self, recipe: Common) -> int:
        """The number of updates that the progress line counts."""
        return 1

    def begin(self, run: Run) -> None:
        """Prepare the training, before the stage's journal is opened."""

    def runs(self, recipe: Common) -> bool:
        return recipe.algorithm == self.name

    def describe(self, recipe: Common) -> Iterable[str]:
        yield f"{policy_name(recipe)} by {self.name}"
        given = recipe.model_fields_set
        if self.part and self.part not in given and "ppo" in given:
            yield f"{self.name}: the section {self.part} is left out, so its defaults count; the section ppo is not read"

    def check(self, recipe: Common) -> None:
        if recipe.algorithm == self.name and recipe.adapter is None:
            raise ValueError(f"{self.name} needs adapter: the reference model is the policy without it")

    def run(self, run: Run) -> None:
        out, made_from = run.model("rl-cai"), self.made_from(run)
        run.folder(self.name).take_up(made_from)  # may rename the folder, so it comes before the journal is opened
        self.begin(run)
        with run.journal(self.name) as append:

            def work(step: Progress) -> dict[str, Any]:
                config = run.recipe.of(self.settings).model_dump(mode="json") if self.settings else {}
                with run.log(self.name, config) as log:
                    for summary in self.train(run, log, step):
                        append({"id": f"update-{summary.update}", **summary.to_json()})
                history = [RolloutSummary.model_validate(row) for row in run.journalled(self.name)]
                return self.summary(run, sorted(history, key=lambda u: u.update))

            run.once(
                self.name, work, engines=self.engines(run), total=self.updates(run.recipe), noun="updates", makes=out,
                made_from=made_from,
            )  # fmt: skip
        run.put(POLICY, str(out))

    def gather(self, run: Run) -> dict[str, Any]:
        updates = run.journalled(self.name)
        return {"algorithm": self.name, "ppo": updates, "same_kl": at_same_kl(updates)}

    def sections(self, data: dict[str, Any]) -> list[Section]:
        from solon.stages.show_reinforcement import ppo

        return ppo(data) if (data.get("algorithm") or "ppo") == self.name else []


def usage(history: Sequence[RolloutSummary]) -> dict[str, Any]:
    """The tokens that the rollouts read and wrote, for the ledger."""
    sampled = round(sum((h.response_tokens or 0.0) * h.meta["rollouts"] for h in history))
    prompts = sum(h.meta["prompt_tokens"] for h in history)
    return {"usage": (prompts, sampled), "tokens": prompts + sampled}
