"""The judge of a run: one object, made from the recipe, that every stage asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from solon.constitution import Principle
from solon.engines import LazyEngine
from solon.feedback.settings import JudgeSettings
from solon.records import Comparison, Pair
from solon.stages.artifacts import DATA

if TYPE_CHECKING:
    from solon.feedback.judge import Judge
    from solon.runs.run import Run


def judge_of(run: Run, engine: LazyEngine) -> Judge:
    """The recipe's judge with this engine: it has the recipe's question or principles, its examples and its settings."""
    from solon.feedback.judges import open_judge
    from solon.feedback.questions import TEMPLATE_FINGERPRINT

    return open_judge(
        engine, run.constitution, run.recipe.of(JudgeSettings), run.get(DATA).comparisons, seed=run.recipe.seed,
        meta=lambda: run.meta(engine, template=TEMPLATE_FINGERPRINT),
    )  # fmt: skip


def judge_pairs(
    run: Run, judge: str, stage: str, pairs: Sequence[Pair], *, asked: Mapping[str, Sequence[Principle]] | None = None,
    noun: str = "comparisons", left_out: Mapping[str, int] | None = None,
) -> list[Comparison]:  # fmt: skip
    """The judge compares pairs, and the comparisons are the records of a stage.

    judge: the model, named as for `--model`. asked: by pair id, the principles to judge under; None: drawn as the recipe says.
    noun, left_out: as `Run.records` takes them.
    """
    with run.engine(judge) as engine:
        make = partial(judge_of(run, engine).compare, asked=asked, failed=run.fail)
        return run.records(stage, pairs, make, Comparison, engines=(engine,), noun=noun, left_out=left_out)


def trust_in(comparisons: Sequence[Comparison], judge: str) -> dict[str, Any]:
    """How far a judge can be trusted, measured on comparisons that it made: the summary of `feedback.trust`."""
    from solon.feedback.trust import Trust

    trust = Trust(judge)
    for comparison in comparisons:
        trust.add(comparison)
    return trust.summary()
