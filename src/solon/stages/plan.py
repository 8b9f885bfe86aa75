"""What `--dry-run` knows when a stage says what it will cost: the data, the lengths of texts, the prices of judges."""

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

WORDS_TO_TOKENS = 1.4  # English in today's vocabularies; an estimate needs no tokenizer
FILLED = 0.75  # share of its token limit that a sampled text fills


@dataclass(frozen=True)
class Questions:
    """What a stage asks one judge."""

    judge: str  # what --model takes
    sent: float  # tokens of all questions
    here: float  # of those, tokens that differ: what a model in this process computes
    written: float  # tokens of the answers


class Plan:
    """The rows of an estimate. Stages add theirs in the order in which they run."""

    def __init__(self, recipe: Common) -> None:
        self.recipe, self.data = recipe, Data(recipe)
        self.rows: list[dict[str, Any]] = []

    @cached_property
    def prompt(self) -> float:
        """Tokens of a prompt, on average."""
        return _mean(sum(len(m.content.split()) for m in p.prompt) for p in self.data.prompts) + 20

    @cached_property
    def request(self) -> float:
        """Tokens of a critique request or a revision request, on average."""
        rules = load_constitution(self.recipe.constitution).principles
        return _mean(len((p.critique + p.revision).split()) * WORDS_TO_TOKENS / 2 for p in rules) + 8

    @cached_property
    def principles(self) -> int:
        """Principles that a pair is judged under."""
        how = self.recipe.of(JudgeSettings)
        if how.question:
            return 1
        return how.principles_per_pair or len(load_constitution(self.recipe.constitution).principles)

    def add(
        self, name: str, records: int, *, read: float = 0, written: float = 0, trained: float = 0,
        questions: Sequence[Questions] = (),
    ) -> None:  # fmt: skip
        """Add a row. read, written, trained: tokens, without those of the questions."""
        priced = {model_name(q.judge): _price(q) for q in questions if is_remote(q.judge) and q.sent}
        unpriced = sorted(name for name, usd in priced.items() if usd is None)
        self.rows.append(
            {
                "name": name,
                "records": records,
                "prompt_tokens": round(read + sum(q.sent for q in questions)),
                "completion_tokens": round(written + sum(q.written for q in questions)),
                "trained_tokens": round(trained),
                "here": round(read + sum(q.here for q in questions)),
                "endpoints": sorted(priced),
                "unpriced": unpriced,
                "cost_usd": None if unpriced else round(sum(usd or 0.0 for usd in priced.values()), 6),
            }
        )

    def comparing(self, judge: str, pairs: int, response: float, principles: int | None = None) -> Questions:
        """A judge that compares pairs in both orders. response: tokens of one. principles: None: as the recipe draws."""
        how = self.recipe.of(JudgeSettings)
        principles = 1 if how.together else principles or self.principles
        shown = how.few_shot * (self.prompt + 2 * response + 50)
        each = self.prompt + 2 * response + 50 + shown
        asked = pairs * principles * 2
        here = pairs * (self.prompt + shown + 2 * (2 * response + principles * 50))
        if not how.rationales:  # in this process a letter is read off, not written
            return Questions(judge, asked * each, here, asked * is_remote(judge))
        thought = how.rationale_sampling.max_tokens * FILLED  # written once, and read again with the question
        asked *= how.rationales
        return Questions(
            judge, asked * (2 * each + thought), here + asked * thought, asked * (thought + is_remote(judge))
        )

    def rating(self, judge: str, responses: int, response: float) -> Questions:
        """A judge that rates single responses."""
        sent = responses * self.principles * (self.prompt + response + 50)
        here = responses * (self.prompt + response + self.principles * 50)
        return Questions(judge, sent, here, responses * self.principles * is_remote(judge))


def _price(questions: Questions) -> float | None:
    from solon.engines.endpoint import parse_spec, price_usd

    model, url = parse_spec(questions.judge, questions.judge.partition(":")[0])
    return price_usd(model, url, round(questions.sent), round(questions.written))


def _mean(values: Iterable[float]) -> float:
    found = [float(v) for v in values]
    return sum(found) / len(found) if found else 0.0
