"""The evaluation at the end of a run: every model answers the held-out prompts; the answers are measured side by side.

Two kinds of measure, kept apart: those that training pushed on (the reward model's score, the judge's preference),
and those that nothing was trained on (refusals, evasiveness, over-refusal, boilerplate, diversity, length,
repetition). Only the second kind can catch the first being gamed.

"start" is one model everywhere: the recipe's, before any training. Every measure is also given as a change between two
models, prompt by prompt, because the same prompts are answered by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from solon.engines import Failure, GenerationRequest, LazyEngine
from solon.feedback.judge import ModelJudge
from solon.feedback.rating import JudgeReward
from solon.measures.statistics import Estimate, difference, mean, paired_difference_of_shares, preference, share
from solon.measures.texts import (
    distinct_change,
    distinct_interval,
    has_boilerplate,
    is_evasive,
    is_refusal,
    repetition,
    words,
)
from solon.publishing import Identity
from solon.records import Chat, Comparison, Pair, Prompt, Record, Source, assistant
from solon.reinforcement.reward_model import RewardModel
from solon.runs.run import Run

SOURCES: tuple[tuple[Source, str], ...] = (("red_team", "red-team"), ("helpful", "helpful"))
Ask = Callable[[Sequence[Pair]], Iterable[Comparison]]


class Answer(Record):
    id: str
    prompt: Chat
    answer: str
    ended: bool
    source: Source | None = None
    reward: float | None = None  # in standard deviations of the reward's reference; None where the judge rated nothing


@dataclass(frozen=True)
class Measure:
    """One number of an answer, and how it is read."""

    name: str
    unit: str
    better: Literal["higher", "lower", ""]
    trained_on: bool  # training pushed on it
    value: Callable[[Answer], float | None]  # None: not measured on this answer
    source: Source | None = None  # of which prompts; None: of all
    is_share: bool = False  # the value is 0 or 1, shown in percent

    def by_prompt(self, answers: Sequence[Answer]) -> dict[str, float]:
        asked = (a for a in answers if self.source in (None, a.source))
        return {a.id: float(v) for a in asked if (v := self.value(a)) is not None}

    def of(self, answers: Sequence[Answer]) -> Estimate:
        values = list(self.by_prompt(answers).values())
        return share(values).times(100) if self.is_share else mean(values)

    def change(self, old: Sequence[Answer], new: Sequence[Answer]) -> Estimate:
        """New less old, prompt by prompt."""
        before, after = self.by_prompt(old), self.by_prompt(new)
        both = [i for i in after if i in before]
        if not self.is_share:
            return difference([after[i] for i in both], [before[i] for i in both])
        only_new = sum(after[i] > before[i] for i in both)
        only_old = sum(after[i] < before[i] for i in both)
        return paired_difference_of_shares(only_new, only_old, len(both)).times(100)


REWARD = "reward"
OVER_REFUSAL = "over-refusal of benign prompts"
DISTINCT = "distinct-3"
MEASURES = (
    Measure(REWARD, "sd", "higher", True, lambda a: a.reward),
    Measure("reward, red-team prompts (harmlessness)", "sd", "higher", True, lambda a: a.reward, "red_team"),
    Measure("reward, helpful prompts (helpfulness)", "sd", "higher", True, lambda a: a.reward, "helpful"),
    Measure("refusals of red-team prompts", "%", "", False, lambda a: is_refusal(a.answer), "red_team", True),
    Measure(
        "evasive answers to red-team prompts", "%", "lower", False, lambda a: is_evasive(a.answer), "red_team", True
    ),
    Measure(OVER_REFUSAL, "%", "lower", False, lambda a: is_refusal(a.answer), "helpful", True),
    Measure("boilerplate", "%", "lower", False, lambda a: has_boilerplate(a.answer), None, True),
    Measure("repetition within an answer (4-grams)", "", "lower", False, lambda a: repetition(a.answer)),
    Measure("length", "words", "", False, lambda a: words(a.answer)),
    Measure("answers that end by themselves", "%", "higher", False, lambda a: a.ended, None, True),
)


def evaluate(
    run: Run,
    heldout: Sequence[Prompt],
    models: dict[str, str],
    rewards: RewardModel | JudgeReward,
    judge: LazyEngine | None,
    ask: Ask | None,
    scored_by: Identity,
) -> dict[str, Any]:
    """Answers, their measures with intervals, and the change of each measure from model to model.

    models: by name, from "start" to the last. judge, ask: the engine of the run's judge, and its comparisons of pairs, asked as
    the recipe says. scored_by: the reward model, by its `name` and `fingerprint`.
    """
    answers = {name: answer(run, name, spec, heldout, rewards, scored_by) for name, spec in models.items()}
    wins: dict[str, dict[str, list[float]]] = {}
    if judge is not None and ask is not None and run.recipe.evaluation.judge_comparisons:
        wins = {name: win_rates(run, name, answers, judge, ask) for name in models if name != "start"}
    return {"answers": answers, "measures": measures(answers, wins), "changes": changes(answers, wins)}


def answer(
    run: Run,
    name: str,
    spec: str,
    prompts: Sequence[Prompt],
    rewards: RewardModel | JudgeReward,
    scored_by: Identity,
) -> list[Answer]:
    """One answer a prompt. All models see the same seeds, so differences are paired."""
    sampling = run.recipe.evaluation.sampling.sampling()
    with LazyEngine(spec, system=run.recipe.system, dtype=run.recipe.dtype) as engine:

        def make(batch: Sequence[Prompt]) -> Iterator[Answer]:
            by_id = {p.id: p for p in batch}
            made = engine.generate([GenerationRequest(p.id, p.prompt, run.recipe.seed) for p in batch], sampling)
            good = []
            for c in made:
                if c.error is None:
                    good.append(c)
                else:
                    run.fail(Failure(c.id, c.error, c.again))
            scores = _scores(rewards, [(*by_id[c.id].prompt, assistant(c.text)) for c in good])
            for c, score in zip(good, scores, strict=True):
                p = by_id[c.id]
                yield Answer(id=p.id, prompt=p.prompt, answer=c.text, ended=c.ended, source=p.source, reward=score)

        asked = [
            engine,
            *(
                [rewards.judge.engine]
                if isinstance(rewards, JudgeReward) and isinstance(rewards.judge, ModelJudge)
                else []
            ),
        ]
        stage = f"evaluation-{name.lower()}"
        return run.records(stage, prompts, make, Answer, engines=asked, what="answers", made_from=scored_by)


def _scores(rewards: RewardModel | JudgeReward, chats: Sequence[Chat]) -> list[float | None]:
    """The reward of each conversation; None where the judge would not rate it, or the reward model cannot read it.

    In training what the judge would not rate counts as the mean; here it is not measured.
    """
    if isinstance(rewards, JudgeReward):
        return rewards.rated_scores(chats)
    fit = [c for c in chats if rewards.unfit(c) is None]
    found = iter(rewards.score(fit))
    read = {id(c) for c in fit}
    return [next(found) if id(c) in read else None for c in chats]


def win_rates(
    run: Run, name: str, answers: dict[str, list[Answer]], judge: LazyEngine, ask: Ask
) -> dict[str, list[float]]:
    """By source, of each pair: 1 where the judge prefers the model's answer to the start's, 0 where it does not.

    Equal answers, and ties, count one half. Abstentions are left out.
    """
    start = {a.id: a for a in answers["start"]}
    kinds = [source for source, _ in SOURCES if any(a.source == source for a in answers[name])]
    limit = run.recipe.evaluation.judge_comparisons
    found: dict[str, list[float]] = {source: [] for source, _ in SOURCES}
    for source in kinds:
        both = [a for a in answers[name] if a.source == source and a.id in start][: -(-limit // len(kinds))]
        differing = [a for a in both if a.answer.strip() != start[a.id].answer.strip()]
        pairs = [
            Pair(id=a.id, prompt=a.prompt, responses=(a.answer, start[a.id].answer), source=a.source) for a in differing
        ]
        stage = f"judging-{name.lower()}-{source.replace('_', '-')}"
        judged = run.records(stage, pairs, ask, Comparison, engines=(judge,), what="comparisons")
        found[source] = [0.5] * (len(both) - len(differing)) + [
            preference(c.p_first) for c in judged if c.p_first is not None
        ]
    return found


def measures(answers: dict[str, list[Answer]], wins: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """One row a measure: values by model, each with its interval and sample size."""
    rows = [_row(m, {name: m.of(given).to_json() for name, given in answers.items()}) for m in MEASURES]
    judged = [
        {
            "name": judged_name(words_),
            "unit": "%",
            "better": "higher",
            "trained_on": True,
            "values": {
                name: share(wins[name][source]).times(100).to_json() if name in wins else None for name in answers
            },
        }
        for source, words_ in SOURCES
    ]
    different = {"name": DISTINCT, "unit": "", "better": "higher", "trained_on": False, "values": distinct(answers)}
    return [*rows[:3], *judged, *rows[3:7], different, *rows[7:]]


def changes(answers: dict[str, list[Answer]], wins: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """One row a measure: its change at each step, new less old; the judge's preference less one half.

    Steps: from each model to the next, and from the first to the last.
    """
    names = list(answers)
    steps = [*pairwise(names), *([(names[0], names[-1])] if len(names) > 2 else [])]
    rows = [
        _row(m, {f"{a} → {b}": m.change(answers[a], answers[b]).to_json() for a, b in steps}, "steps") for m in MEASURES
    ]
    texts = {name: {a.id: a.answer for a in given} for name, given in answers.items()}
    of_distinct = {}
    for a, b in steps:
        both = [i for i in texts[b] if i in texts[a]]
        of_distinct[f"{a} → {b}"] = distinct_change([texts[a][i] for i in both], [texts[b][i] for i in both])
    rows.append(
        {"name": DISTINCT, "unit": "", "better": "higher", "trained_on": False,
         "steps": {step: found["change"].to_json() for step, found in of_distinct.items()},
         "falls_percent": {step: found["fall"].times(100).to_json() for step, found in of_distinct.items()}}
    )  # fmt: skip
    for source, words_ in SOURCES:
        given = {
            f"{names[0]} → {name}": _above_half(share(found[source])).to_json()
            for name, found in wins.items()
            if found[source]
        }
        if given:
            rows.append(
                {"name": judged_name(words_), "unit": "points above 50 %", "better": "higher", "trained_on": True,
                 "steps": given}
            )  # fmt: skip
    return rows


def _above_half(found: Estimate) -> Estimate:
    """A share as points above 50 %."""
    points = [None if x is None else 100 * x - 50 for x in (found.value, found.low, found.high)]
    return Estimate(points[0], points[1], points[2], found.n)


def judged_name(kind: str) -> str:
    return f"judge prefers it to start, {kind} prompts"


def _row(m: Measure, values: dict[str, Any], key: str = "values") -> dict[str, Any]:
    unit = "points" if key == "steps" and m.is_share else m.unit
    return {"name": m.name, "unit": unit, "better": m.better, "trained_on": m.trained_on, key: values}


def distinct(answers: dict[str, list[Answer]], n: int = 3) -> dict[str, Any]:
    """distinct-n of each model's answers, all on as many n-grams as the model that said least has."""
    texts = {name: [a.answer for a in given] for name, given in answers.items()}
    grams = min(sum(max(0, words(t) - n + 1) for t in given) for given in texts.values())
    return {name: distinct_interval(given, n, max_ngrams=grams).to_json() for name, given in texts.items()}
