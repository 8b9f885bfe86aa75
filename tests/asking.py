"""A model asked as a judge, in one call: for tests that look at single answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from solon.constitution import Constitution
from solon.engines import Engine
from solon.feedback.judge import Asked, ModelJudge
from solon.feedback.ranking import Scheme
from solon.feedback.settings import JudgeSettings
from solon.records import Candidates, Chat, Comparison, Pair, Ranking, Rating
from solon.runs.call import Call
from solon.runs.options import Verb
from solon.stages.comparisons import Label, label_file

ONE = JudgeSettings()


def compare(
    pairs: Iterable[Pair], engine: Engine, rules: Constitution, how: JudgeSettings = ONE, *, asked: Asked | None = None,
    failed: Any = None, **options: Any,
) -> Iterator[Comparison]:  # fmt: skip
    meta = options.pop("meta", {})
    return ModelJudge(engine, rules, how, meta=lambda: meta, **options).compare(pairs, asked=asked, failed=failed)


def rank(
    candidates: Iterable[Candidates], engine: Engine, rules: Constitution, how: JudgeSettings = ONE, *,
    scheme: Scheme = "all", seed: int = 0, failed: Any = None,
) -> Iterator[Ranking]:  # fmt: skip
    return ModelJudge(engine, rules, how, seed=seed).rank(candidates, scheme=scheme, failed=failed)


def rate(
    chats: Iterable[tuple[str, Chat]], engine: Engine, rules: Constitution, *, principles: int | None = 1,
    scale: str = "levels", seed: int = 0,
) -> Iterator[Rating]:  # fmt: skip
    how = JudgeSettings(principles_per_pair=principles, scale=scale)  # type: ignore[arg-type]
    return ModelJudge(engine, rules, how, seed=seed).rate(chats)


class Called(Call):
    """A verb with an engine of the test's own; what --json would print is kept as `found`."""

    def __init__(self, verb: type[Verb], engine: Any = None, **given: Any) -> None:
        defaults = {option.name: option.default for option in verb.options()}
        super().__init__(verb, {**defaults, "quiet": True, "json_": False, **given})
        self._engine, self.found, self.outcome = engine, {}, None

    def engine(self) -> Any:
        return nullcontext(self._engine)

    def result(self, value: dict[str, Any]) -> None:
        self.found |= value

    def end(self, outcome: Any, what: str, result: dict[str, Any] | None = None) -> None:
        self.outcome = outcome
        self.result({**outcome.summary(), **(result or {})})


def label(pairs: str, out: Path, judge: ModelJudge, *, scheme: str = "all", **given: Any) -> dict[str, Any]:
    """`solon label` with this judge; what --json would print."""
    tournament = scheme == "tournament"
    call = Called(Label, judge.engine, pairs=pairs, out=out, model=judge.name, tournament=tournament, **given)
    label_file(call, judge)
    return {**call.found, "outcome": call.outcome}
