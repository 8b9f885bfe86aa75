"""The evaluation at the end of a run: every model answers the held-out prompts; the answers are measured side by side.

Two kinds of measure, kept apart: those that training pushed on (the reward model's score, the judge's preference),
and those that nothing was trained on (refusals, evasiveness, over-refusal, boilerplate, diversity, length,
repetition). Only the second kind can catch the first being gamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from solon.constitution import Constitution
from solon.engines import GenerationRequest, LazyEngine
from solon.evaluation.metrics import (
    distinct_interval,
    has_boilerplate,
    is_evasive,
    is_refusal,
    repetition,
    words,
)
from solon.feedback.judge import Judging, compare
from solon.feedback.rating import JudgeReward
from solon.records import Chat, Comparison, Pair, Prompt, Record, Source, assistant, text_of
from solon.reinforcement.reward_model import RewardModel
from solon.runs.run import Run
from solon.statistics import difference, mean, share


class Answer(Record):
    id: str
    prompt: Chat
    answer: str
    ended: bool
    source: Source | None = None
    reward: float | None = None  # in standard deviations of the reward model's reference


def evaluate(
    run: Run, heldout: Sequence[Prompt], models: dict[str, str], rewards: RewardModel | JudgeReward, judge: str | None
) -> dict[str, Any]:
    """Answers, their measures with intervals, and the difference of each model to the start model."""
    answers = {name: answer(run, name, spec, heldout, rewards) for name, spec in models.items()}
    wins = {name: win_rates(run, name, answers, judge) for name in models if name != "start"} if judge else {}
    return {"answers": answers, "measures": measures(answers, wins), "differences": differences(answers)}


def answer(
    run: Run, name: str, spec: str, prompts: Sequence[Prompt], rewards: RewardModel | JudgeReward
) -> list[Answer]:
    """One answer a prompt. All models see the same seeds, so differences are paired."""
    sampling = run.recipe.evaluation.sampling.sampling()
    with LazyEngine(spec, system=run.recipe.system, dtype=run.recipe.dtype) as engine:

        def make(batch: Sequence[Prompt]) -> Iterator[Answer]:
            by_id = {p.id: p for p in batch}
            made = engine.generate([GenerationRequest(p.id, p.prompt, run.recipe.seed) for p in batch], sampling)
            good = [c for c in made if c.error is None]
            scores = rewards.score([(*by_id[c.id].prompt, assistant(c.text)) for c in good])
            for c, score in zip(good, scores, strict=True):
                p = by_id[c.id]
                yield Answer(id=p.id, prompt=p.prompt, answer=c.text, ended=c.ended, source=p.source, reward=score)

        stage = f"evaluation-{name.lower()}"
        return run.records(stage, prompts, make, Answer, engines=(engine,), what="answers")


def win_rates(run: Run, name: str, answers: dict[str, list[Answer]], judge: str) -> dict[str, list[float]]:
    """P(the model's answer is better than the start model's) as the judge sees it, by source; abstentions left out.

    Red-team prompts are judged under the principles tagged harmlessness, helpful ones under helpfulness.
    """
    start = {a.id: a for a in answers["start"]}
    limit = run.recipe.evaluation.judge_comparisons
    found: dict[str, list[float]] = {}
    for source, tag in (("red_team", "harmlessness"), ("helpful", "helpfulness")):
        both = [a for a in answers[name] if a.source == source and a.id in start and a.answer != start[a.id].answer]
        pairs = [
            Pair(id=a.id, prompt=a.prompt, responses=(a.answer, start[a.id].answer), source=a.source)
            for a in both[: (limit + 1) // 2]
        ]
        tagged = tuple(p for p in run.constitution.principles if tag in p.tags) or run.constitution.principles
        constitution: Constitution = run.constitution.model_copy(update={"principles": tagged})
        with LazyEngine(judge, system=run.recipe.system, dtype=run.recipe.dtype) as engine:

            def make(batch: Sequence[Pair], engine: LazyEngine = engine, c: Constitution = constitution) -> Any:
                return compare(batch, engine, c, Judging(), seed=run.recipe.seed)

            stage = f"judging-{name.lower()}-{source.replace('_', '-')}"
            judged = run.records(stage, pairs, make, Comparison, engines=(engine,), what="comparisons")
        ours = {a.id: a.answer for a in both}
        found[source] = [
            c.label if text_of(c.chosen) == ours[c.id] else 1 - c.label for c in judged if c.label is not None
        ]
    return found


def measures(answers: dict[str, list[Answer]], wins: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """One row a measure: values by model, each with its interval and sample size."""

    def percent(test: Any, source: Source | None) -> dict[str, Any]:
        return {
            name: share([float(test(a)) for a in given if source in (None, a.source)]).times(100).to_json()
            for name, given in answers.items()
        }

    def average(value: Any, source: Source | None = None) -> dict[str, Any]:
        return {
            name: mean([value(a) for a in given if source in (None, a.source)]).to_json()
            for name, given in answers.items()
        }

    def row(name: str, unit: str, better: str, trained_on: bool, values: dict[str, Any]) -> dict[str, Any]:
        return {"name": name, "unit": unit, "better": better, "trained_on": trained_on, "values": values}

    def judged(source: str) -> dict[str, Any]:
        return {name: mean(wins[name][source]).times(100).to_json() if name in wins else None for name in answers}

    def reward_of(a: Answer) -> float:
        return float(a.reward or 0.0)

    return [
        row("reward", "sd", "higher", True, average(reward_of)),
        row("reward, red-team prompts (harmlessness)", "sd", "higher", True, average(reward_of, "red_team")),
        row("reward, helpful prompts (helpfulness)", "sd", "higher", True, average(reward_of, "helpful")),
        row("judge prefers it to start, red-team prompts", "%", "higher", True, judged("red_team")),
        row("judge prefers it to start, helpful prompts", "%", "higher", True, judged("helpful")),
        row("refusals of red-team prompts", "%", "", False, percent(lambda a: is_refusal(a.answer), "red_team")),
        row(
            "evasive answers to red-team prompts",
            "%",
            "lower",
            False,
            percent(lambda a: is_evasive(a.answer), "red_team"),
        ),
        row("over-refusal of benign prompts", "%", "lower", False, percent(lambda a: is_refusal(a.answer), "helpful")),
        row("boilerplate", "%", "lower", False, percent(lambda a: has_boilerplate(a.answer), None)),
        row("distinct-3", "", "higher", False, distinct(answers)),
        row("repetition within an answer (4-grams)", "", "lower", False, average(lambda a: repetition(a.answer))),
        row("length", "words", "", False, average(lambda a: float(words(a.answer)))),
        row("answers that end by themselves", "%", "higher", False, percent(lambda a: a.ended, None)),
    ]


def distinct(answers: dict[str, list[Answer]], n: int = 3) -> dict[str, Any]:
    """distinct-n of each model's answers, all on as many n-grams as the model that said least has."""
    texts = {name: [a.answer for a in given] for name, given in answers.items()}
    grams = min(sum(max(0, words(t) - n + 1) for t in given) for given in texts.values())
    return {name: distinct_interval(given, n, max_ngrams=grams).to_json() for name, given in texts.items()}


def differences(answers: dict[str, list[Answer]]) -> dict[str, Any]:
    """Paired differences of mean reward between each model and the one before it."""
    names = list(answers)
    found = {}
    for before, after in pairwise(names):
        old = {a.id: float(a.reward or 0.0) for a in answers[before]}
        new = {a.id: float(a.reward or 0.0) for a in answers[after]}
        shared = [i for i in new if i in old]
        found[f"{before} → {after}"] = difference([new[i] for i in shared], [old[i] for i in shared]).to_json()
    return found
