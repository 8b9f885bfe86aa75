"""The judge of a run: one object, made from the recipe, that every stage asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from solon.engines import LazyEngine
from solon.feedback.settings import JudgeSettings
from solon.records import Comparison
from solon.stages.artifacts import DATA, JUDGE

if TYPE_CHECKING:
    from solon.feedback.judge import Judge
    from solon.runs.run import Run


def judge_of(run: Run, engine: LazyEngine | None = None) -> Judge:
    """The recipe's judge: its question or principles, its examples, its labels. engine: None: of the run's judge."""
    from solon.feedback.judges import open_judge
    from solon.feedback.questions import TEMPLATE_FINGERPRINT

    engine = run.engine(run.get(JUDGE)) if engine is None else engine
    return open_judge(
        engine, run.constitution, run.recipe.of(JudgeSettings), run.get(DATA).comparisons, seed=run.recipe.seed,
        meta=lambda: run.meta(engine, template=TEMPLATE_FINGERPRINT),
    )  # fmt: skip


def trust_in(comparisons: Sequence[Comparison], judge: str) -> dict[str, Any]:
    """How far a judge can be trusted, by comparisons that it made."""
    from solon.feedback.trust import Trust

    trust = Trust(judge)
    for comparison in comparisons:
        trust.add(comparison)
    return trust.summary()
