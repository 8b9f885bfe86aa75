"""Evaluation: every model answers the held-out prompts, Solon measures the answers, and the judge compares them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from solon.engines import Engine, Failure, GenerationRequest
from solon.engines.sampling import SamplingSettings
from solon.records import Comparison, Pair, Prompt, assistant
from solon.runs import Artifact
from solon.settings import Settings
from solon.stages.artifacts import BASE_MODEL, DATA, JUDGE, POLICY, REWARD, START_MODEL
from solon.stages.base import Stage
from solon.stages.feedback_model import LabelSettings, asks_judge, judge_spec
from solon.stages.judging import judge_of
from solon.stages.plan import FILLED, Plan
from solon.stages.reinforcement import policy_name
from solon.stages.revisions import RevisionSettings
from solon.stages.warmup import WarmupSettings
from solon.tables import Section

if TYPE_CHECKING:
    from solon.analysis.measures import Answer
    from solon.runs.run import Run

Answers = dict[str, list["Answer"]]  # by the model's name, from "start" to the last
Wins = dict[str, dict[str, list[float]]]  # by the model's name and the prompts' source, the values of `win_rates`
ANSWERS = Artifact[Answers]("answers")
WINS = Artifact[Wins]("judge's preferences")


class EvaluationSettings(Settings):
    """Measuring the models at the end of a run."""

    sampling: SamplingSettings = SamplingSettings()
    """Sampling of the answers to the held-out prompts."""
    judge_comparisons: int = Field(48, ge=0)
    """Number of answers of each model that the judge compares with the start model's answers to the same prompts; 0: none."""


class Evaluation(Stage):
    name = "evaluation"
    part, settings = "evaluation", EvaluationSettings
    needs, uses, makes = (DATA, START_MODEL, POLICY, REWARD), (*BASE_MODEL, JUDGE), (ANSWERS, WINS)

    def estimate(self, plan: Plan) -> None:
        recipe, settings, heldout = plan.recipe, plan.recipe.of(EvaluationSettings), len(plan.data.heldout)
        middle = recipe.find(WarmupSettings) is not None or recipe.find(RevisionSettings) is not None
        models, response = 2 + middle, settings.sampling.max_tokens * FILLED
        n, direct = models * heldout, recipe.of(LabelSettings).direct
        rated = [plan.rating(judge_spec(recipe), n, response)] if direct else []
        plan.add(self.name, n, read=n * plan.prompt, written=n * response, questions=rated)
        each = min(heldout, settings.judge_comparisons)
        if asks_judge(recipe) and each:
            pairs = (models - 1) * each
            plan.add("judging", pairs, questions=[plan.comparing(judge_spec(recipe), pairs, response)])

    def run(self, run: Run) -> None:
        models = models_of(run)
        answers = {name: self.answer(run, name, spec) for name, spec in models.items()}
        run.get(REWARD).release()  # the judge needs the memory
        wins: Wins = {}
        if run.find(JUDGE) is not None and run.recipe.of(EvaluationSettings).judge_comparisons:
            with run.engine(run.get(JUDGE)) as engine:
                compare = partial(judge_of(run, engine).compare, failed=run.fail)
                wins = {name: win_rates(run, name, answers, engine, compare) for name in models if name != "start"}
        run.put(ANSWERS, answers)
        run.put(WINS, wins)

    def answer(self, run: Run, name: str, spec: str) -> list[Answer]:
        """One answer per prompt. All models get the same seeds, so that differences between models are paired."""
        from solon.analysis.measures import Answer

        reward, seed = run.get(REWARD), run.recipe.seed
        sampling = run.recipe.of(EvaluationSettings).sampling.sampling()
        with run.engine(spec) as engine:

            def make(batch: Sequence[Prompt]) -> Iterator[Answer]:
                by_id = {p.id: p for p in batch}
                answered = []
                for c in engine.generate([GenerationRequest(p.id, p.prompt, seed) for p in batch], sampling):
                    if c.error is None:
                        answered.append(c)
                    else:
                        run.fail(Failure(c.id, c.error, c.again))
                scores = reward.measure([(*by_id[c.id].prompt, assistant(c.text)) for c in answered])
                for c, score in zip(answered, scores, strict=True):
                    p = by_id[c.id]
                    yield Answer(id=p.id, prompt=p.prompt, answer=c.text, ended=c.ended, source=p.source, reward=score)

            return run.records(
                f"evaluation-{name.lower()}", run.get(DATA).heldout, make, Answer, engines=(engine, *reward.engines),
                noun="answers", made_from={"reward": reward.identity},
            )  # fmt: skip

    def gather(self, run: Run) -> dict[str, Any]:
        from solon.analysis.answers import changes, measures, side_by_side
        from solon.analysis.measures.builtin import REWARD as REWARD_NAME

        answers, wins = run.get(ANSWERS), run.get(WINS)
        steps = changes(answers, wins)
        return {
            "models": list(answers),
            "measures": measures(answers, wins),
            "changes": steps,
            "differences": next(c["steps"] for c in steps if c["name"] == REWARD_NAME),
            "answers": side_by_side(answers),
        }

    def sections(self, data: dict[str, Any]) -> list[Section]:
        from solon.stages.show_answers import changes, measures

        return [*measures(data), changes(data)]

    def checks(self, run: Run, data: dict[str, Any]) -> list[dict[str, Any]]:
        from solon.analysis.checks import of_answers

        return of_answers(data)


def models_of(run: Run) -> dict[str, str]:
    """The models that are compared, by name: the start model, the supervised model where there is one, and the policy."""
    start, base = run.get(START_MODEL), run.get(*BASE_MODEL)
    middle = "SFT" if run.recipe.find(RevisionSettings) is None else "SL-CAI"
    return {"start": start, **({middle: base} if base != start else {}), policy_name(run.recipe): run.get(POLICY)}


def win_rates(
    run: Run, name: str, answers: Answers, engine: Engine, compare: Callable[[Sequence[Pair]], Iterable[Comparison]]
) -> dict[str, list[float]]:
    """By source, for each pair: 1 where the judge prefers the model's answer to the start model's, 0 where it does not.

    Equal answers, and ties, count one half. Abstentions are left out.
    """
    from solon.analysis.answers import SOURCES
    from solon.measures.statistics import preference

    start, limit = {a.id: a for a in answers["start"]}, run.recipe.of(EvaluationSettings).judge_comparisons
    sources = [source for source, _ in SOURCES if any(a.source == source for a in answers[name])]
    wins: dict[str, list[float]] = {source: [] for source, _ in SOURCES}
    for source in sources:
        both = [a for a in answers[name] if a.source == source and a.id in start][: -(-limit // len(sources))]
        pairs = [
            Pair(id=a.id, prompt=a.prompt, responses=(a.answer, start[a.id].answer), source=a.source)
            for a in both
            if a.answer.strip() != start[a.id].answer.strip()
        ]
        stage = f"judging-{name.lower()}-{source.replace('_', '-')}"
        judged = run.records(stage, pairs, compare, Comparison, engines=(engine,), noun="comparisons")
        equal = [0.5] * (len(both) - len(pairs))
        wins[source] = equal + [preference(c.p_first) for c in judged if c.p_first is not None]
    return wins
