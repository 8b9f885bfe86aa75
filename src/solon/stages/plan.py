"""The estimate of `--dry-run`: stages add rows from the data, the lengths of texts and the prices of judges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from solon.constitution import load_constitution
from solon.engines import is_remote, model_name
from solon.feedback.settings import JudgeSettings
from solon.runs.common import Common
from solon.stages.data import Data
from solon.training.settings import TrainSettings

WORDS_TO_TOKENS = 1.4  # tokens per English word in current vocabularies; an estimate needs no tokenizer
FILLED = 0.75  # a sampled text is taken to fill this share of its token limit


@dataclass(frozen=True)
class Questions:
    """The questions of a stage to one judge."""

    judge: str  # the model, named as for --model
    sent: float  # tokens of all questions
    here: float  # tokens that a model in this process computes: common beginnings of the questions count once
    written: float  # tokens of the answers


class Plan:
    """The rows of an estimate. Stages add their rows in the order in which they run."""

    def __init__(self, recipe: Common) -> None:
        self.recipe, self.data = recipe, Data(recipe)
        self.rows: list[dict[str, Any]] = []

    @cached_property
    def prompt(self) -> float:
        """Mean number of tokens of a prompt."""
        return _mean(sum(len(m.content.split()) for m in p.prompt) for p in self.data.prompts) + 20

    @cached_property
    def request(self) -> float:
        """Mean number of tokens of a critique request or a revision request."""
        rules = load_constitution(self.recipe.constitution).principles
        return _mean(len((p.critique + p.revision).split()) * WORDS_TO_TOKENS / 2 for p in rules) + 8

    @cached_property
    def principles(self) -> int:
        """Number of principles that a pair is judged under."""
        settings = self.recipe.of(JudgeSettings)
        if settings.question:
            return 1
        return settings.principles_per_pair or len(load_constitution(self.recipe.constitution).principles)

    def add(
        self, name: str, records: int, *, read: float = 0, written: float = 0, trained: float = 0,
        questions: Sequence[Questions] = (),
    ) -> None:  # fmt: skip
        """Add a row. read, written, trained: numbers of tokens, without those of the questions."""
        prices = {model_name(q.judge): _price(q) for q in questions if is_remote(q.judge) and q.sent}
        unpriced = sorted(name for name, usd in prices.items() if usd is None)
        self.rows.append(
            {
                "name": name,
                "records": records,
                "prompt_tokens": round(read + sum(q.sent for q in questions)),
                "completion_tokens": round(written + sum(q.written for q in questions)),
                "trained_tokens": round(trained),
                "here": round(read + sum(q.here for q in questions)),
                "endpoints": sorted(prices),
                "unpriced": unpriced,
                "cost_usd": None if unpriced else round(sum(usd or 0.0 for usd in prices.values()), 6),
            }
        )

    def opening(self, train: TrainSettings, examples: int, answers: int = 1) -> float:
        """The tokens that a training on first tokens goes over. answers: of one example; they share its prompt."""
        if not train.opening_tokens:
            return 0.0
        return train.opening_epochs * examples * (self.prompt + answers * train.opening_tokens)

    def comparing(self, judge: str, pairs: int, response: float, principles: int | None = None) -> Questions:
        """The questions of a judge that compares pairs in both orders.

        response: tokens of one response. principles: per pair; None: the number that the recipe sets.
        """
        settings = self.recipe.of(JudgeSettings)
        principles = 1 if settings.together else principles or self.principles
        examples = settings.few_shot * (self.prompt + 2 * response + 50)
        if settings.ask == "each":  # two short questions take the place of the two orders
            sent = pairs * principles * 2 * (self.prompt + response + 50)
            here = pairs * (self.prompt + 2 * (response + principles * 50))
            return Questions(judge, sent, here, pairs * principles * 2 * is_remote(judge))
        question = self.prompt + 2 * response + 50 + examples
        count = pairs * principles * 2
        here = pairs * (self.prompt + examples + 2 * (2 * response + principles * 50))
        if not settings.rationales:  # a judge in this process writes no answer: its probabilities are read
            return Questions(judge, count * question, here, count * is_remote(judge))
        thought = settings.rationale_sampling.max_tokens * FILLED  # written once, and read again with the question
        count *= settings.rationales
        written = count * (thought + is_remote(judge))
        return Questions(judge, count * (2 * question + thought), here + count * thought, written)

    def rating(self, judge: str, responses: int, response: float) -> Questions:
        """The questions of a judge that rates single responses. response: tokens of one response."""
        sent = responses * self.principles * (self.prompt + response + 50)
        here = responses * (self.prompt + response + self.principles * 50)
        return Questions(judge, sent, here, responses * self.principles * is_remote(judge))


def _price(questions: Questions) -> float | None:
    from solon.engines.endpoint import parse_spec, price_usd

    model, url = parse_spec(questions.judge, questions.judge.partition(":")[0])
    return price_usd(model, url, round(questions.sent), round(questions.written))


def _mean(values: Iterable[float]) -> float:
    numbers = [float(v) for v in values]
    return sum(numbers) / len(numbers) if numbers else 0.0
