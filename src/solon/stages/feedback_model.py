"""The feedback model: the judge, first trained on human comparisons where the recipe says so, and `solon feedback-model`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from solon.constitution import of_constitution
from solon.data import read_comparisons
from solon.data.heldout import split_by_prompt
from solon.engines import scheme_of
from solon.feedback.questions import HHH
from solon.feedback.settings import FeedbackTrainSettings, JudgeSettings
from solon.identity import of_inputs, of_records
from solon.models.settings import AdapterSettings
from solon.runs.common import Common
from solon.runs.options import CONSTITUTION, OUT, REQUIRED, TO_MODEL, TRAINED_MODEL, Option, Training, Verb
from solon.settings import Settings
from solon.stages.artifacts import DATA, JUDGE, START_MODEL, WARM_MODEL
from solon.stages.base import Stage
from solon.stages.plan import Plan
from solon.training.settings import Progress

if TYPE_CHECKING:
    from solon.runs.call import Call
    from solon.runs.run import Run


class LabelSettings(Settings):
    """The comparisons that the reward model learns."""

    labels: Literal["ai", "human", "both"] = "ai"
    """Comparisons to learn from: `ai` the judge's, `human` people's (then no judge is asked at all), `both` all of them."""
    direct: bool = False
    """Direct RLAIF: true trains no reward model, and the judge's rating of a response is the reward."""


class FeedbackModelSettings(Settings):
    """The model that judges."""

    judge: str = "self"
    """The judge: self is the run's own model, after the warm-up where there is one; or any model, named as for --model."""
    warmup: FeedbackTrainSettings | None = None
    """Training of the judge on the human comparisons before it judges; null: the judge is used as it is."""
    adapter: AdapterSettings | None = None
    """LoRA adapters of that training, because judging is learned in the lower blocks too; null: the recipe's `adapter`."""


def asks_judge(recipe: Common) -> bool:
    """Whether this recipe has AI feedback."""
    return recipe.of(LabelSettings).labels != "human"


def judge_spec(recipe: Common) -> str:
    """The judge's model, as far as the recipe names it before a run."""
    judge = recipe.of(FeedbackModelSettings).judge
    return recipe.model if judge == "self" else judge


class FeedbackModel(Stage):
    name = "feedback-model"
    part, settings = "feedback", FeedbackModelSettings
    needs, uses, makes = (START_MODEL, DATA), (WARM_MODEL,), (JUDGE,)

    def runs(self, recipe: Common) -> bool:
        return asks_judge(recipe)

    def check(self, recipe: Common) -> None:
        part, labels = recipe.of(FeedbackModelSettings), recipe.of(LabelSettings)
        if labels.labels != "ai" and not recipe.human.comparisons:
            raise ValueError(f"feedback.labels: {labels.labels} needs human.comparisons")
        if part.warmup and not recipe.human.comparisons:
            raise ValueError("feedback.warmup needs human.comparisons to learn from")
        if part.warmup and scheme_of(part.judge):
            raise ValueError("feedback.warmup fine-tunes a local model; remove it, or the server or decision judge")
        if labels.direct and labels.labels != "ai":
            raise ValueError(f"feedback.direct: the reward is the judge's; labels: {labels.labels} go to none")
        if labels.direct and recipe.of(JudgeSettings).ask == "each":
            raise ValueError(
                "feedback.ask: each compares; feedback.direct rates responses by feedback.scale; leave ask out"
            )
        if recipe.of(JudgeSettings).few_shot and not recipe.human.comparisons:
            raise ValueError("feedback.few_shot needs human.comparisons to take its examples from")

    def models(self, recipe: Common) -> dict[str, str]:
        judge = recipe.of(FeedbackModelSettings).judge
        return {} if judge == "self" or not asks_judge(recipe) else {"feedback.judge": judge}

    def describe(self, recipe: Common) -> Iterable[str]:
        part = recipe.of(FeedbackModelSettings)
        judge = "the run's own model" if part.judge == "self" else part.judge
        yield f"judge: {judge}{', first trained on the human comparisons' if part.warmup else ''}"

    def gather(self, run: Run) -> dict[str, Any]:
        return {"judge_model": run.recipe.of(FeedbackModelSettings).judge}

    def warnings(self, run: Run) -> list[str]:
        if run.recipe.of(FeedbackModelSettings).judge != "self":
            return []
        return [
            "The judge is the run's own model: the reward and judge columns are measured by the models that trained it, so "
            "read them beside the measures that nothing was trained on."
        ]

    def estimate(self, plan: Plan) -> None:
        if (train := plan.recipe.of(FeedbackModelSettings).warmup) is not None:
            asked, n = plan.recipe.of(JudgeSettings).ask, len(plan.data.comparisons)
            each = plan.prompt + 130 if asked == "pair" else plan.prompt / 2 + 80
            opening = plan.opening(train, n, answers=2) + (
                train.opening_epochs * n * 2 * 40 if train.opening_tokens else 0
            )
            plan.add(self.name, 2 * n, trained=train.epochs * 2 * n * each + opening)

    def run(self, run: Run) -> None:
        from solon.engines.identity import of_model
        from solon.feedback.feedback_model import train_feedback_model
        from solon.feedback.judge import asked_constitution

        recipe, part = run.recipe, run.recipe.of(FeedbackModelSettings)
        judge = run.get(WARM_MODEL, START_MODEL) if part.judge == "self" else part.judge
        if part.warmup is None:
            run.put(JUDGE, judge)
            return
        settings, out, judging = part.warmup, run.model(self.name), recipe.of(JudgeSettings)
        comparisons = run.get(DATA).comparisons

        def work(step: Progress) -> dict[str, Any]:
            with run.tracked(self.name, step, settings) as step:
                return train_feedback_model(
                    comparisons, asked_constitution(run.constitution, judging), judge, out, question=judging.question or HHH,
                    settings=settings, adapter=part.adapter or recipe.adapter, system=recipe.system, ask=judging.ask, seed=recipe.seed,
                    dtype=recipe.learning_dtype, progress=step,
                )  # fmt: skip

        made_from = {"judge": of_model(judge), "comparisons": of_inputs(comparisons)}
        run.once(self.name, work, makes=out, made_from=made_from)
        run.put(JUDGE, str(out))


class FeedbackModelVerb(Verb):
    """Train a small model to judge, and measure it on comparisons that it was not trained on.

    Example: `solon feedback-model --comparisons solon:comparisons-harmless --comparisons solon:comparisons-helpful --out judge`
    """

    name = "feedback-model"
    takes = (
        Option("comparisons", list[str], REQUIRED, "A file of labelled comparisons (TRL preference, HH, or Solon's), or a shipped set; repeatable."),
        OUT, CONSTITUTION, TRAINED_MODEL,
        Option("ask", str, "pair", "pair: the judge compares two responses; each: it is asked of each response by itself."),
        Option("heldout", float, 0.2, "Share of the comparisons kept out of training, to measure the judge; 0: none.", 0, 0.9),
    )  # fmt: skip
    settings = (FeedbackTrainSettings, AdapterSettings)
    common = TO_MODEL
    trains = True

    def run(self, call: Call) -> None:
        from solon.feedback.feedback_model import measure_judge, train_feedback_model

        constitution, settings, adapter = call.constitution, call.of(FeedbackTrainSettings), call.of(AdapterSettings)
        files: list[str] = call["comparisons"]
        ask = call.of(JudgeSettings, ask=call["ask"]).ask

        def prepare() -> Training:
            rows = [c for name in files for c in read_comparisons(name)][: call.limit]
            training, heldout = split_by_prompt(rows, call["heldout"], call.seed)

            def train(out: Path, dtype: str, step: Progress) -> dict[str, Any]:
                return train_feedback_model(
                    training, constitution, call["model"], out, question=HHH, settings=settings, adapter=adapter,
                    system=call.system, ask=ask, seed=call.seed, dtype=dtype, progress=step,
                )  # fmt: skip

            def measure(out: Path, dtype: str) -> dict[str, Any]:
                return measure_judge(str(out), heldout, constitution, system=call.system, dtype=dtype, ask=ask)

            made_from = {
                "comparisons": of_records(rows),
                **of_constitution(constitution),
                "heldout": call["heldout"],
                "ask": ask,
            }
            return Training(made_from, train, measure if heldout else None)

        result = call.training(files, prepare)
        if "heldout" in result:
            accuracy = result["heldout"]["calibration"]["accuracy"]
            value, low, high = accuracy["value"], accuracy["low"], accuracy["high"]
            if None in (value, low, high):
                line = (
                    "agreement could not be measured: no held-out comparison prefers a side, or the judge answered none"
                )
            else:
                line = f"agrees with {value:.1%} [{low:.1%}, {high:.1%}] of {accuracy['n']} held-out comparisons"
            call.tell(f"{call.out}: {line}")
        call.result(result)
