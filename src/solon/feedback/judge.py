"""The AI judge: which of two responses a principle favours, and with what probability.

Bai et al. 2022 (arXiv 2212.08073), section 4.1: the feedback model sees the conversation, a principle and two options, and
the label is the normalised probability of the two option letters. Each pair is shown in both orders, and the log-odds of the
two orders are averaged, so a preference for a position cancels. A question without an answer is an abstention with its
reason, never a label.

A `Judge` holds everything that decides its answers: the questions, the principles, the form of the labels, the examples and
the seed. Pairs, rankings, ratings, the choice of revisions, the checks during PPO and the final evaluation use one `Judge`, so
all of them ask the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from solon.constitution import Constitution, Principle, draw_principles
from solon.engines.base import Engine, Failure, OnFailure
from solon.errors import InputError
from solon.feedback.answers import Task, ask, ask_of_each, ask_with_rationales
from solon.feedback.checks import judge_by_check
from solon.feedback.labels import comparison_of, to_comparison
from solon.feedback.principles import question_for
from solon.feedback.questions import HHH, Example, examples_from
from solon.feedback.settings import JudgeSettings
from solon.plugins import as_number
from solon.records import Candidates, Chat, Comparison, Judgement, Pair, Ranking, Rating

if TYPE_CHECKING:
    from solon.feedback.ranking import Scheme

WINDOW = 64  # pairs whose requests go to the engine together
Asked = Mapping[str, Sequence[Principle]]  # the principles of each pair, by the pair's id


class Judge:
    """Compares, ranks and rates responses.

    Another kind of judge is a subclass with a `name`. The subclass defines `first_log_odds`, or `compare` if it judges
    several pairs together. `feedback/judges` opens the judge by its name and sets the other attributes.
    """

    name: str
    constitution: Constitution
    settings: JudgeSettings
    engine: Engine  # the model; for a judge that is no model, an engine with the judge's name
    seed: int = 0  # draws the principles and the matches of a knock-out
    meta: Callable[[], dict[str, Any]] = dict  # the origin of each record

    def first_log_odds(self, pair: Pair) -> float | None:
        """The log-odds that the first response of the pair is better; None: an abstention."""
        raise InputError(f"judge:{self.name}: the class defines neither first_log_odds nor compare")

    def compare(
        self, pairs: Iterable[Pair], *, asked: Asked | None = None, failed: OnFailure | None = None
    ) -> Iterator[Comparison]:
        """One comparison per pair, in the order of `pairs`. The memory does not grow with the number of pairs.

        asked: the principles of each pair, if they are decided already. failed: called for a pair whose answer a later
        start may get (after an outage). Such a pair yields no comparison, not an abstention.
        """
        for pair in pairs:
            odds = self.first_log_odds(pair)
            if odds is not None:
                odds = as_number(odds, f"judge:{self.name}: first_log_odds")
            yield comparison_of(pair, (), odds, self.meta())

    def rate(self, chats: Iterable[tuple[str, Chat]]) -> Iterator[Rating]:
        """One rating per conversation, in order. chats: (id, conversation that ends with the response)."""
        raise InputError(f"{self.name}: this judge compares responses and does not rate a single one")

    def rank(
        self, candidates: Iterable[Candidates], *, scheme: Scheme = "all", failed: OnFailure | None = None
    ) -> Iterator[Ranking]:
        """One ranking per prompt, in order, from comparisons: see `feedback.ranking.rank`."""
        from solon.feedback.ranking import rank

        return rank(candidates, self, scheme=scheme, failed=failed)

    def principles_of_prompt(self, name: str) -> list[Principle] | None:
        """The principles for all pairs of a prompt in a ranking; None: each pair draws principles."""
        return None


class ModelJudge(Judge):
    """A model that answers the comparison questions of a constitution's principles."""

    def __init__(
        self, engine: Engine, constitution: Constitution, settings: JudgeSettings | None = None, *,
        examples: Sequence[Example] = (), seed: int = 0, meta: Callable[[], dict[str, Any]] = dict,
    ) -> None:  # fmt: skip
        """examples: shown before each comparison. meta: returns the origin of a record; called when a record is made."""
        self.engine: Engine = engine
        self.constitution, self.settings = constitution, settings or JudgeSettings()
        self.examples, self.seed, self.meta = examples, seed, meta

    @classmethod
    def of_settings(
        cls,
        engine: Engine,
        constitution: Constitution,
        settings: JudgeSettings,
        human: Sequence[Comparison] = (),
        **options: Any,
    ) -> ModelJudge:
        """The judge that the settings describe. human: labelled comparisons; the first `few_shot` are shown as examples."""
        rules = asked_constitution(constitution, settings)
        labelled = human[: settings.few_shot]
        examples = examples_from(labelled, lambda c: question_for(c, rules, settings.question or HHH))
        return cls(engine, rules, settings, examples=examples, **options)

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.engine.name

    def compare(
        self, pairs: Iterable[Pair], *, asked: Asked | None = None, failed: OnFailure | None = None
    ) -> Iterator[Comparison]:
        remaining = iter(pairs)
        while window := list(islice(remaining, WINDOW)):
            tasks = [task for pair in window for task in self._tasks(pair, asked)]
            answers = self._answers([t for t in tasks if t.check is None])
            judgements: dict[str, list[Judgement]] = {pair.id: [] for pair in window}
            out_of_reach: dict[str, str] = {}
            for task in tasks:
                if task.check is not None:
                    judgement = judge_by_check(task.check, task.pair.prompt, *task.pair.responses)
                else:
                    judgement = task.judgement(answers, "each" if self.settings.ask == "each" else "model")
                    for reason in filter(None, (answers[i].again for i, _, _ in task.orders())):
                        out_of_reach[task.pair.id] = reason
                judgements[task.pair.id].append(judgement)
            meta = self.meta()
            for pair in window:
                if failed and pair.id in out_of_reach:
                    failed(Failure(pair.id, out_of_reach[pair.id], again=True))
                else:
                    yield to_comparison(pair, judgements[pair.id], meta, soft=self.settings.soft_labels)

    def rate(self, chats: Iterable[tuple[str, Chat]]) -> Iterator[Rating]:
        from solon.feedback.rating import rate

        return rate(chats, self)

    def draw(self, *key: Any) -> list[Principle]:
        """The principles of one question: drawn by the key, which holds the seed; or all principles."""
        if self.settings.principles_per_pair is None:
            return list(self.constitution.principles)
        return draw_principles(self.constitution, self.settings.principles_per_pair, *key)

    def principles_of_prompt(self, name: str) -> list[Principle] | None:
        return None if self.settings.principles_per_pair is None else self.draw("rank", self.seed, name)

    def _tasks(self, pair: Pair, asked: Asked | None) -> list[Task]:
        principles = self.draw("compare", self.seed, pair.id) if asked is None else list(asked[pair.id])
        together = tuple(p for p in principles if p.check is None) if self.settings.together else ()
        groups = [together] if together else []
        groups += [(p,) for p in principles if p not in together]
        return [Task(pair, n, group) for n, group in enumerate(groups)]

    def _answers(self, tasks: Sequence[Task]) -> dict[str, Any]:
        settings = self.settings
        if settings.ask == "each":
            return ask_of_each(tasks, self.engine)
        if not settings.rationales:
            return ask(tasks, self.engine, self.examples)
        return ask_with_rationales(
            tasks, self.engine, self.examples, rationales=settings.rationales, clamp=settings.clamp, seed=self.seed,
            sampling=settings.rationale_sampling.sampling(),
        )  # fmt: skip


def asked_constitution(constitution: Constitution, settings: JudgeSettings) -> Constitution:
    """The constitution, or a constitution of one question if the settings have a `question`."""
    return constitution if settings.question is None else Constitution.from_question(settings.question)
