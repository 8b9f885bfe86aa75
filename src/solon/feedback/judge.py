"""The AI judge: which of two responses does a principle favour, and how surely?

Bai et al. 2022 (arXiv 2212.08073), section 4.1: the feedback model sees the conversation, a principle and two options, and
the label is the normalised probability of the two option letters. Each pair is shown in both orders and the two are
averaged in log-odds, so a preference for a position cancels. What the judge could not answer is an abstention with its
reason, never a label.

A `Judge` holds everything that decides its answers: the questions, the principles, the form of the labels, the examples and
the seed. Pairs, rankings, ratings, the choice of revisions, the checks during PPO and the final evaluation ask the same
object, so all of them ask the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from solon.constitution import Constitution, Principle, draw_principles
from solon.engines.base import Engine, Failure, OnFailure
from solon.errors import InputError
from solon.feedback.answers import Task, ask, ask_with_rationales
from solon.feedback.checks import judge_by_check
from solon.feedback.labels import comparison_of, to_comparison
from solon.feedback.principles import question_for
from solon.feedback.questions import HHH, Example, examples_from
from solon.feedback.settings import JudgeSettings
from solon.records import Candidates, Chat, Comparison, Judgement, Pair, Ranking, Rating

if TYPE_CHECKING:
    from solon.feedback.ranking import Scheme

WINDOW = 64  # pairs whose requests go to the engine together
Asked = Mapping[str, Sequence[Principle]]  # the principles of each pair, by the pair's id


class Judge:
    """Compares, ranks and rates responses.

    Another kind of judge is a subclass with a `name` that defines `first_log_odds`, or `compare` where it judges several
    pairs together. `feedback/judges` opens it by its name, and sets what follows the name here.
    """

    name: str
    constitution: Constitution
    settings: JudgeSettings
    engine: Engine  # the model that it asks; for a judge that asks none, an engine that knows its name alone
    seed: int = 0  # of what is drawn: principles, and who meets whom in a knock-out
    meta: Callable[[], dict[str, Any]] = dict  # what each record says of its origin

    def first_log_odds(self, pair: Pair) -> float | None:
        """The log-odds that the pair's first response is better; None: an abstention."""
        raise NotImplementedError

    def compare(
        self, pairs: Iterable[Pair], *, asked: Asked | None = None, failed: OnFailure | None = None
    ) -> Iterator[Comparison]:
        """One comparison a pair, in the order of `pairs`, in memory that does not grow with their number.

        asked: the principles of each pair, where they are already decided. failed: called instead of an abstention for
        a pair without an answer that a later start may get (an outage); such a pair yields no comparison.
        """
        for pair in pairs:
            yield comparison_of(pair, (), self.first_log_odds(pair), self.meta())

    def rate(self, chats: Iterable[tuple[str, Chat]]) -> Iterator[Rating]:
        """One rating a conversation, in order. chats: (id, conversation that ends with the response)."""
        raise InputError(f"{self.name}: this judge compares responses and does not rate a single one")

    def rank(
        self, candidates: Iterable[Candidates], *, scheme: Scheme = "all", failed: OnFailure | None = None
    ) -> Iterator[Ranking]:
        """One ranking a prompt, in order, out of comparisons: see `feedback.ranking.rank`."""
        from solon.feedback.ranking import rank

        return rank(candidates, self, scheme=scheme, failed=failed)

    def principles_of_prompt(self, name: str) -> list[Principle] | None:
        """The principles under which all pairs of a prompt are ranked; None: each pair's own."""
        return None


class ModelJudge(Judge):
    """A model that is asked the comparison questions of a constitution's principles."""

    def __init__(
        self,
        engine: Engine,
        constitution: Constitution,
        settings: JudgeSettings = JudgeSettings(),  # noqa: B008
        *,
        examples: Sequence[Example] = (),
        seed: int = 0,
        meta: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """examples: shown before each comparison. meta: what each record says of its origin, called as records are made."""
        self.engine: Engine = engine
        self.constitution, self.settings = constitution, settings
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
        """The judge that these settings describe. human: labelled comparisons, of which the first are shown as examples."""
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
        left = iter(pairs)
        while window := list(islice(left, WINDOW)):
            tasks = [task for pair in window for task in self._tasks(pair, asked)]
            answers = self._answers([t for t in tasks if t.check is None])
            judgements: dict[str, list[Judgement]] = {pair.id: [] for pair in window}
            out_of_reach: dict[str, str] = {}
            for task in tasks:
                if task.check is not None:
                    made = judge_by_check(task.check, task.pair.prompt, *task.pair.responses)
                else:
                    made = task.judgement(answers)
                    for why in filter(None, (answers[i].again for i, _, _ in task.orders())):
                        out_of_reach[task.pair.id] = why
                judgements[task.pair.id].append(made)
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
        """The principles of one question: drawn by the seed and the key, or all."""
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
        how = self.settings
        if not how.rationales:
            return ask(tasks, self.engine, self.examples)
        return ask_with_rationales(
            tasks, self.engine, self.examples, rationales=how.rationales, clamp=how.clamp, seed=self.seed,
            sampling=how.rationale_sampling.sampling(),
        )  # fmt: skip


def asked_constitution(constitution: Constitution, settings: JudgeSettings) -> Constitution:
    """The constitution whose principles a judge is asked, or the one question that the settings put in its place."""
    return constitution if settings.question is None else Constitution.from_question(settings.question)
