"""Pairs: the model that reinforcement starts from gives two responses to each prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from solon.engines import Failure, GenerationRequest
from solon.engines.sampling import SamplingSettings
from solon.records import Pair, Prompt, Source
from solon.runs.common import Common
from solon.settings import Settings
from solon.stages.artifacts import BASE_MODEL, DATA, PAIRS, SENSE_KEPT, START_MODEL
from solon.stages.base import Stage
from solon.stages.feedback_model import LabelSettings, asks_judge
from solon.stages.plan import FILLED, Plan

if TYPE_CHECKING:
    from solon.runs.run import Run


class PairSettings(Settings):
    """The pairs of responses that are compared."""

    n_prompts: int | None = Field(None, ge=1)
    """Number of training prompts that get a pair of responses, from the first one; null: all."""
    compare: Literal["all", "red_team"] = "all"
    """The prompts that get a pair of responses. red_team: of answers to helpful prompts people alone say which one is better, as in
    the paper (section 4.1); give `human.comparisons` of helpful prompts then."""
    sampling: SamplingSettings = SamplingSettings(temperature=1.0)
    """Sampling of the two responses."""

    @property
    def only(self) -> Source | None:
        """The source of the prompts that get a pair; None: prompts of every source."""
        return "red_team" if self.compare == "red_team" else None


def response_tokens(recipe: Common) -> float:
    """The estimated number of tokens of a sampled response."""
    return recipe.of(PairSettings).sampling.max_tokens * FILLED


def asked_prompts(recipe: Common, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts that get a pair of responses."""
    settings = recipe.of(PairSettings)
    return [p for p in prompts if settings.only in (None, p.source)][: settings.n_prompts]


class Pairs(Stage):
    name = "pairs"
    part, settings = "feedback", PairSettings
    needs, uses, makes = (DATA, START_MODEL), (*BASE_MODEL, SENSE_KEPT), (PAIRS,)

    def runs(self, recipe: Common) -> bool:
        return asks_judge(recipe)

    def check(self, recipe: Common) -> None:
        if recipe.of(PairSettings).only is None or not asks_judge(recipe):
            return
        if recipe.prompts.n_red_team == 0:
            raise ValueError(
                "feedback.compare: red_team compares responses to red-team prompts, and prompts.n_red_team is 0"
            )
        if recipe.of(LabelSettings).labels == "ai":
            raise ValueError(
                "feedback.compare: red_team leaves answers to helpful prompts to people; set feedback.labels to both"
            )

    def estimate(self, plan: Plan) -> None:
        n = len(asked_prompts(plan.recipe, plan.data.prompts))
        plan.add(self.name, n, read=2 * n * plan.prompt, written=2 * n * response_tokens(plan.recipe))

    def run(self, run: Run) -> None:
        seed, settings = run.recipe.seed, run.recipe.of(PairSettings).sampling
        with run.engine(run.get(*BASE_MODEL)) as engine:

            def make(batch: Sequence[Prompt]) -> Iterator[Pair]:
                requests = [GenerationRequest(f"{p.id}/{n}", p.prompt, seed=seed) for p in batch for n in range(2)]
                completions = {c.id: c for c in engine.generate(requests, settings.sampling())}
                meta = run.meta(engine, sampling=settings.model_dump())
                for p in batch:
                    first, second = completions[f"{p.id}/0"], completions[f"{p.id}/1"]
                    if (error := first.error or second.error) is not None:
                        run.fail(Failure(p.id, error, first.again or second.again))
                        continue
                    yield Pair(
                        id=p.id, prompt=p.prompt, responses=(first.text, second.text), source=p.source,
                        meta={**meta, "ended": [first.ended, second.ended]},
                    )  # fmt: skip

            prompts = asked_prompts(run.recipe, run.get(DATA).prompts)
            run.put(PAIRS, run.records(self.name, prompts, make, Pair, engines=(engine,), noun="pairs"))
