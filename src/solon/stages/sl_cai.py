"""SL-CAI: SFT on the revisions, with some demonstrations kept in so that nothing is forgotten."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from solon.errors import InputError
from solon.settings import Settings
from solon.stages.artifacts import CHAINS, CHOICES, DATA, START_MODEL, SUPERVISED_MODEL, WARM_MODEL
from solon.stages.base import Stage
from solon.stages.revisions import RevisionSettings
from solon.tables import counted
from solon.training.settings import TrainSettings

if TYPE_CHECKING:
    from solon.runs.common import Common
    from solon.runs.run import Run
    from solon.stages.plan import Plan


class SLCAISettings(Settings):
    """The examples that SL-CAI learns."""

    sft_on: Literal["final", "all", "best"] = "final"
    """`final` learns the last revision of each chain, `all` every revision, `best` the response or the last revision."""
    demonstration_share: float = Field(0.25, ge=0, lt=1)
    """Share of people's demonstrations among the examples, from the first one; 0: none."""
    train: TrainSettings = TrainSettings()
    """How the model is trained."""


class SLCAI(Stage):
    name = "sl-cai"
    part, settings, optional = "supervised", SLCAISettings, True
    needs, uses, makes = (CHAINS, DATA, START_MODEL), (WARM_MODEL, CHOICES), (SUPERVISED_MODEL,)

    def check(self, recipe: Common) -> None:
        from solon.stages.feedback_model import LabelSettings

        if recipe.of(SLCAISettings).sft_on == "best" and recipe.of(LabelSettings).labels == "human":
            raise ValueError("supervised.sft_on: best needs a judge, and feedback.labels: human has none")

    def estimate(self, plan: Plan) -> None:
        from solon.stages.plan import FILLED

        part, steps = plan.recipe.of(SLCAISettings), plan.recipe.of(RevisionSettings)
        learned = len(plan.data.prompts) * (steps.revisions if part.sft_on == "all" else 1)
        learned = round(learned / (1 - part.demonstration_share))
        each = plan.prompt + steps.sampling.max_tokens * FILLED
        plan.add(self.name, learned, trained=part.train.epochs * learned * each + plan.opening(part.train, learned))

    def run(self, run: Run) -> None:
        from solon.stages.sft import train_on
        from solon.supervised.dataset import from_chains, from_choices, from_responses, mix

        part, only = run.recipe.of(SLCAISettings), run.recipe.of(RevisionSettings).only
        chains = [c for c in run.get(CHAINS) if only in (None, c.source)]
        own, left_out = from_responses(c for c in run.get(CHAINS) if only not in (None, c.source))
        if part.sft_on == "best":
            learned, unlearned = from_choices(chains, run.get(CHOICES))
        else:
            learned, unlearned = from_chains(chains, part.sft_on)
        left_out = dict(Counter(left_out) + Counter(unlearned))
        if not [*learned, *own]:
            limit = run.recipe.of(RevisionSettings).sampling.max_tokens
            raise InputError(
                f"sl-cai: none of the {sum(left_out.values())} texts is whole ({counted(left_out)}; "
                f"supervised.sampling.max_tokens: {limit}); raise it, or use a model that ends its answers"
            )
        examples = mix([*learned, *own], run.get(DATA).demonstrations, part.demonstration_share)
        model = run.get(WARM_MODEL, START_MODEL)
        run.put(SUPERVISED_MODEL, train_on(run, self.name, examples, model, part.train, left_out=left_out))
