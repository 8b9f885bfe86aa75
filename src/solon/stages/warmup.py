"""Warm-up: the start model learns from people how to answer, how to criticise and how to revise.

A weak model's own critiques are noise; it first learns from people what one is. A strong model needs no warm-up.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from solon.models.settings import AdapterSettings
from solon.runs.common import Common
from solon.settings import Settings
from solon.stages.artifacts import DATA, START_MODEL, WARM_MODEL
from solon.stages.base import Stage
from solon.stages.revisions import RevisionSettings
from solon.training.settings import TrainSettings

if TYPE_CHECKING:
    from solon.records import RevisionChain, SFTExample
    from solon.runs.run import Run
    from solon.stages.data import Data
    from solon.stages.plan import Plan
    from solon.supervised.dataset import Examples


def revisions_taught(recipe: Common, data: Data) -> list[RevisionChain]:
    """The revision demonstrations to learn: those of prompts that the recipe revises."""
    settings = recipe.find(RevisionSettings)
    only = settings.only if settings else None
    return [c for c in data.revision_demonstrations if only is None or c.source in (None, only)]


def answers_taught(settings: WarmupSettings, data: Data, seed: int) -> tuple[Examples, list[SFTExample]]:
    """The answers to learn whole, with the number of comparisons that give none, by reason; and the answers of which the first
    tokens alone are learned."""
    from solon.supervised.dataset import from_preferred

    answers, n = data.demonstrations, settings.answers_whole
    drawn = range(len(answers)) if n is None else random.Random(seed).sample(range(len(answers)), min(n, len(answers)))
    whole = [answers[i] for i in sorted(drawn)]
    opened = [answers[i] for i in sorted({*range(len(answers))} - {*drawn})]
    preferred, left_out = from_preferred(data.comparisons if settings.preferred != "none" else [])
    (whole if settings.preferred == "whole" else opened).extend(preferred)
    return (whole, left_out), opened


class WarmupSettings(Settings):
    """SFT of the start model on the demonstrations by people, before all other stages."""

    train: TrainSettings = TrainSettings()
    """How the model is trained."""
    answers_whole: int | None = Field(None, ge=0)
    """Number of demonstrated answers that are learned whole, drawn by the seed; null: all. Of the others the first tokens alone are
    learned, as `train.opening_tokens` says. A small model then has more time for critiques and revisions."""
    preferred: Literal["none", "opening", "whole"] = "none"
    """Beside the demonstrations, learn the better response of each human comparison, one for each prompt. none: do not. whole: the
    whole response. opening: its first tokens alone, as `train.opening_tokens` says. The first tokens teach which requests to decline,
    even where a small model wrote the rest of the response."""
    adapter: AdapterSettings | None = None
    """Adapters of this training; null: the recipe's `adapter`. A small model needs adapters on all blocks here."""


class Warmup(Stage):
    name = "warmup"
    part, settings, optional = "warmup", WarmupSettings, True
    needs, makes = (START_MODEL, DATA), (WARM_MODEL,)

    def check(self, recipe: Common) -> None:
        if not (recipe.human.demonstrations or recipe.human.revision_demonstrations):
            raise ValueError("warmup needs human.demonstrations or human.revision_demonstrations to learn from")
        part = recipe.of(WarmupSettings)
        if part.preferred != "none" and not recipe.human.comparisons:
            raise ValueError("warmup.preferred needs human.comparisons to learn from")
        for name, needed in (
            ("preferred: opening", part.preferred == "opening"),
            ("answers_whole", part.answers_whole is not None),
        ):
            if needed and not part.train.opening_tokens:
                raise ValueError(f"warmup.{name} needs warmup.train.opening_tokens")
        if part.answers_whole == 0 and not recipe.human.revision_demonstrations:
            raise ValueError(
                "warmup.answers_whole: 0 leaves nothing to learn whole without human.revision_demonstrations"
            )

    def estimate(self, plan: Plan) -> None:
        from solon.stages.plan import WORDS_TO_TOKENS

        part, data = plan.recipe.of(WarmupSettings), plan.data
        (answered, _), opened = answers_taught(part, data, plan.recipe.seed)
        answers = sum(sum(len(m.content.split()) for m in e.messages) + 20 for e in answered)
        chains = sum(
            (len(c.response.split()) + sum(len((s.critique + s.revision).split()) for s in c.steps)) * WORDS_TO_TOKENS
            + plan.prompt + 2 * plan.request
            for c in revisions_taught(plan.recipe, data)
        )  # fmt: skip
        count = len(answered) + len(opened) + len(revisions_taught(plan.recipe, data))
        opening = plan.opening(part.train, len(answered) + len(opened))
        plan.add(self.name, count, trained=part.train.epochs * (answers * WORDS_TO_TOKENS + chains) + opening)

    def run(self, run: Run) -> None:
        from solon.stages.sft import train_on
        from solon.supervised.dataset import from_demonstrated_revisions

        part, data = run.recipe.of(WarmupSettings), run.get(DATA)
        taught = revisions_taught(run.recipe, data)
        revised, left_out = from_demonstrated_revisions(taught, run.constitution)
        if others := len(data.revision_demonstrations) - len(taught):
            left_out["revision of a prompt whose kind is not revised"] = others
        (answered, undecided), opened = answers_taught(part, data, run.recipe.seed)
        model = train_on(
            run, self.name, [*answered, *revised], run.get(START_MODEL), part.train, part.adapter,
            left_out=left_out | undecided, opening_examples=opened,
        )  # fmt: skip
        run.put(WARM_MODEL, model)
